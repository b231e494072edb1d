"""Numbers of the tokens of several responses: end to end or padded, and statistics over those that count."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_of(lengths: Tensor) -> Tensor:
    """Which places of padded rows hold a token; (R, L) bool from (R,) int64, L the largest length."""
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)


def padded(flat: Tensor, lengths: Tensor) -> Tensor:
    """Rows of values that lie end to end, with zeros behind the shorter ones.

    Args:
        flat: Values of all rows; (N,).
        lengths: Values of each row, N together; (R,) int64.

    Returns:
        (R, L), L the largest length.
    """
    mask = mask_of(lengths)
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def flattened(rows: Tensor, lengths: Tensor) -> Tensor:
    """The values of padded rows (R, L) end to end; (N,)."""
    return rows[mask_of(lengths)]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the values where the mask is true, a scalar; 0 where nothing is."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of the values where the mask is true, a scalar; 0 for fewer than two."""
    deviations = torch.where(mask, values - masked_mean(values, mask), 0)
    return deviations.square().sum() / (mask.sum() - 1).clamp(min=1)


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool) -> Tensor:
    """Scale values to variance 1: (x - mean) / sqrt(var + 1e-8), the variance unbiased.

    Args:
        values: Any shape.
        mask: The same shape, bool; what is false counts nowhere and becomes 0.
        shift_mean: Move the mean to 0; otherwise it is added back.
    """
    mean = masked_mean(values, mask)
    scaled = (values - mean) / (masked_var(values, mask) + 1e-8).sqrt()
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0)
