"""Proximal policy optimization for language models: rewards, advantages, clipped losses and the KL controller."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lf_lightning.losses.masked import mask_of
from lf_lightning.types import InputError

KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class PPOConstants:
    """Numbers of PPO by their names in the papers; defaults are LlamaFactory's.

    Args:
        num_epochs: Passes over a rollout, >= 1.
        gamma: Discount of later rewards, in [0, 1].
        gae_lambda: Weight of longer estimates of the advantage, in [0, 1].
        clip_range: How far the ratio may leave 1 before its gradient ends, > 0.
        value_clip_range: How far a value may leave its old one before its gradient ends, > 0; empty means anywhere.
        value_coef: Weight of the critic's loss, >= 0.
        entropy_coef: Weight of the entropy bonus, >= 0.
        kl_coef: Price of a nat of KL from the reference, >= 0; 0 means no reference at all. With `adaptive` the first.
        kl_controller: `adaptive` steers kl_coef so that the KL comes near kl_target; `fixed` leaves it.
        kl_target: KL of a response that `adaptive` steers to, in nats, > 0.
        kl_horizon: Responses over which `adaptive` corrects, > 0.
        kl_estimator: KL of a token from log-probs: `k1` d, `k2` d^2 / 2, `k3` e^-d - 1 + d, d = log policy - log
            reference.
        whiten_rewards: Scale the rewards of a rollout to variance 1.
        whiten_advantages: Scale the advantages of a rollout to mean 0 and variance 1.
        score_norm: What is done to scores by the mean and deviation of all so far: `none`, `scale` divides by the
            deviation, `whiten` subtracts the mean first.
        score_clip: Largest score in size, after score_norm, > 0; empty means none.
        missing_eos_penalty: Taken off the score of a response that no stop token ended, >= 0.
        target_kl: No more steps on a rollout where the approximate KL of a step is above 1.5 times this, > 0; empty
            means never.
        ratio_threshold: A step whose mean ratio is above this is not made, > 1; empty means all are.
    """

    num_epochs: int = 4
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    kl_coef: float = 0.2
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"
    kl_target: float = 6.0
    kl_horizon: float = 10000.0
    kl_estimator: KLEstimator = "k1"
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    score_norm: Literal["none", "scale", "whiten"] = "none"
    score_clip: float | None = None
    missing_eos_penalty: float = 0.0
    target_kl: float | None = None
    ratio_threshold: float | None = 10.0

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        positive = ("clip_range", "value_clip_range", "kl_target", "kl_horizon", "score_clip", "target_kl")
        weights = ("value_coef", "entropy_coef", "kl_coef", "missing_eos_penalty")
        check_constants(
            vars(self),
            [
                ("num_epochs", self.num_epochs >= 1, "at least 1"),
                *((name, 0 <= vars(self)[name] <= 1, "in [0, 1]") for name in ("gamma", "gae_lambda")),
                *((name, is_positive(vars(self)[name]), "positive") for name in positive),
                *((name, 0 <= vars(self)[name] < math.inf, "0 or more") for name in weights),
                ("ratio_threshold", self.ratio_threshold is None or self.ratio_threshold > 1, "above 1, or null"),
            ],
        )


def is_positive(value: float | None) -> bool:
    """Whether a number is positive and finite; one that is not given is allowed."""
    return value is None or 0 < value < math.inf


def check_constants(values: dict[str, Any], rules: Iterable[tuple[str, bool, str]]) -> None:
    """Refuse the first constant that breaks its rule.

    Args:
        values: Constants by name.
        rules: Name, whether it holds, and what is wanted, in words.

    Raises:
        InputError: As said.
    """
    for name, holds, want in rules:
        if not holds:
            where = f"model.init_args.constants.{name}"
            raise InputError(f"{where}: must be {want}, got {values[name]}. Correct it.")


# ---------------------------------------------------------------------- rewards


def kl_estimate(log_probs: Tensor, reference: Tensor, *, estimator: KLEstimator) -> Tensor:
    """Estimate of the KL of each token from what the policy drew: KL(policy || reference) in nats.

    d = log policy - log reference:  k1 = d,  k2 = d^2 / 2,  k3 = e^-d - 1 + d

    Args:
        log_probs: Of the drawn tokens under the policy; any shape.
        reference: Of the same tokens under the reference.
        estimator: k1 and k3 are unbiased, k2 and k3 never below 0.

    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    difference = log_probs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.exp(-difference) - 1 + difference


