"""Losses of single responses that were liked or disliked, where nothing says what they were better or worse than."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHT_RATIO_RANGE = (1.0, 4 / 3)
"""Where the paper wants `weight_ratio` to lie."""


def kto_loss(
    log_ratios: Tensor,
    is_desirable: Tensor,
    *,
    kl: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky loss of each response.

    desirable_weight (1 - sig(beta (r - kl))) if desirable else undesirable_weight (1 - sig(beta (kl - r)))

    Args:
        log_ratios: r: log policy - log reference of each response, summed over its tokens, in nats; (U,).
        is_desirable: True where the response was liked; (U,) bool.
        kl: Estimate of KL(policy || reference) over the whole step, in nats, >= 0, no gradient; scalar.
        beta: Strength of the pull towards the reference, > 0. Typical 0.05-0.5.
        desirable_weight: Weight of liked responses, > 0.
        undesirable_weight: Weight of disliked responses, > 0.

    Returns:
        Loss of each response; (U,).

    Source: KTO, Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7, without the constant lambda_y.
    """
    assert not kl.requires_grad, "the KL of a step has no gradient"
    loss = torch.sigmoid(beta * _towards_worse(log_ratios - kl, is_desirable))
    return torch.where(is_desirable, desirable_weight * loss, undesirable_weight * loss)


def apo_zero_unpaired_loss(
    log_ratios: Tensor,
    is_desirable: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Anchored loss of each response: 1 - sig(beta r) if desirable else sig(beta r), times the weight of its side.

    Args:
        log_ratios: As in `kto_loss`; (U,).
        is_desirable: True where the response was liked; (U,) bool.
        beta: As in `kto_loss`.
        desirable_weight: Weight of liked responses, > 0.
        undesirable_weight: Weight of disliked responses, > 0.

    Returns:
        Loss of each response; (U,).

    Source: APO-zero, D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, its two terms apart.
    """
    loss = torch.sigmoid(beta * _towards_worse(log_ratios, is_desirable))
    return torch.where(is_desirable, desirable_weight * loss, undesirable_weight * loss)


def _towards_worse(log_ratios: Tensor, is_desirable: Tensor) -> Tensor:
    """The log-ratios, with the sign that grows as the policy gets worse; (U,). Note 1 - sig(x) = sig(-x)."""
    assert log_ratios.shape == is_desirable.shape, f"{log_ratios.shape} log-ratios, {is_desirable.shape} labels"
    return torch.where(is_desirable, -log_ratios, log_ratios)


def kl_estimate(total: Tensor, num: int | Tensor) -> Tensor:
    """How far the policy has moved from the reference: max(0, total / num), no gradient; scalar, in nats.

    Args:
        total: Sum over the step of log policy - log reference of responses to other prompts than their own; scalar.
        num: How many were summed; 0 gives 0.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306.
    """
    return (total.detach() / torch.as_tensor(num, device=total.device).clamp(min=1)).clamp(min=0)


def weight_ratio(
    desirable_weight: float, undesirable_weight: float, num_desirable: int, num_undesirable: int
) -> float | None:
    """(desirable_weight num_desirable) / (undesirable_weight num_undesirable); None where a side has no rows.

    Infinite where the disliked rows have no weight.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    if not num_desirable or not num_undesirable:
        return None
    if undesirable_weight == 0:
        return math.inf
    return (desirable_weight * num_desirable) / (undesirable_weight * num_undesirable)


def weights_in_range(
    desirable_weight: float, undesirable_weight: float, num_desirable: int, num_undesirable: int
) -> bool:
    """Whether `weight_ratio` lies where the paper wants it, in [1, 4/3]; also False where a side has no rows."""
    ratio = weight_ratio(desirable_weight, undesirable_weight, num_desirable, num_undesirable)
    low, high = WEIGHT_RATIO_RANGE
    return ratio is not None and low - 1e-9 <= ratio <= high + 1e-9  # 3 rows of weight 4/3 against 3 are not outside


class KTOLoss(NamedTuple):
    """A loss of the table."""

    function: Callable[..., Tensor]  # called with the arguments of `kto_loss`; gives (U,)
    uses_kl: bool  # otherwise `kl` is ignored, and may be None


def _without_kl(log_ratios: Tensor, is_desirable: Tensor, *, kl: Tensor | None = None, **options: Any) -> Tensor:
    """`apo_zero_unpaired_loss`, called like `kto_loss`."""
    return apo_zero_unpaired_loss(log_ratios, is_desirable, **options)


KTO_LOSSES: dict[str, KTOLoss] = {
    "kto": KTOLoss(kto_loss, uses_kl=True),
    "apo_zero_unpaired": KTOLoss(_without_kl, uses_kl=False),
}
