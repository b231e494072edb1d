"""Direct preference optimization and its family: the policy learns from pairs, without a reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from lf_lightning.losses.log_probs import length_desensitized
from lf_lightning.losses.preference import (
    PREFERENCE_LOSSES,
    LogRatios,
    PreferenceConstants,
    StepKL,
    bco_shifted_loss,
    mixed_loss,
    preference_rewards,
)
from lf_lightning.models import GenerationSpec, LoRA, ReferenceSpec, Tuning
from lf_lightning.optim import AdamW, OptimizerSpec, ScheduleSpec
from lf_lightning.stages.judgement import ROUNDING, JudgementStage, joined
from lf_lightning.types import BackboneSpec, InputError, LossSums, PreferenceBatch, StepBatch

LossName = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "kto_pair",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "orpo",
    "simpo",
]


class PairValues(NamedTuple):
    """Numbers of P pairs; the second dimension is chosen, rejected."""

    policy: Tensor  # (P, 2) log-probs of the responses, as `ld_alpha` weighs their tokens
    reference: Tensor  # (P, 2) the same under the reference; zeros where the loss knows none
    whole: Tensor  # (P, 2) log-probs of the responses, all tokens alike
    lengths: Tensor  # (P, 2) tokens
    num_correct: Tensor  # (P, 2) tokens that were the likeliest
    entropy: Tensor  # (P, 2) in nats


@final
class DPO(JudgementStage):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) and the losses that grew from it.

    loss = f(r_chosen, r_rejected) + ftx * (-mean log-prob of the chosen response),  r = log policy - log reference

    With `bco_weight` w the first part is (f + w bco) / (1 + w); bco is the loss of binary classifier optimization
    (Jung et al. 2024, arXiv:2404.04656), whose baseline is the running mean of the steps' rewards.

    Args:
        backbone: The policy.
        tuning: Which parameters train; LoRA on every linear layer unless given.
        optimizer: The optimizer and its constants.
        schedule: How the learning rate changes.
        loss: The function f. ipo and sigmoid_norm compare means per token, orpo and simpo means without a reference.
        beta: Strength of the pull towards the reference, > 0; typical 0.01-0.5, for means larger: simpo 2-2.5,
            sigmoid_norm 5. orpo: weight of the odds ratio.
        ftx: Weight of learning the chosen response itself, >= 0.
        bco_weight: Weight of the BCO mix, >= 0; needs a loss with a reference.
        ld_alpha: Weight of the tokens of the longer response that have no counterpart in the shorter one, in [0, 1]
            (LD-DPO). In policy and reference alike. Means are over all tokens of a response nevertheless.
        reference: The frozen model that the policy is held against.
        constants: What only some losses read: label_smoothing, simpo_gamma, discopop_tau.
        max_grad_norm: Largest global norm of the gradient, > 0; larger ones are scaled down to it. Empty: no limit.
        non_finite: A loss or gradient that is not finite: `stop` the run, or `skip` the step and count it.
        generation: How `predict` and callbacks generate answers.
    """

    task = "dpo"
    reference_shape = (2, 2)
    metrics = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "token_accuracy",
        "entropy",
    )

    def __init__(
        self,
        backbone: BackboneSpec,
        tuning: Tuning = LoRA(),
        optimizer: OptimizerSpec = AdamW(),
        schedule: ScheduleSpec = ScheduleSpec(),
        *,
        loss: LossName = "sigmoid",
        beta: float = 0.1,
        ftx: float = 0.0,
        bco_weight: float = 0.0,
        ld_alpha: float = 1.0,
        reference: ReferenceSpec = ReferenceSpec(),
        constants: PreferenceConstants = PreferenceConstants(),
        max_grad_norm: float | None = 1.0,
        non_finite: Literal["stop", "skip"] = "stop",
        generation: GenerationSpec = GenerationSpec(),
    ) -> None:
        check_numbers(beta=beta, ftx=ftx, bco_weight=bco_weight, ld_alpha=ld_alpha)
        self.preference_loss = PREFERENCE_LOSSES[loss]
        check_loss(loss, reference=reference, constants=constants, bco_weight=bco_weight)
        super().__init__(
            backbone,
            reference=reference if self.preference_loss.uses_reference else None,
            tuning=tuning,
            optimizer=optimizer,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            non_finite=non_finite,
            generation=generation,
        )
        self.loss, self.beta, self.ftx, self.bco_weight, self.ld_alpha = loss, beta, ftx, bco_weight, ld_alpha
        self.reference, self.constants = reference, constants
        self._kl: StepKL | None = None

    # ------------------------------------------------------------------ the algorithm

    @property
    def coefficients(self) -> dict[str, float]:
        """The preference loss, and learning the chosen response where that has a weight."""
        return {"preference": 1.0, **({"sft": self.ftx} if self.ftx else {})}

    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Pairs divide the loss and most metrics; tokens of the chosen and of all responses the last two."""
        num_pairs = sum(micro_batch.num_units for micro_batch in step.micro_batches)
        counts = dict.fromkeys((*self.coefficients, *self.metrics), num_pairs)
        numbers = [sequence_numbers(micro_batch) for micro_batch in step.micro_batches]
        counts["token_accuracy"] = sum(int((each % 2 == 0).sum()) for each in numbers)
        counts["entropy"] = sum(len(each) for each in numbers)
        return counts

    def reference_sums(self, micro_batch: PreferenceBatch) -> Tensor:
        """Log-probs of both responses under the reference, whole and front."""
        found = self.reference_log_probs(micro_batch.tokens, pairs=True)
        return torch.stack([found.log_probs, found.front], 1).view(-1, 2, 2)

    def unit_values(self, micro_batch: PreferenceBatch) -> PairValues:
        """Log-probs of both responses of each pair under policy and reference."""
        found = self.policy_log_probs(micro_batch.tokens, pairs=True)
        policy = length_desensitized(found.log_probs, found.front, ld_alpha=self.ld_alpha)
        reference = torch.zeros_like(policy).view(-1, 2)
        if micro_batch.reference is not None:
            whole, front = micro_batch.reference.to(policy.dtype).unbind(2)
            reference = length_desensitized(whole, front, ld_alpha=self.ld_alpha)
        rest = (found.log_probs, found.lengths, found.num_correct, found.entropy)
        return PairValues(policy.view(-1, 2), reference, *(part.view(-1, 2) for part in rest))

    def log_ratios(self, values: PairValues) -> LogRatios:
        """Log policy - log reference of both responses, as sums or as means per token, as the loss wants them."""
        ratios = values.policy - values.reference
        if self.preference_loss.uses_means:
            ratios = ratios / values.lengths
        return LogRatios(*ratios.unbind(1))

    def loss_sums(self, values: PairValues) -> LossSums:
        """The loss of each pair and the metrics that LlamaFactory names."""
        ratios = self.log_ratios(values)
        losses = self.preference_loss.function(ratios, beta=self.beta, constants=self.constants, kl=self._kl)
        if self.bco_weight:
            delta = self.memory.get("bco_sum", 0.0) / max(self.memory.get("bco_steps", 0.0), 1.0)
            losses = mixed_loss(losses, bco_shifted_loss(ratios, beta=self.beta, delta=delta), weight=self.bco_weight)
        terms = {"preference": losses.sum()}
        if self.ftx:
            terms["sft"] = -(values.whole / values.lengths)[:, 0].sum()
        chosen, rejected = preference_rewards(ratios, beta=self.beta)
        log_probs = values.whole / values.lengths if self.preference_loss.uses_means else values.whole
        metrics = {
            "rewards/chosen": chosen.sum(),
            "rewards/rejected": rejected.sum(),
            "rewards/accuracies": (ratios.margin.detach() > ROUNDING).sum(),
            "rewards/margins": (chosen - rejected).sum(),
            "logps/chosen": log_probs[:, 0].sum(),
            "logps/rejected": log_probs[:, 1].sum(),
            "token_accuracy": values.num_correct[:, 0].sum(),
            "entropy": values.entropy.sum(),
        }
        return LossSums(terms, metrics)

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """Loss, its parts where it has several, and the metrics."""
        return means if self.ftx else {name: value for name, value in means.items() if name != "preference"}

    # ------------------------------------------------------------------ statistics of the step

    def observe_step(self, micro_batches: Sequence[PreferenceBatch]) -> None:
        """The step's KL terms, and one more observation of the BCO baseline."""
        if not (self.preference_loss.uses_step_kl or self.bco_weight):
            return
        self.observe_set(joined([self.unit_values(micro_batch) for micro_batch in micro_batches]), training=True)

    def observe_set(self, values: PairValues, *, training: bool = False) -> None:
        """The KL terms of all units of all ranks; the baseline moves in training only."""
        if not (self.preference_loss.uses_step_kl or self.bco_weight):
            return
        ratios = self.log_ratios(values)
        num_pairs, chosen, rejected = self.ranks.sums([len(values.policy), ratios.chosen.sum(), ratios.rejected.sum()])
        means = [total / max(num_pairs, 1) for total in (chosen, rejected)]
        self._kl = StepKL(*(ratios.chosen.new_tensor(max(mean, 0.0)) for mean in means))
        reward = self.beta * sum(means) / 2
        if training and self.bco_weight and math.isfinite(reward):
            self.memory["bco_sum"] = self.memory.get("bco_sum", 0.0) + reward
            self.memory["bco_steps"] = self.memory.get("bco_steps", 0.0) + 1