def shaped_rewards(kl: Tensor, scores: Tensor, lengths: Tensor, *, kl_coef: float) -> Tensor:
    """Rewards of the tokens: r_t = -kl_coef * KL_t, and the score of the response beside it at the last token.

    Args:
        kl: Of each token; (R, L), zeros behind the end.
        scores: Of each response; (R,).
        lengths: Tokens of each response, >= 1; (R,) int64.
        kl_coef: Price of a nat.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.
    """
    last = (lengths - 1).unsqueeze(1)
    return torch.where(mask_of(lengths), -kl_coef * kl, 0).scatter_add(1, last, scores.unsqueeze(1).to(kl.dtype))


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token; nothing follows the last one.

    delta_t = r_t + gamma V_(t+1) - V_t,  A_t = delta_t + gamma gae_lambda A_(t+1),  R_t = A_t + V_t

    Args:
        rewards: (R, L).
        values: Of the state before each token; (R, L).
        mask: Where there is a token; (R, L) bool, a run of true from the start of each row.
        gamma: Discount, in [0, 1].
        gae_lambda: In [0, 1]; 0 trusts the values, 1 the rewards.

    Returns:
        Advantages and returns, (R, L) each, zeros behind the end.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 11-16.
    """
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    after = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], 1)
    deltas = rewards + gamma * after - values
    advantages = torch.zeros_like(values)
    ahead = values.new_zeros(len(values))
    for place in reversed(range(values.shape[1])):
        ahead = deltas[:, place] + gamma * gae_lambda * ahead
        advantages[:, place] = ahead
    advantages = torch.where(mask, advantages, 0)
    return advantages, advantages + values


# ---------------------------------------------------------------------- losses


class PolicyLoss(NamedTuple):
    """Of each token."""

    loss: Tensor
    ratio: Tensor  # pi / pi_old; no gradient
    is_clipped: Tensor  # bool: the ratio is out of range on the side where the gradient has ended


def clipped_policy_loss(
    log_ratios: Tensor, advantages: Tensor, *, clip_range_low: float, clip_range_high: float
) -> PolicyLoss:
    """The clipped surrogate: max(-A rho, -A clip(rho, 1 - low, 1 + high)), rho = e^log_ratio.

    Args:
        log_ratios: log pi - log pi_old; any shape.
        advantages: Same shape.
        clip_range_low: How far the ratio may fall below 1, > 0.
        clip_range_high: How far it may rise above 1, > 0.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; two ranges as in Yu et al. 2025, arXiv:2503.14476 (DAPO).
    """
    ratio = torch.exp(log_ratios)
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range_low, 1 + clip_range_high)
    return PolicyLoss(torch.maximum(free, held), ratio.detach(), (held > free).detach())


class ValueLoss(NamedTuple):
    """Of each token."""

    loss: Tensor
    is_clipped: Tensor  # bool: the value is out of range, and the clipped one is further from the return


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float | None) -> ValueLoss:
    """The critic's clipped loss: max((V - R)^2, (clip(V, V_old - range, V_old + range) - R)^2) / 2.

    Args:
        values: Of the critic now; any shape.
        old_values: Of the critic at the rollout.
        returns: What it is to say.
        clip_range: > 0; None compares V with R alone.

    Source: the value clipping of OpenAI's baselines (Engstrom et al. 2020, arXiv:2005.12729, section 3).
    """
    free = (values - returns).square()
    if clip_range is None:
        return ValueLoss(free / 2, torch.zeros_like(free, dtype=torch.bool))
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    held = (near - returns).square()
    return ValueLoss(torch.maximum(free, held) / 2, (held > free).detach())


def approximate_kl(log_ratios: Tensor) -> Tensor:
    """How far the updates have moved the policy: (log pi - log pi_old)^2 / 2 of each token, in nats."""
    return log_ratios.square() / 2


# ---------------------------------------------------------------------- what is carried from rollout to rollout


def adaptive_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_responses: int) -> float:
    """The price of a nat for the next rollout: kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) num_responses / horizon).

    Args:
        kl_coef: Price until now.
        kl: Mean KL of a response, in nats.
        target: KL to come near to, > 0.
        horizon: Responses over which to correct, > 0.
        num_responses: Of the rollout.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)


class ScoreMoments(NamedTuple):
    """Number, mean and sum of squared deviations of all scores so far."""

    num_scores: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def updated(self, scores: Tensor) -> ScoreMoments:
        """The moments with more scores (B,), however these are cut into parts.

        Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
        variances", eq. 2.1.
        """
        count, exact = len(scores), scores.double()
        if not count:
            return self
        mean, m2 = float(exact.mean()), float((exact - exact.mean()).square().sum())
        whole, difference = self.num_scores + count, mean - self.mean
        return ScoreMoments(
            whole,
            self.mean + difference * count / whole,
            self.m2 + m2 + difference**2 * self.num_scores * count / whole,
        )

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 where there are fewer than two scores, or all are equal."""
        return math.sqrt(self.m2 / (self.num_scores - 1)) if self.num_scores > 1 and self.m2 > 0 else 1.0


def normalized_scores(
    scores: Tensor, moments: ScoreMoments, *, norm: Literal["none", "scale", "whiten"], clip: float | None
) -> Tensor:
    """Scores (R,) by the moments of the run, then clipped to [-clip, clip].

    Args:
        scores: Of a rollout.
        moments: Of all scores, these included.
        norm: `scale` divides by the standard deviation, `whiten` subtracts the mean first.
        clip: > 0; None leaves them.
    """
    if norm != "none":
        scores = (scores - (moments.mean if norm == "whiten" else 0.0)) / (moments.std + 1e-8)
    return scores if clip is None else scores.clamp(-clip, clip)
