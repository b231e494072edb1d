"""Means over a whole validation set: sums and counts are kept apart and reduced over ranks once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torchmetrics import MeanMetric

from lf_lightning.types import LossSums


class SetMeans(nn.Module):
    """One weighted mean for each loss term and metric, kept by torchmetrics.

    Args:
        names: Loss terms and metrics.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self._means = {name: MeanMetric(sync_on_compute=True) for name in names}
        self._modules.update(self._means)  # so that they move with the stage and stay out of its weights

    def begin(self, dtype: torch.dtype) -> None:
        """Forget everything, and add up in this type from now on."""
        for mean in self._means.values():
            mean.set_dtype(dtype)
            mean.reset()

    def update(self, found: LossSums, counts: Mapping[str, int]) -> None:
        """Add a micro-batch; what it counts nothing of is left out."""
        for name, value in {**found.terms, **found.metrics}.items():
            if counts[name]:
                mean = self._means[name]
                mean.update(value.to(mean.mean_value.dtype) / counts[name], counts[name])

    def compute(self) -> dict[str, float]:
        """Sum over sum of counts, over all ranks."""
        return {name: float(mean.compute()) for name, mean in self._means.items()}
