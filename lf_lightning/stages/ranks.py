"""The data-parallel ranks as the step contract sees them: how many, sums over them, when they exchange gradients."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from torch import Tensor

from lf_lightning.stages.deepspeed import ZeroStrategy


class Ranks:
    """A trainer's ranks.

    Args:
        trainer: The trainer, once it is connected to its strategy.
        device: Where this rank computes.
    """

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self._strategy = trainer.strategy
        self._device = device

    @property
    def size(self) -> int:
        """Data-parallel size, by which the strategy averages gradients; the world's where ranks share no model."""
        if not isinstance(self._strategy, ParallelStrategy):
            return 1
        return int(self._strategy.distributed_sampler_kwargs["num_replicas"])

    @property
    def rank(self) -> int:
        """Which of them this one is; ranks that compute a layer together have the same."""
        if not isinstance(self._strategy, ParallelStrategy):
            return 0
        return int(self._strategy.distributed_sampler_kwargs["rank"])

    @property
    def exact(self) -> torch.dtype:
        """The type in which sums and counts are added: float32 would lose counts above 2^24."""
        return torch.float32 if self._device.type == "mps" else torch.float64  # which has no float64

    def sums(self, values: Sequence[Tensor | float]) -> list[float]:
        """Add scalars up over all ranks, by one small all-reduce."""
        vector = torch.stack([torch.as_tensor(value, device=self._device).to(self.exact) for value in values])
        reduced = self._strategy.reduce(vector, reduce_op="sum")
        assert isinstance(reduced, Tensor)
        totals: list[float] = reduced.tolist()
        return totals

    def sum_of(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, element by element; on the CPU, in the type of exact sums."""
        reduced = self._strategy.reduce(tensor.to(self._device, self.exact), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced.cpu()

    def all_agree(self, verdict: bool) -> bool:
        """Whether every rank says yes."""
        return self.sums([float(not verdict)]) == [0.0]

    def gradient_sync(self, *, now: bool) -> AbstractContextManager[Any]:
        """Exchange gradients with this backward, or hold them back until a later one."""
        if isinstance(self._strategy, ZeroStrategy):
            return self._strategy.micro_batch(is_last=now)
        if isinstance(self._strategy, DDPStrategy) and not now:
            return self._strategy.block_backward_sync()
        return nullcontext()


def seed_random_layers(device: torch.device, seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Make what dropout draws a function of these four numbers, so that a resumed run draws the same.

    Not by torch.manual_seed: it seeds every kind of device, and costs half a millisecond where they are absent.
    """
    state = np.random.SeedSequence([seed, step, rank, micro_batch]).generate_state(1, np.uint64)
    value = int(state[0] >> np.uint64(1))
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(value)
