"""Proximal policy optimization: the policy learns from scores of its own responses, with a critic beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor

from lf_lightning.losses.masked import flattened, mask_of, masked_var, padded, whiten
from lf_lightning.losses.ppo import (
    PPOConstants,
    ScoreMoments,
    adaptive_kl_coef,
    approximate_kl,
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    kl_estimate,
    normalized_scores,
    shaped_rewards,
)
from lf_lightning.models import (
    Backbone,
    GenerationEngine,
    LoRA,
    ReferenceSpec,
    SamplingSpec,
    TransformersEngine,
    Tuning,
    ValueHeadSpec,
    add_value_head,
)
from lf_lightning.models.rewards import Reward
from lf_lightning.optim import AdamW, OptimizerSpec, ScheduleSpec
from lf_lightning.stages.experience import Experience, Rollout, TokenValues
from lf_lightning.stages.rollout import RolloutStage
from lf_lightning.types import BackboneSpec, InputError, LossSums, RolloutBatch, StepBatch


@final
class PPO(RolloutStage):
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347), as Ziegler et al. 2019 use it on language.

    roll out:  a response to each prompt from the policy pi_old; a score from the rewards
    reward:    r_t = -kl_coef * KL_t(pi_old, reference), and the score at the last token
    advantage: A_t = sum over k of (gamma gae_lambda)^k delta_(t+k),  delta_t = r_t + gamma V_(t+1) - V_t
    update:    num_epochs passes over the responses in minibatches, each one optimizer step on
               max(-A rho, -A clip(rho)) + value_coef / 2 max((V - R)^2, (clip(V) - R)^2),
               rho = pi / pi_old,  R = A + V_old

    Args:
        backbone: The policy, with the critic's head on the same hidden states.
        tuning: Which parameters train beside the head; LoRA on every linear layer unless given.
        optimizer: The optimizer and its constants; one for policy and critic.
        schedule: How the learning rate changes, in optimizer steps.
        rewards: What scores a response: RewardModel, RewardAdapter, RewardService, RewardFunction, or a class of your
            own; the sum of all, each times its weight.
        constants: Numbers of the algorithm, by their names in the papers.
        reference: The frozen model that the policy is held against; unused where kl_coef is 0.
        value_head: The critic's head.
        generation: How responses are drawn, and how `validate` and `predict` answer.
        engine: What draws them.
        max_grad_norm: Largest global norm of the gradient, > 0; larger ones are scaled down to it. Empty: no limit.
        non_finite: A loss or gradient that is not finite: `stop` the run, or `skip` the step and count it.
    """

    task = "ppo"
    metrics = (
        "policy/entropy",
        "policy/approxkl",
        "policy/policykl",
        "policy/clipfrac",
        "policy/ratio",
        "value/mean",
        "value/error",
        "value/clipfrac",
    )

    def __init__(
        self,
        backbone: BackboneSpec,
        tuning: Tuning = LoRA(),
        optimizer: OptimizerSpec = AdamW(),
        schedule: ScheduleSpec = ScheduleSpec(),
        *,
        rewards: Sequence[Reward] = (),
        constants: PPOConstants = PPOConstants(),
        reference: ReferenceSpec = ReferenceSpec(),
        value_head: ValueHeadSpec = ValueHeadSpec(),
        generation: SamplingSpec = SamplingSpec(),
        engine: GenerationEngine = TransformersEngine(),
        max_grad_norm: float | None = 1.0,
        non_finite: Literal["stop", "skip"] = "stop",
    ) -> None:
        if value_head.dropout or value_head.save_as != "value_head":
            wrong, want = ("dropout", "0") if value_head.dropout else ("save_as", "value_head")
            raise InputError(
                f"model.init_args.value_head.{wrong}: must be {want} for PPO, whose critic lies beside a language "
                f"model, got {vars(value_head)[wrong]}. Remove it."
            )
        super().__init__(
            backbone,
            rewards=rewards,
            reference=reference if constants.kl_coef else None,
            generation=generation,
            engine=engine,
            num_epochs=constants.num_epochs,
            tuning=tuning,
            optimizer=optimizer,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            non_finite=non_finite,
        )
        self.constants, self.reference, self.value_head = constants, reference, value_head
        self.entropy_coef = constants.entropy_coef

    # ------------------------------------------------------------------ the algorithm

    @property
    def coefficients(self) -> dict[str, float]:
        """Policy and critic, and the entropy where it has a weight."""
        entropy = {"entropy": -self.entropy_coef} if self.entropy_coef else {}
        return {"policy": 1.0, "value": self.constants.value_coef, **entropy}

    def experience(self, rollout: Rollout, found: TokenValues) -> Experience:
        """Shape the rewards with the KL, and estimate advantages and returns over the whole rollout."""
        constants, lengths, mask = self.constants, rollout.lengths, mask_of(rollout.lengths)
        assert found.values is not None
        scores, values = self._final_scores(rollout), padded(found.values, lengths)
        kl_coef = self._kl_coef
        kl = torch.zeros_like(values)
        if found.reference is not None:
            kl = padded(kl_estimate(found.log_probs, found.reference, estimator=constants.kl_estimator), lengths)
            self._control_kl(kl_coef, found.log_probs - found.reference, num_responses=len(lengths))
        rewards = shaped_rewards(kl, scores, lengths, kl_coef=kl_coef)
        if constants.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = generalized_advantages(
            rewards, values, mask, gamma=constants.gamma, gae_lambda=constants.gae_lambda
        )
        if constants.whiten_advantages:
            advantages = whiten(advantages, mask, shift_mean=True)
        of_returns = masked_var(returns, mask)
        rollout.logged |= {
            "objective/kl_coef": kl_coef,
            "objective/scores": float(scores.mean()),
            "objective/non_score_reward": float(-kl_coef * kl.sum(1).mean()),
            "returns/mean": float(flattened(returns, lengths).mean()),
            "returns/var": float(of_returns),
            "value/explained_variance": 1.0 - float(masked_var(returns - values, mask) / of_returns.clamp(min=1e-8)),
        }
        return Experience(
            log_probs=found.log_probs,
            advantages=flattened(advantages, lengths),
            values=found.values,
            returns=flattened(returns, lengths),
        )

    def _final_scores(self, rollout: Rollout) -> Tensor:
        """The scores that enter the rewards: weighted, less the penalty, normalised by the run's moments, clipped."""
        constants = self.constants
        scores = rollout.scores @ self.weights - constants.missing_eos_penalty * ~rollout.is_stopped
        names = ("score_count", "score_mean", "score_m2")
        moments = ScoreMoments(*(self.memory.get(name, 0.0) for name in names)).updated(scores)
        self.memory |= dict(zip(names, moments, strict=True))
        return normalized_scores(scores, moments, norm=constants.score_norm, clip=constants.score_clip)

    @property
    def _kl_coef(self) -> float:
        """The coefficient of this rollout; a configuration with another first one than the checkpoint's begins anew."""
        constants = self.constants
        is_steered = constants.kl_controller == "adaptive" and self.memory.get("first_kl_coef") == constants.kl_coef
        return self.memory["kl_coef"] if is_steered else constants.kl_coef

    def _control_kl(self, kl_coef: float, log_ratios: Tensor, *, num_responses: int) -> None:
        """Set the coefficient of the next rollout, where it is steered."""
        constants = self.constants
        if constants.kl_controller == "adaptive":
            kl = float(log_ratios.sum()) / num_responses
            self.memory["first_kl_coef"] = constants.kl_coef
            self.memory["kl_coef"] = adaptive_kl_coef(
                kl_coef, kl, target=constants.kl_target, horizon=constants.kl_horizon, num_responses=num_responses
            )

    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Tokens of the responses; they divide everything."""
        num_tokens = sum(int((micro_batch.places >= 0).sum()) for micro_batch in step.micro_batches)
        return dict.fromkeys((*self.coefficients, *self.metrics), num_tokens)

    def token_losses(
        self, now: TokenValues, then: Experience, sequences: Tensor, micro_batch: RolloutBatch
    ) -> LossSums:
        """Clipped losses of policy and critic."""
        constants, clip = self.constants, self.constants.clip_range
        assert now.values is not None
        assert then.values is not None
        assert then.returns is not None
        log_ratios = now.log_probs - then.log_probs
        policy = clipped_policy_loss(log_ratios, then.advantages, clip_range_low=clip, clip_range_high=clip)
        # the critic computes in float32 at least, whatever the policy's type is
        returns, values = then.returns.to(now.values.dtype), then.values.to(now.values.dtype)
        value = clipped_value_loss(now.values, values, returns, clip_range=constants.value_clip_range)
        entropy = now.entropy if now.entropy is not None else torch.zeros_like(now.log_probs)
        terms = {"policy": policy.loss.sum(), "value": value.loss.sum()}
        if self.entropy_coef:
            terms["entropy"] = entropy.sum()
        metrics = {
            "policy/entropy": entropy.sum(),
            "policy/approxkl": approximate_kl(log_ratios).sum(),
            "policy/policykl": -log_ratios.sum(),
            "policy/clipfrac": policy.is_clipped.sum(),
            "policy/ratio": policy.ratio.sum(),
            "value/mean": now.values.sum(),
            "value/error": (now.values - returns).square().sum(),
            "value/clipfrac": value.is_clipped.sum(),
        }
        return LossSums(terms, {name: metric.detach() for name, metric in metrics.items()})

    def keeps_step(self, means: dict[str, float]) -> bool:
        """Not where it is too far from the policy that drew the responses."""
        constants = self.constants
        return not self.is_too_far(means, target_kl=constants.target_kl, ratio_threshold=constants.ratio_threshold)

    # ------------------------------------------------------------------ the model

    def add_head(self, backbone: Backbone) -> None:
        """Put the critic's head on the policy, whose output layer stays."""
        spec = self.backbone_spec
        add_value_head(
            backbone,
            self.value_head,
            tuning=self.tuning,
            path=spec.path,
            seed=self.seed,
            revision=spec.revision,
            keeps_output_layer=True,
        )
