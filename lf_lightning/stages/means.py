"""Means over a whole validation set: sums and counts are kept apart and reduced over ranks once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torchmetrics import SumMetric

from lf_lightning.types import LossSums


class SetMeans(nn.Module):
    """A sum and a count for each loss term and metric, kept by torchmetrics.

    Not its MeanMetric: that one leaves NaN out, so that a diverged model would look well, or, told not to, forgets the
    weights (torchmetrics 1.9).

    Args:
        names: Loss terms and metrics.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.kept: list[tuple[Any, dict[str, int]]] = []
        """What a stage keeps of each micro-batch, with its counts, until the set is complete."""
        self._names = tuple(names)
        self._totals = {
            (name, what): SumMetric(nan_strategy="disable") for name in self._names for what in ("sum", "count")
        }
        # registered so that they move with the stage; their states stay out of its weights
        self._modules.update({f"{name}_{what}": total for (name, what), total in self._totals.items()})

    def begin(self, dtype: torch.dtype) -> None:
        """Forget everything, and add up in this type from now on."""
        for total in self._totals.values():
            total.set_dtype(dtype)
            total.reset()

    def update(self, found: LossSums, counts: Mapping[str, int]) -> None:
        """Add a micro-batch."""
        for name, value in {**found.terms, **found.metrics}.items():
            self._totals[name, "sum"].update(value.detach())
            self._totals[name, "count"].update(torch.as_tensor(counts[name], device=value.device))

    def compute(self) -> dict[str, float]:
        """Sum over sum of counts, over all ranks; 0 where nothing counts."""
        means = {}
        for name in self._names:
            total, count = (float(self._totals[name, what].compute()) for what in ("sum", "count"))
            means[name] = total / max(count, 1)
        return means
