"""Optimizer steps from a stream: as many as the trainer makes, since nobody knows where the stream ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lf_lightning.console import say
from lf_lightning.data.build import Encoder
from lf_lightning.data.packing import block_units, sequence_units
from lf_lightning.data.partners import step_partners
from lf_lightning.data.store import TokenStore
from lf_lightning.data.stream_documents import StreamDocuments, store_of_documents
from lf_lightning.types import StepBatch, Unit


class StreamLoader:
    """The optimizer steps of a run, as this rank's share of each; the same units in them on any number of ranks.

    A step never mixes two passes over the stream: the last one of a pass may be short. The state is the place of the
    first token that no step has had.

    Args:
        documents: The stream.
        encoder: What has encoded them.
        num_steps: Optimizer steps of the run.
        global_batch_size: Units of a step over all devices.
        arrange: Makes this rank's StepBatch from the units of a step and the store that they lie in.
        wants_partners: Whether each unit gets the next one of its step as its partner; asked at each step.
    """

    num_units: int | None = None
    """Units of an epoch, which nobody knows."""

    def __init__(
        self,
        documents: StreamDocuments,
        encoder: Encoder,
        *,
        num_steps: int,
        global_batch_size: int,
        arrange: Callable[[Sequence[Unit], TokenStore], StepBatch],
        wants_partners: Callable[[], bool] = lambda: False,
    ) -> None:
        self._documents, self._encoder, self._num_steps = documents, encoder, num_steps
        self._global_batch_size, self._arrange, self._wants_partners = global_batch_size, arrange, wants_partners
        self._step, self._consumed_units = 0, 0

    def __len__(self) -> int:
        """Optimizer steps of the run. With a length Lightning does not prefetch, so the place is exact."""
        return self._num_steps

    def __iter__(self) -> Iterator[StepBatch]:
        """The steps from the place to the end of the run. The place moves when a step is handed out."""
        while self._step < self._num_steps:
            units, store = self._next_units()
            self._step, self._consumed_units = self._step + 1, self._consumed_units + len(units)
            if self._step == self._num_steps:
                self._say_counts()
            yield self._arrange(units, store)

    def _next_units(self) -> tuple[list[Unit], TokenStore]:
        size, options = self._global_batch_size, self._encoder.options
        if options.packing == "blocks":
            found = self._documents.take_tokens(size * options.max_length)
        else:
            found = self._documents.take(size)
        store = store_of_documents(found, self._documents.stream, self._encoder)
        if options.packing == "blocks":
            return block_units(store.lengths, options.max_length, range(len(store))), store
        units = sequence_units(store.lengths)
        if self._wants_partners():
            partners = step_partners(list(range(len(units))), len(units))
            units = [unit._replace(partner=partner) for unit, partner in zip(units, partners, strict=True)]
        return units, store

    def _say_counts(self) -> None:
        """What became of the rows of the last pass so far; Lightning does not ask for a step after the last one."""
        for line in self._documents.lines():
            say(f"streaming: {self._num_steps:,} steps end in pass {self._documents.epoch + 1}. {line}")

    def state_dict(self) -> dict[str, Any]:
        """The place, and the number of steps and units before it."""
        return {"step": self._step, "consumed_units": self._consumed_units, "stream": self._documents.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._step, self._consumed_units = int(state["step"]), int(state["consumed_units"])
        self._documents.load_state_dict(state["stream"])

    def begin_next_pass(self, state: dict[str, Any]) -> None:
        """Continue a run whose stream has become another one: with the first row of the pass after `state`'s."""
        self._step, self._consumed_units = int(state["step"]), int(state["consumed_units"])
        self._documents.begin(int(state["stream"]["epoch"]) + 1)