def sequence_numbers(micro_batch: PreferenceBatch) -> Tensor:
    """The sequence of each counted token; even numbers are chosen responses; (N,)."""
    tokens = micro_batch.tokens
    assert tokens.sequences is not None
    return tokens.sequences[tokens.sequences < tokens.num_sequences]


def check_numbers(*, beta: float, ftx: float, bco_weight: float, ld_alpha: float) -> None:
    """Refuse numbers outside their range.

    Raises:
        InputError: As said.
    """
    for name, value, holds, want in (
        ("beta", beta, 0 < beta < math.inf, "positive"),
        ("ftx", ftx, 0 <= ftx < math.inf, "0 or more"),
        ("bco_weight", bco_weight, 0 <= bco_weight < math.inf, "0 or more"),
        ("ld_alpha", ld_alpha, 0 <= ld_alpha <= 1, "in [0, 1]"),
    ):
        if not holds:
            raise InputError(f"model.init_args.{name}: must be {want}, got {value}. Correct it.")


def check_loss(loss: str, *, reference: ReferenceSpec, constants: PreferenceConstants, bco_weight: float) -> None:
    """Refuse options that this loss would not read.

    Raises:
        InputError: Names the option.
    """
    entry, where = PREFERENCE_LOSSES[loss], "model.init_args"
    if not entry.uses_reference and reference != ReferenceSpec():
        raise InputError(f"{where}.reference: {loss} knows no reference, got one. Remove it, or take another loss.")
    if not entry.uses_reference and bco_weight:
        raise InputError(f"{where}.bco_weight: needs a loss with a reference, got {loss}. Set it to 0.")
    if loss in ("robust", "exo_pair") and constants.label_smoothing == 0:
        raise InputError(
            f"{where}.constants.label_smoothing: must be above 0 for {loss}, got 0. Leave it out, or try 0.1."
        )
    plain = vars(PreferenceConstants())
    for name, value in vars(constants).items():
        if value != plain[name] and name not in entry.options:
            raise InputError(f"{where}.constants.{name}: {loss} does not read it, got {value}. Remove it.")
