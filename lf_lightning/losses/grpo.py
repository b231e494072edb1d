"""Group relative policy optimization: advantages within a group, and the variants of its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lf_lightning.losses.ppo import KLEstimator, check_constants, is_positive

GRPOLoss = Literal["grpo", "dr_grpo", "dapo"]
Scale = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class GRPOConstants:
    """Numbers of GRPO by their names in the papers, and its variants.

    Args:
        group_size: Responses to each prompt, >= 2.
        num_epochs: Passes over a rollout, >= 1.
        loss: How tokens weigh. `grpo`: each response alike, whatever its length (arXiv:2402.03300, eq. 3). `dr_grpo`:
            each token alike, divided by max_new_tokens (arXiv:2503.20783). `dapo`: each token alike, divided by the
            tokens of the step (arXiv:2503.14476, eq. 8).
        scale_rewards: What the score less the mean of its group is divided by: the standard deviation of the `group`,
            that of all scores of the rollout (`batch`), or nothing (`none`). `auto`: none with dr_grpo, else group.
        importance: Ratio of each `token`, or of the whole `sequence`: its geometric mean (GSPO, arXiv:2507.18071).
        clip_range_low: How far the ratio may fall below 1 before its gradient ends, in (0, 1].
        clip_range_high: How far it may rise above 1, > 0. DAPO: 0.28.
        kl_coef: Weight of the KL from the reference in the loss, >= 0; 0 means no reference at all.
        kl_estimator: KL of a token: `k1` d, `k2` d^2 / 2, `k3` e^-d - 1 + d, d = log policy - log reference.
        entropy_coef: Weight of the entropy bonus, >= 0.
        mask_truncated: Leave responses that no stop token ended out of the loss (DAPO's overlong filtering).
        missing_eos_penalty: Taken off the score of a response that no stop token ended, >= 0.
        score_clip: Largest score in size, > 0; empty means none.
        target_kl: No more steps on a rollout where the approximate KL of a step is above 1.5 times this, > 0; empty
            means never.
        ratio_threshold: A step whose mean ratio is above this is not made, > 1; empty means all are.
    """

    group_size: int = 8
    num_epochs: int = 1
    loss: GRPOLoss = "grpo"
    scale_rewards: Literal["auto", "group", "batch", "none"] = "auto"
    importance: Literal["token", "sequence"] = "token"
    clip_range_low: float = 0.2
    clip_range_high: float = 0.2
    kl_coef: float = 0.04
    kl_estimator: KLEstimator = "k3"
    entropy_coef: float = 0.0
    mask_truncated: bool = False
    missing_eos_penalty: float = 0.0
    score_clip: float | None = None
    target_kl: float | None = None
    ratio_threshold: float | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        weights = ("kl_coef", "entropy_coef", "missing_eos_penalty")
        check_constants(
            vars(self),
            [
                ("group_size", self.group_size >= 2, "at least 2"),
                ("num_epochs", self.num_epochs >= 1, "at least 1"),
                ("clip_range_low", 0 < self.clip_range_low <= 1, "in (0, 1]"),
                *((name, is_positive(vars(self)[name]), "positive") for name in ("clip_range_high", "score_clip")),
                *((name, 0 <= vars(self)[name] < math.inf, "0 or more") for name in weights),
                ("target_kl", is_positive(self.target_kl), "positive, or null"),
                ("ratio_threshold", self.ratio_threshold is None or self.ratio_threshold > 1, "above 1, or null"),
            ],
        )

    @property
    def scales(self) -> Scale:
        """What advantages are divided by, `auto` resolved."""
        if self.scale_rewards == "auto":
            return "none" if self.loss == "dr_grpo" else "group"
        return self.scale_rewards


def group_advantages(scores: Tensor, group_size: int, *, scale: Scale) -> Tensor:
    """How much better each response is than its group.

    A = (score - mean of the group) / (standard deviation + 1e-4)

    Args:
        scores: Responses to the same prompt side by side; (R,), R a multiple of group_size.
        group_size: Responses of a group, >= 2.
        scale: Standard deviation, unbiased, of the group or of all scores; `none` divides by nothing.

    Returns:
        (R,), of which a group sums to 0; exactly 0 where all scores of a group are equal.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2; without division Liu et al. 2025, arXiv:2503.20783.
    """
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    centred = torch.where((groups == groups[:, :1]).all(1, keepdim=True), 0, centred)  # a mean may round
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        centred = centred / (scores.std() + 1e-4)
    return centred.reshape(-1)


def importance_log_ratios(
    log_ratios: Tensor, sequences: Tensor, num_sequences: int, *, importance: Literal["token", "sequence"]
) -> Tensor:
    """Log of the importance ratio of each token.

    Args:
        log_ratios: log pi - log pi_old of M tokens; (M,).
        sequences: Response of each token, in [0, S); (M,) int64.
        num_sequences: S.
        importance: `sequence` gives every token of a response the mean over its tokens.

    Source: Zheng et al. 2025, arXiv:2507.18071 (GSPO), eq. 7.
    """
    if importance == "token":
        return log_ratios
    sums = log_ratios.new_zeros(num_sequences).index_add(0, sequences, log_ratios)
    return (sums / torch.bincount(sequences, minlength=num_sequences).clamp(min=1))[sequences]


def token_weights(lengths: Tensor, *, loss: GRPOLoss, max_new_tokens: int) -> Tensor:
    """Weight of each token of a response in the sum, which responses (grpo, dr_grpo) or tokens (dapo) then divide.

    Args:
        lengths: Tokens of each response; (S,) int64.
        loss: grpo: 1 / length; dr_grpo: 1 / max_new_tokens; dapo: 1.
        max_new_tokens: Most tokens of a response.

    Returns:
        (S,) float64.
    """
    exact = lengths.double()
    if loss == "grpo":
        return 1 / exact.clamp(min=1)
    return torch.full_like(exact, 1 / max_new_tokens if loss == "dr_grpo" else 1.0)
