"""What stages share that learn from their own responses: roll out, score, keep the experience, measure on prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lf_lightning.callbacks.predictions import Sample, from_all_ranks, gather_predictions
from lf_lightning.callbacks.run_log import log_is_due
from lf_lightning.console import say
from lf_lightning.losses.log_probs import sequence_sums
from lf_lightning.models import Backbone, GenerationEngine, ReferenceSpec, SamplingSpec, without_dropout
from lf_lightning.models.rewards import Reward, RewardSetting
from lf_lightning.stages.answers import answers_of
from lf_lightning.stages.base import Stage
from lf_lightning.stages.experience import Experience, Rollout, TokenValues, statistics_of, values_kernel
from lf_lightning.stages.held_reference import HeldReference, quiet
from lf_lightning.stages.respond import by_name, respond, row_seeds, samples_of, sums_of
from lf_lightning.stages.rollout_doors import check_rollouts, sampling_line
from lf_lightning.types import (
    Answer,
    BackboneSpec,
    InputError,
    LossSums,
    PromptBatch,
    Response,
    RolloutBatch,
    StepBatch,
)

EVAL_DRAWS = 0xE7A1
"""Keeps the seeds of validation apart from those of rollouts."""


class RolloutStage(Stage):
    """A stage that answers prompts, has the answers scored, and updates the policy on them for a few epochs.

    The step contract begins at the stored rollout: its responses and experience are the same on every rank, and a
    checkpoint in the middle of a rollout holds them, so that a resume goes on with the next optimizer step.

    Dropout is off everywhere: the log-probs of the updates are those that drew the responses.

    Args:
        backbone: The policy.
        rewards: What scores responses, at least one.
        reference: What the policy is held against; None where nothing holds it.
        generation: How responses are drawn.
        engine: What answers prompts.
        num_epochs: Passes over a rollout.
        group_size: Responses to each prompt of a rollout.
        options: As in `Stage`.
    """

    generation: SamplingSpec

    def __init__(
        self,
        backbone: BackboneSpec,
        *,
        rewards: Sequence[Reward],
        reference: ReferenceSpec | None,
        generation: SamplingSpec,
        engine: GenerationEngine,
        num_epochs: int,
        group_size: int = 1,
        **options: Any,
    ) -> None:
        check_rollouts(rewards, reference, generation, options["tuning"])
        super().__init__(backbone, generation=generation, **options)
        self.rewards, self.engine = tuple(rewards), engine
        self.num_epochs, self.group_size = num_epochs, group_size
        self.held = HeldReference(reference, self.tuning)
        self.kept: Rollout | None = None
        """The rollout that the steps are on."""
        self.samples: list[Sample] = []
        """Responses to the prompts of the last validation set."""
        self._found: list[Sample] = []
        self._are_prepared = False
        self._is_far = False
        """Whether the ratio of the last step was above the threshold, so that the step was not made."""

    # ------------------------------------------------------------------ what a stage defines

    entropy_coef = 0.0
    """Weight of the entropy in the loss; it is computed with gradient where this is not 0."""

    @abstractmethod
    def experience(self, rollout: Rollout, found: TokenValues) -> Experience:
        """Make advantages and the rest of a rollout, and put what is to be logged of it into `rollout.logged`.

        Args:
            rollout: The responses of all ranks.
            found: What policy, critic and reference say of all N tokens; (N,) float64 each, on the CPU.
        """

    @abstractmethod
    def token_losses(
        self, now: TokenValues, then: Experience, sequences: Tensor, micro_batch: RolloutBatch
    ) -> LossSums:
        """Loss terms and metrics of a micro-batch, summed.

        Args:
            now: What the policy says of its M counted tokens; (M,) each.
            then: The experience of the same tokens; (M,) each.
            sequences: Response that each token belongs to; (M,) int64 in [0, U).
            micro_batch: Where they come from.
        """

    # ------------------------------------------------------------------ the model, its reference and its rewards

    def setup(self, stage: str) -> None:
        """Refuse what would train wrong numbers, and tell the data how rollouts are made of prompts."""
        super().setup(stage)
        if self.data is None:
            raise InputError("data: must be a DataModule for rollouts, got loaders. Pass datamodule=DataModule(...).")
        self.data.group_size, self.data.rollout_epochs = self.group_size, self.num_epochs
        self.kept, self.is_idle = None, False

    def extend_backbone(self, backbone: Backbone) -> None:
        """Switch dropout off, add a head, take a reference that lives in the policy, and load the rewards."""
        without_dropout(backbone, adapters=True)
        self.add_head(backbone)
        self.held.take_from(self, backbone)
        if self.trainer.state.fn != "predict":
            self._prepare_rewards(backbone)

    def add_head(self, backbone: Backbone) -> None:
        """Put a head on the model. A hook: a stage without critic has none."""

    def _prepare_rewards(self, backbone: Backbone) -> None:
        device = self.trainer.strategy.root_device
        for reward in self.rewards:
            reward.prepare(RewardSetting(backbone, self.data.tokenizer, device))
        self._are_prepared = True

    @property
    def companions(self) -> list[Backbone]:
        """The reference, where it is a model of its own."""
        return self.held.companions(self)

    def prepare_run(self) -> None:
        """Bring the reference to the device, and say where the trained log-probs are not those of the draws."""
        if self.held.model is not None:
            self.held.model.to(self.device)
        if not self._are_prepared:
            self._prepare_rewards(self.backbone)
        line = sampling_line(self.generation)
        if line and self.trainer.state.fn == "fit":
            say(line)

    # ------------------------------------------------------------------ rollouts

    def rollout(self, number: int, prompts: Sequence[PromptBatch]) -> Sequence[Response]:
        """Answer and score this rank's prompts.

        Args:
            number: Of the rollout in the run, from 0; one that a checkpoint brought back is not made again.
            prompts: This rank's share; the same number of batches on every rank.

        Returns:
            The responses of all ranks in the order of their rows: the same on every rank.

        Raises:
            TrainingStopped: A reward failed, on whichever rank.
        """
        if self.kept is None or self.kept.number != number:
            self.is_idle = False
            with quiet(self.backbone), self.trainer.precision_plugin.forward_context():
                found = respond(self, prompts, self.generation, seeds=[self.seed, number])
            lengths = [int(length) for batch in prompts for length in batch.mask.sum(1)]
            own = [response for responses in found for response in responses]
            own_length = sum(length for length, response in zip(lengths, own, strict=True) if response.row >= 0)
            responses = tuple(sorted(each for part in from_all_ranks(own) for each in part if each.row >= 0))
            (total,) = self.ranks.sums([own_length])
            self.kept = Rollout(number, responses, prompt_length=total / len(responses))
        return self.kept.to(self.device).responses

    def make_experience(self, steps: Sequence[StepBatch]) -> None:
        """Compute what the updates need of every token, on the very batches of the first epoch.

        Log-probs and values come from the micro-batches that the first steps will run on, so that there the ratio is
        1 bit by bit.
        """
        rollout = self.kept
        assert rollout is not None, "a rollout comes first"
        if rollout.experience is not None:
            return
        parts: dict[str, Tensor] = {}
        with quiet(self.backbone), self.trainer.precision_plugin.forward_context():
            for micro_batch in (micro_batch for step in steps for micro_batch in step.micro_batches):
                moved = self.transfer_batch_to_device(micro_batch, self.device, 0)
                counted = moved.places >= 0
                for name, part in self.token_values(moved, with_reference=True)._asdict().items():
                    if part is not None:
                        size = int(rollout.lengths.sum())
                        whole = parts.setdefault(name, part.new_zeros(size))
                        whole[moved.places[counted]] = part[counted]
        dtype = parts["log_probs"].dtype
        found = TokenValues(**{name: self.ranks.sum_of(part) for name, part in parts.items()})
        made = self.experience(rollout, found)
        rollout.logged |= statistics_of(rollout, found, self.weights) | by_name(self.rewards, rollout.scores.mean(0))
        rollout.experience = made.to(dtype)
        rollout.to(self.device)

    @property
    def weights(self) -> Tensor:
        """Part of each reward in the sum; (rewards,) float64."""
        return torch.tensor([reward.weight for reward in self.rewards], dtype=torch.float64)

    # ------------------------------------------------------------------ the step

    def token_values(
        self, micro_batch: RolloutBatch, *, with_reference: bool = False, with_entropy: bool = False
    ) -> TokenValues:
        """What policy, critic and, where asked for, reference say of each token; (B, T) each."""
        temperature = self.generation.train_temperature
        kernel = values_kernel(
            self.backbone.value_head,
            temperature=temperature,
            with_entropy=with_entropy,
            entropy_grad=self.entropy_coef > 0,
        )
        values: TokenValues = self.backbone(micro_batch.tokens, kernel=kernel)
        if with_reference and self.held.model is not None:
            kernel = values_kernel(None, temperature=temperature)
            held: TokenValues = self.held.model.forward(micro_batch.tokens, kernel=kernel)
            values = values._replace(reference=held.log_probs)
        return values

    def micro_batch_loss(self, micro_batch: RolloutBatch) -> LossSums:
        """Loss and metrics of the counted tokens, held against the experience of the rollout."""
        assert self.kept is not None
        assert self.kept.experience is not None, "experience comes before the first step"
        assert micro_batch.tokens.sequences is not None
        wants_entropy = self.entropy_coef > 0 or log_is_due(self.trainer, ahead=1)
        found = self.token_values(micro_batch, with_entropy=wants_entropy)
        counted = micro_batch.places >= 0
        index = micro_batch.places[counted]
        now = TokenValues._make(None if part is None else part[counted] for part in found)
        then = Experience._make(None if part is None else part[index] for part in self.kept.experience)
        return self.token_losses(now, then, micro_batch.tokens.sequences[counted], micro_batch)

    def is_too_far(self, means: dict[str, float], *, target_kl: float | None, ratio_threshold: float | None) -> bool:
        """Whether a step is too far from the policy that drew the responses; a KL that is ends the whole rollout.

        Args:
            means: Metrics of the step, over all ranks.
            target_kl: The step is not made, and no further one on this rollout, where the approximate KL is above 1.5
                times this (the rule of OpenAI's Spinning Up).
            ratio_threshold: The step is not made where the mean ratio is above this.
        """
        assert self.kept is not None
        step, kl, ratio = self.trainer.global_step + 1, means["policy/approxkl"], means["policy/ratio"]
        if target_kl is not None and kl > 1.5 * target_kl:
            self.kept.is_over = self.is_idle = True
            say(f"step {step}: approximate KL {kl:.4g} is too large; the rest of this rollout changes nothing")
        self._is_far = ratio_threshold is not None and ratio > ratio_threshold
        if self._is_far and not self.is_idle:
            say(f"step {step}: mean ratio {ratio:.4g} is above {ratio_threshold:g}; this step changes nothing")
        return self._is_far or self.is_idle

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """Loss and reward, the parts of the loss, and the statistics of step and rollout."""
        logged = self.kept.logged if self.kept is not None else {}
        parts = {f"loss/{name}": means[name] for name in self.coefficients}
        rest = {name: means[name] for name in self.metrics}
        halted = {"early_stop": float(self.is_idle), "ratio_stop": float(self._is_far and not self.is_idle)}
        return {"loss": means["loss"], **logged, **parts, **rest, **halted}

    # ------------------------------------------------------------------ validation

    @property
    def measured(self) -> tuple[str, ...]:
        """What is measured on prompts."""
        each = tuple(by_name(self.rewards, self.weights))
        kl = ("kl",) if self.held.spec is not None else ()
        return ("reward", *each, *kl, "response_length", "stop_ratio")

    def set_values(self, means: dict[str, float]) -> dict[str, float]:
        """All that is measured."""
        return means

    def on_validation_start(self) -> None:
        """Begin with no samples."""
        self._found = []
        super().on_validation_start()

    on_test_start = on_validation_start

    def evaluate(self, step: Any) -> None:
        """Answer a batch of prompts, score the answers, and hold them against the reference."""
        batch: PromptBatch = step
        (responses,) = respond(self, [batch], self._eval_generation, seeds=[self.seed, EVAL_DRAWS])
        micro_batch = self.transfer_batch_to_device(self.data.answered(batch, responses), self.device, 0)
        kl = self._kl_of(micro_batch, num_responses=len(responses))
        samples = samples_of(self, batch, responses, kl)
        self._found += samples
        sums = sums_of(samples, self.rewards, [each for each in responses if each.row >= 0])
        kept = {name: torch.tensor(sums.get(name, 0.0), dtype=self.ranks.exact) for name in self.measured}
        self._means.update(LossSums({}, kept), dict.fromkeys(self.measured, len(samples)))

    def _kl_of(self, micro_batch: RolloutBatch, *, num_responses: int) -> list[float | None]:
        """Summed log policy - log reference of each response, in nats; None where there is no reference."""
        if self.held.model is None:
            return [None] * num_responses
        found = self.token_values(micro_batch, with_reference=True)
        assert found.reference is not None
        assert micro_batch.tokens.sequences is not None
        sums = sequence_sums(found.log_probs - found.reference, micro_batch.tokens.sequences, num_responses)
        return list(sums.tolist())

    def finish_evaluation(self) -> None:
        """Bring the samples of all ranks together, for callbacks to write."""
        self.samples = gather_predictions(self._found)

    # ------------------------------------------------------------------ prediction and state

    @property
    def _eval_generation(self) -> SamplingSpec:
        return replace(self.generation, do_sample=self.generation.eval_do_sample)

    def answers(self, batch: PromptBatch) -> list[Answer]:
        """Generate an answer to each prompt; greedy unless the generation spec says otherwise."""
        seeds = row_seeds(batch, [self.seed, EVAL_DRAWS])
        return answers_of(self, batch, self._eval_generation, seeds=seeds)

    def own_state(self) -> dict[str, Any]:
        """The rollout in progress, where steps on it are left."""
        if self.kept is None or not self.data.rollout_in_progress:
            return {}
        return {"rollout": self.kept.state()}

    def take_own_state(self, state: dict[str, Any]) -> None:
        """Continue in the middle of a rollout."""
        if "rollout" in state:
            self.kept = Rollout.from_state(state["rollout"])
            self.is_idle = self.kept.is_over
