"""What Lightning iterates: one item is one optimizer step. Not DataLoaders, so that Lightning cannot re-sample them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lf_lightning.data.order import steps_per_epoch
from lf_lightning.types import PromptBatch, StepBatch, Unit


class StepLoader:
    """The optimizer steps of an epoch, as this rank's share of each.

    Its state is the number of consumed units, so that a resume is exact on the same number of devices and continues
    with the same unit on any other.

    Args:
        units_of_epoch: Gives the units of an epoch in their order; every epoch has the same number.
        num_units: That number.
        global_batch_size: Units of an optimizer step over all devices.
        arrange: Makes this rank's StepBatch from the units of a step and the number of its epoch.
    """

    def __init__(
        self,
        *,
        units_of_epoch: Callable[[int], Sequence[Unit]],
        num_units: int,
        global_batch_size: int,
        arrange: Callable[[Sequence[Unit], int], StepBatch],
    ) -> None:
        self._units_of_epoch = units_of_epoch
        self.num_units = num_units
        self._global_batch_size = global_batch_size
        self._arrange = arrange
        self._epoch = 0
        self._consumed_units = 0

    @property
    def sampler(self) -> StepLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch; to its first unit unless the epoch is the one already begun."""
        if epoch != self._epoch:
            self._epoch, self._consumed_units = epoch, 0

    def __len__(self) -> int:
        """Optimizer steps of a whole epoch. With a length Lightning does not prefetch, so the cursor is exact."""
        return steps_per_epoch(self.num_units, self._global_batch_size)

    def __iter__(self) -> Iterator[StepBatch]:
        """The steps from the cursor to the end of the epoch. The cursor moves when a step is handed out."""
        # a generator: the epoch is read at the first step, after Lightning has called set_epoch
        units = self._units_of_epoch(self._epoch)
        while self._consumed_units < self.num_units:
            start = self._consumed_units
            self._consumed_units = min(start + self._global_batch_size, self.num_units)
            yield self._arrange(units[start : self._consumed_units], self._epoch)
        self._consumed_units = 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor: epoch and consumed units of it."""
        return {"epoch": self._epoch, "consumed_units": self._consumed_units}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._epoch, self._consumed_units = int(state["epoch"]), int(state["consumed_units"])


class EvalLoader:
    """The micro-batches of a set on this rank, each as a StepBatch of one; the same number on every rank.

    Args:
        make_batches: Lays out the set; called once, when the batches are first needed.
    """

    def __init__(self, make_batches: Callable[[], Sequence[Callable[[], StepBatch | PromptBatch]]]) -> None:
        self._make_batches = make_batches
        self._batches: Sequence[Callable[[], StepBatch | PromptBatch]] | None = None

    def _laid_out(self) -> Sequence[Callable[[], StepBatch | PromptBatch]]:
        if self._batches is None:
            self._batches = self._make_batches()
        return self._batches

    def __len__(self) -> int:
        """Batches on this rank."""
        return len(self._laid_out())

    def __iter__(self) -> Iterator[StepBatch | PromptBatch]:
        """Collate the batches one after the other."""
        return (make() for make in self._laid_out())
