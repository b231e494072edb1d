"""Losses of a reward model: the scores of the two responses of a pair."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reward_loss(chosen: Tensor, rejected: Tensor, *, margin: Tensor) -> Tensor:
    """Bradley-Terry loss of each pair: -log sig(chosen - rejected - margin).

    Args:
        chosen: Score of each chosen response, with gradient; (P,).
        rejected: Score of each rejected response, with gradient; (P,).
        margin: By how much the chosen score should be ahead, >= 0, 0 where the data does not say; (P,).

    Returns:
        Loss of each pair; (P,) of the type of the scores.

    Source: Touvron et al. 2023, arXiv:2307.09288, eq. 2; with margin 0 Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    assert chosen.shape == rejected.shape == margin.shape, f"{chosen.shape}, {rejected.shape}, {margin.shape}"
    return -F.logsigmoid(chosen - rejected - margin.to(chosen.dtype))


def centering_penalty(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Penalty of scores whose mean strays from 0, which the loss itself leaves open: (chosen + rejected)^2; (P,).

    Args:
        chosen: Score of each chosen response, with gradient; (P,).
        rejected: Score of each rejected response, with gradient; (P,).

    Source: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    assert chosen.shape == rejected.shape, f"{chosen.shape}, {rejected.shape}"
    return (chosen + rejected).square()
