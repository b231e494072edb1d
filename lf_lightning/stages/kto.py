"""Kahneman-Tversky optimization: the policy learns from single responses that were liked or disliked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from lf_lightning.console import say
from lf_lightning.losses.kto import KTO_LOSSES, kl_estimate, weight_ratio, weights_in_range
from lf_lightning.models import GenerationSpec, LoRA, ReferenceSpec, Tuning
from lf_lightning.optim import AdamW, OptimizerSpec, ScheduleSpec
from lf_lightning.stages.held_reference import quiet
from lf_lightning.stages.judgement import ROUNDING, JudgementStage
from lf_lightning.types import BackboneSpec, FeedbackBatch, InputError, LossSums, StepBatch


class FeedbackValues(NamedTuple):
    """Numbers of U feedback rows; (U,) each."""

    policy: Tensor  # log-prob of the response
    reference: Tensor  # the same under the reference
    is_desirable: Tensor  # bool
    lengths: Tensor  # tokens
    num_correct: Tensor  # tokens that were the likeliest
    entropy: Tensor  # in nats
    kl_log_ratios: Tensor  # log policy - log reference of the partner's response to this prompt; 0 where there is none
    has_partner: Tensor  # bool


@final
class KTO(JudgementStage):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7).

    liked: desirable_weight (1 - sigma(beta (r - kl)))     disliked: undesirable_weight (1 - sigma(beta (kl - r)))
    r = log policy - log reference of the response;  kl = max(0, mean r of mismatched pairs over the whole step)
    loss = mean over all rows + ftx * (sum over liked rows of -mean log-prob) / rows

    Mismatched pairs are `data.kl_pairs`. The kl has no gradient.

    Args:
        backbone: The policy.
        tuning: Which parameters train; LoRA on every linear layer unless given.
        optimizer: The optimizer and its constants.
        schedule: How the learning rate changes.
        loss: `kto`, or `apo_zero_unpaired`, which pushes liked responses up and disliked ones down without a kl.
        beta: Strength of the pull towards the reference, > 0. Typical 0.05-0.5.
        desirable_weight: Weight of liked responses, >= 0.
        undesirable_weight: Weight of disliked responses, >= 0.
        ftx: Weight of learning the liked responses themselves, >= 0.
        reference: The frozen model that the policy is held against.
        max_grad_norm: Largest global norm of the gradient, > 0; larger ones are scaled down to it. Empty: no limit.
        non_finite: A loss or gradient that is not finite: `stop` the run, or `skip` the step and count it.
        generation: How `predict` and callbacks generate answers.
    """

    task = "kto"
    reference_shape = (2,)
    metrics = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "desirable_ratio",
        "kl",
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
        loss: Literal["kto", "apo_zero_unpaired"] = "kto",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        ftx: float = 0.0,
        reference: ReferenceSpec = ReferenceSpec(),
        max_grad_norm: float | None = 1.0,
        non_finite: Literal["stop", "skip"] = "stop",
        generation: GenerationSpec = GenerationSpec(),
    ) -> None:
        check_weights(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight, ftx=ftx)
        super().__init__(
            backbone,
            reference=reference,
            tuning=tuning,
            optimizer=optimizer,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            non_finite=non_finite,
            generation=generation,
        )
        self.loss, self.beta, self.ftx, self.reference = loss, beta, ftx, reference
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.feedback_loss = KTO_LOSSES[loss]
        self._kl = torch.zeros(())
        self._was_warned = False

    def look_at_data(self) -> None:
        """Look at the balance of liked and disliked rows, and tell the data whether rows need partners.

        Raises:
            InputError: Pairs are asked for that the loss does not read.
        """
        if not self.feedback_loss.uses_kl and self.data.arguments["kl_pairs"] != "step":
            raise InputError(f"data.kl_pairs: {self.loss} estimates no kl, got dataset. Remove it, or set loss: kto.")
        self.data.wants_partners = self.feedback_loss.uses_kl
        numbers = self.data.num_desirable("train") if self.trainer.state.fn == "fit" else None
        if numbers is not None:
            warn_of_weights(self.desirable_weight, self.undesirable_weight, *numbers)

    # ------------------------------------------------------------------ the algorithm

    @property
    def coefficients(self) -> dict[str, float]:
        """The loss of rows, and learning the liked responses where that has a weight."""
        return {"kto": 1.0, **({"sft": self.ftx} if self.ftx else {})}

    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Rows divide the loss; liked and disliked rows and tokens divide their own metrics."""
        batches: Sequence[FeedbackBatch] = step.micro_batches
        counts = dict.fromkeys((*self.coefficients, *self.metrics), sum(batch.num_units for batch in batches))
        num_liked = sum(int(batch.is_desirable.sum()) for batch in batches)
        num_disliked = sum(int((~batch.is_desirable).sum()) for batch in batches)
        for name in ("rewards", "logps"):
            counts[f"{name}/chosen"], counts[f"{name}/rejected"] = num_liked, num_disliked
        num_tokens = sum(int((batch.responses.targets >= 0).sum()) for batch in batches)
        counts["token_accuracy"] = counts["entropy"] = num_tokens
        return counts

    def reference_sums(self, micro_batch: FeedbackBatch) -> Tensor:
        """Log-probs of the response and of the partner's under the reference."""
        return self.reference_log_probs(micro_batch.both, pairs=False).log_probs.view(-1, 2)

    def with_constants(self, micro_batch: FeedbackBatch) -> FeedbackBatch:
        """Reference log-probs of both responses to each prompt, and log-ratios of the mismatched ones."""
        reference = self.with_reference(micro_batch).reference
        micro_batch = micro_batch._replace(reference=reference)
        assert reference is not None
        ratios = torch.zeros_like(reference[:, 1])
        if self.feedback_loss.uses_kl:
            with quiet(self.backbone):
                policy = self.policy_log_probs(micro_batch.mismatched, pairs=False).log_probs
            ratios = torch.where(micro_batch.has_partner, policy - reference[:, 1].to(policy.dtype), 0.0)
        return micro_batch._replace(kl_log_ratios=ratios)

    def unit_values(self, micro_batch: FeedbackBatch) -> FeedbackValues:
        """Log-prob of each response under policy and reference."""
        found = self.policy_log_probs(micro_batch.responses, pairs=False)
        assert micro_batch.reference is not None
        assert micro_batch.kl_log_ratios is not None
        return FeedbackValues(
            policy=found.log_probs,
            reference=micro_batch.reference[:, 0].to(found.log_probs.dtype),
            is_desirable=micro_batch.is_desirable,
            lengths=found.lengths,
            num_correct=found.num_correct,
            entropy=found.entropy,
            kl_log_ratios=micro_batch.kl_log_ratios,
            has_partner=micro_batch.has_partner,
        )

    def loss_sums(self, values: FeedbackValues) -> LossSums:
        """The loss of each row and the metrics that LlamaFactory names."""
        ratios, liked = values.policy - values.reference, values.is_desirable
        losses = self.feedback_loss.function(
            ratios,
            liked,
            kl=self._kl.to(ratios),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        terms = {"kto": losses.sum()}
        if self.ftx:
            terms["sft"] = -torch.where(liked, values.policy / values.lengths, 0.0).sum()
        rewards, ahead = self.beta * ratios.detach(), ratios.detach() - self._kl.to(ratios)
        metrics = {
            "rewards/chosen": rewards[liked].sum(),
            "rewards/rejected": rewards[~liked].sum(),
            "rewards/accuracies": torch.where(liked, ahead > ROUNDING, ahead < -ROUNDING).sum(),
            "logps/chosen": values.policy[liked].sum(),
            "logps/rejected": values.policy[~liked].sum(),
            "desirable_ratio": liked.sum(),
            "kl": self._kl.to(ratios) * len(liked),
            "token_accuracy": values.num_correct.sum(),
            "entropy": values.entropy.sum(),
        }
        return LossSums(terms, metrics)

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """Loss and metrics; a side without rows has no mean, and a loss without kl none to report."""
        shown = {name: value for name, value in means.items() if name != "kto" or self.ftx}
        share = shown["desirable_ratio"]
        for side, is_absent in (("chosen", share == 0), ("rejected", share == 1)):
            if is_absent:
                shown |= {f"rewards/{side}": math.nan, f"logps/{side}": math.nan}
        shown["rewards/margins"] = shown["rewards/chosen"] - shown["rewards/rejected"]
        if not self.feedback_loss.uses_kl:
            del shown["kl"]
        return shown

    # ------------------------------------------------------------------ statistics of the step

    def observe_step(self, micro_batches: Sequence[FeedbackBatch]) -> None:
        """The kl of the step over all its mismatched pairs, on all ranks."""
        ratios = [batch.kl_log_ratios for batch in micro_batches if batch.kl_log_ratios is not None]
        self._observe(torch.cat(ratios), torch.cat([batch.has_partner for batch in micro_batches]))

    def observe_set(self, values: FeedbackValues) -> None:
        """The kl of the set."""
        self._observe(values.kl_log_ratios, values.has_partner)

    def _observe(self, log_ratios: Tensor, has_partner: Tensor) -> None:
        if not self.feedback_loss.uses_kl:
            return
        total, num_pairs = self.ranks.sums([log_ratios.sum(), has_partner.sum()])
        self._kl = kl_estimate(log_ratios.new_tensor(total), int(num_pairs))
        if not num_pairs and not self._was_warned:
            self._was_warned = True
            say(
                "KTO: a step of one row has no mismatched pair, so its kl is 0. "
                "Choose a data.global_batch_size that leaves no step of one row."
            )


def check_weights(*, beta: float, desirable_weight: float, undesirable_weight: float, ftx: float) -> None:
    """Refuse numbers outside their range.

    Raises:
        InputError: As said.
    """
    for name, value, holds, want in (
        ("beta", beta, 0 < beta < math.inf, "positive"),
        ("desirable_weight", desirable_weight, 0 <= desirable_weight < math.inf, "0 or more"),
        ("undesirable_weight", undesirable_weight, 0 <= undesirable_weight < math.inf, "0 or more"),
        ("ftx", ftx, 0 <= ftx < math.inf, "0 or more"),
    ):
        if not holds:
            raise InputError(f"model.init_args.{name}: must be {want}, got {value}. Correct it.")
    if desirable_weight == undesirable_weight == 0 == ftx:
        raise InputError("model.init_args.desirable_weight: must not be 0 with the other weights, got 0. Raise one.")


def warn_of_weights(
    desirable_weight: float, undesirable_weight: float, num_desirable: int, num_undesirable: int
) -> None:
    """Say where the weights leave the range of the paper's eq. 8, or one kind of row is missing."""
    numbers = (desirable_weight, undesirable_weight, num_desirable, num_undesirable)
    ratio = weight_ratio(*numbers)
    if ratio is None:
        kind = "disliked" if num_desirable else "liked"
        say(f"KTO: no {kind} row among {num_desirable + num_undesirable:,}. It wants both kinds.")
    elif not weights_in_range(*numbers):
        low = undesirable_weight * num_undesirable / num_desirable
        say(
            f"KTO: desirable_weight x {num_desirable:,} liked / (undesirable_weight x {num_undesirable:,} disliked) is "
            f"{ratio:.2f}, the paper's eq. 8 asks for 1 to 1.33: desirable_weight {low:.2f} to {low * 4 / 3:.2f}."
        )
