"""Group relative policy optimization: responses to the same prompt are each other's baseline; there is no critic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from lf_lightning.losses.grpo import GRPOConstants, group_advantages, importance_log_ratios, token_weights
from lf_lightning.losses.ppo import approximate_kl, clipped_policy_loss, kl_estimate
from lf_lightning.models import GenerationEngine, LoRA, ReferenceSpec, SamplingSpec, TransformersEngine, Tuning
from lf_lightning.models.rewards import Reward
from lf_lightning.optim import AdamW, OptimizerSpec, ScheduleSpec
from lf_lightning.stages.experience import Experience, Rollout, TokenValues
from lf_lightning.stages.rollout import RolloutStage
from lf_lightning.types import BackboneSpec, LossSums, RolloutBatch, StepBatch


@final
class GRPO(RolloutStage):
    """Group relative policy optimization (Shao et al. 2024, arXiv:2402.03300) and its variants.

    roll out:  group_size responses to each prompt from the policy pi_old; a score r from the rewards
    advantage: A = (r - mean of the group) / standard deviation of the group, the same for all tokens of a response
    update:    num_epochs passes in minibatches, each one optimizer step on
               max(-A rho, -A clip(rho)) + kl_coef * KL(pi, reference),  rho = pi / pi_old

    Args:
        backbone: The policy.
        tuning: Which parameters train; LoRA on every linear layer unless given.
        optimizer: The optimizer and its constants.
        schedule: How the learning rate changes, in optimizer steps.
        rewards: What scores a response: RewardModel, RewardAdapter, RewardService, RewardFunction, or a class of your
            own; the sum of all, each times its weight.
        constants: Numbers of the algorithm, by their names in the papers, and its variants.
        reference: The frozen model that the policy is held against; unused where kl_coef is 0.
        generation: How responses are drawn, and how `validate` and `predict` answer. Unless given, from the very
            distribution that is trained.
        engine: What draws them.
        max_grad_norm: Largest global norm of the gradient, > 0; larger ones are scaled down to it. Empty: no limit.
        non_finite: A loss or gradient that is not finite: `stop` the run, or `skip` the step and count it.
    """

    task = "grpo"
    metrics = ("policy/entropy", "policy/approxkl", "policy/policykl", "policy/clipfrac", "policy/ratio")

    def __init__(
        self,
        backbone: BackboneSpec,
        tuning: Tuning = LoRA(),
        optimizer: OptimizerSpec = AdamW(),
        schedule: ScheduleSpec = ScheduleSpec(),
        *,
        rewards: Sequence[Reward] = (),
        constants: GRPOConstants = GRPOConstants(),
        reference: ReferenceSpec = ReferenceSpec(),
        generation: SamplingSpec = SamplingSpec(temperature=1.0, top_p=1.0, top_k=0),
        engine: GenerationEngine = TransformersEngine(),
        max_grad_norm: float | None = 1.0,
        non_finite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__(
            backbone,
            rewards=rewards,
            reference=reference if constants.kl_coef else None,
            generation=generation,
            engine=engine,
            num_epochs=constants.num_epochs,
            group_size=constants.group_size,
            tuning=tuning,
            optimizer=optimizer,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            non_finite=non_finite,
        )
        self.constants, self.reference = constants, reference
        self.entropy_coef = constants.entropy_coef

    @property
    def coefficients(self) -> dict[str, float]:
        """The policy's loss; KL and entropy where they have a weight."""
        weights = {"kl": self.constants.kl_coef, "entropy": -self.entropy_coef}
        return {"policy": 1.0, **{name: weight for name, weight in weights.items() if weight}}

    def experience(self, rollout: Rollout, found: TokenValues) -> Experience:
        """Compare the responses of each group."""
        constants = self.constants
        scores = rollout.scores @ self.weights - constants.missing_eos_penalty * ~rollout.is_stopped
        if constants.score_clip is not None:
            scores = scores.clamp(-constants.score_clip, constants.score_clip)
        advantages = group_advantages(scores, constants.group_size, scale=constants.scales)
        groups = scores.view(-1, constants.group_size)
        rollout.logged |= {
            "objective/scores": float(scores.mean()),
            "group/std": float(groups.std(1).mean()),
            "group/all_equal": float((groups == groups[:, :1]).all(1).double().mean()),
        }
        return Experience(
            log_probs=found.log_probs,
            advantages=advantages.repeat_interleave(rollout.lengths),
            reference=found.reference,
        )

    def _counts(self, micro_batch: RolloutBatch) -> Tensor:
        """Whether each of U responses counts in the loss; (U,) bool."""
        assert self.kept is not None
        rows = micro_batch.rows
        stopped = self.kept.is_stopped.to(rows.device)[rows]
        return stopped if self.constants.mask_truncated else torch.ones_like(stopped)

    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Responses divide the loss, with dapo their tokens; the tokens that count divide entropy and metrics."""
        num_responses = num_tokens = 0
        for micro_batch in step.micro_batches:
            counts = self._counts(micro_batch)
            num_responses += int(counts.sum())
            if micro_batch.num_units:
                num_tokens += int(counts[micro_batch.tokens.sequences[micro_batch.places >= 0]].sum())
        divisor = num_tokens if self.constants.loss == "dapo" else num_responses
        return {**dict.fromkeys(self.coefficients, divisor), **dict.fromkeys(self.metrics, num_tokens)}

    def token_losses(
        self, now: TokenValues, then: Experience, sequences: Tensor, micro_batch: RolloutBatch
    ) -> LossSums:
        """The clipped loss of each token, weighted as the variant says."""
        constants, num_responses = self.constants, micro_batch.num_units
        counts = self._counts(micro_batch).to(now.log_probs.dtype)
        lengths = torch.bincount(sequences, minlength=num_responses)
        weights = counts * token_weights(
            lengths, loss=constants.loss, max_new_tokens=self.generation.max_new_tokens
        ).to(counts)
        counted, weight = counts[sequences], weights[sequences]
        log_ratios = now.log_probs - then.log_probs
        compared = importance_log_ratios(log_ratios, sequences, num_responses, importance=constants.importance)
        policy = clipped_policy_loss(
            compared,
            then.advantages,
            clip_range_low=constants.clip_range_low,
            clip_range_high=constants.clip_range_high,
        )
        terms = {"policy": (weight * policy.loss).sum()}
        if constants.kl_coef:
            assert then.reference is not None
            kl = kl_estimate(now.log_probs, then.reference, estimator=constants.kl_estimator)
            terms["kl"] = (weight * kl).sum()
        entropy = now.entropy if now.entropy is not None else torch.zeros_like(now.log_probs)
        if self.entropy_coef:
            terms["entropy"] = (weight * entropy).sum()
        metrics = {
            "policy/entropy": entropy,
            "policy/approxkl": approximate_kl(log_ratios),
            "policy/policykl": -log_ratios,
            "policy/clipfrac": policy.is_clipped,
            "policy/ratio": policy.ratio,
        }
        return LossSums(terms, {name: (counted * metric).sum().detach() for name, metric in metrics.items()})

    def keeps_step(self, means: dict[str, float]) -> bool:
        """Not where it is too far from the policy that drew the responses."""
        constants = self.constants
        return not self.is_too_far(means, target_kl=constants.target_kl, ratio_threshold=constants.ratio_threshold)
