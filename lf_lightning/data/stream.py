"""The rows of a stream in their order, which is a function of (seed, pass, shards, buffer size), from any place on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lf_lightning.console import say
from lf_lightning.data.places import Place, Rows
from lf_lightning.data.shards import Shard, ShardRow

MixStrategy = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]
SHARDS, DRAWS, BUFFER = 0x54A2D, 0xD2A3, 0xB0FF
"""Keep the orders of shards, of draws among datasets and of a buffer apart."""
CHUNK = 1024
"""Draws among datasets that are made together."""


class StreamPlan(NamedTuple):
    """What the order of a stream follows from, beside its shards."""

    seed: int
    shuffle: bool  # False keeps the order of the files
    buffer_size: int  # rows that are read, mixed and handed out together, > 0
    mix_strategy: MixStrategy = "concat"
    probs: tuple[float, ...] = ()  # how often a row is drawn from each dataset; none: in turn


class Buffer(NamedTuple):
    """Rows that were read together, in the order in which they are handed out."""

    epoch: int  # number of the pass over the stream
    number: int  # of this buffer in its pass
    start: dict[str, Any] | None  # what reads it again; None for the first of a pass
    rows: list[ShardRow]
    is_last: bool  # whether the pass ends with it
    end: dict[str, Any] | None  # the start of the next one


class Stream:
    """Passes over shards, without end.

    In each pass the shards come in a new order. Of each run of `buffer_size` rows the order is drawn anew, so that a
    checkpoint needs the place of the first of them only, whatever the source.

    Args:
        shards: All shards of all datasets, by dataset.
        plan: What the order follows from.
    """

    def __init__(self, shards: Sequence[Shard], plan: StreamPlan) -> None:
        self.shards, self.plan = shards, plan

    def buffers(self, epoch: int = 0, number: int = 0, start: dict[str, Any] | None = None) -> Iterator[Buffer]:
        """One buffer after the other, from the start of one on.

        Args:
            epoch: Its pass.
            number: Its number in the pass.
            start: What an earlier call gave as its start.
        """
        size = self.plan.buffer_size
        while True:
            mixture = _Mixture(self.shards, self.plan, epoch, start)
            is_last = False
            while not is_last:
                rows = list(islice(mixture, size))
                is_last = len(rows) < size
                end = None if is_last else mixture.state()
                yield Buffer(epoch, number, start, self._mixed(rows, epoch, number), is_last, end)
                number, start = number + 1, end
            epoch, number, start = epoch + 1, 0, None

    def _mixed(self, rows: list[ShardRow], epoch: int, number: int) -> list[ShardRow]:
        if not self.plan.shuffle or self.plan.buffer_size == 1:
            return rows
        order = np.random.default_rng([self.plan.seed, BUFFER, epoch, number]).permutation(len(rows))
        return [rows[index] for index in order]


class _Lane:
    """Shards one after the other, in the order of a turn: all of them, or those of one dataset.

    Args:
        shards: The shards by their numbers.
        numbers: Which of them are in the lane.
        key: What the order of a turn follows from; None keeps the order of the files.
        state: Where to go on.
    """

    def __init__(
        self, shards: Sequence[Shard], numbers: Sequence[int], key: list[int] | None, state: dict[str, Any] | None
    ) -> None:
        self._shards, self._numbers, self._key = shards, numbers, key
        self._turn: int = 0 if state is None else state["turn"]
        self._index: int = 0 if state is None else state["shard"]
        self._place = None if state is None or state["row"] is None else Place(state["row"], state["at"])
        self._rows: Rows | None = None
        self._order = self._drawn()

    def _drawn(self) -> NDArray[np.int64]:
        numbers = np.asarray(self._numbers)
        if self._key is None:
            return numbers
        return np.random.default_rng([*self._key, self._turn]).permutation(numbers)

    def next(self) -> ShardRow | None:
        """The next row; None at the end of the turn."""
        while self._index < len(self._order):
            number = int(self._order[self._index])
            if self._rows is None:
                self._rows = self._opened(self._shards[number])
            found = next(self._rows, None)
            if found is not None:
                values, self._place = found
                return ShardRow(number, self._place.row, values)
            self._index, self._rows, self._place = self._index + 1, None, None
        return None

    def _opened(self, shard: Shard) -> Rows:
        if self._place is not None and self._place != shard.first and shard.replay:
            say(f"streaming: {shard.name} {shard.replay}: reading up to its row {self._place.row:,} again")
        return shard.read(self._place or shard.first)

    def begin_anew(self) -> None:
        """Begin the next turn, in an order of its own."""
        self._turn, self._index, self._rows, self._place = self._turn + 1, 0, None, None
        self._order = self._drawn()

    def state(self) -> dict[str, Any]:
        """Where it is; plain Python."""
        row, at = (None, None) if self._place is None else self._place
        return {"turn": self._turn, "shard": self._index, "row": row, "at": at}


class _Mixture:
    """The rows of one pass: those of the only lane, or of several in the order of draws.

    Args:
        shards: All shards.
        plan: What the order follows from.
        epoch: The pass.
        state: Where to go on; None from its beginning.
    """

    def __init__(self, shards: Sequence[Shard], plan: StreamPlan, epoch: int, state: dict[str, Any] | None) -> None:
        lanes = [list(range(len(shards)))]
        if plan.mix_strategy != "concat":
            datasets = dict.fromkeys(shard.source for shard in shards)
            lanes = [[n for n, shard in enumerate(shards) if shard.source == dataset] for dataset in datasets]
        states = [None] * len(lanes) if state is None else state["lanes"]
        self._lanes = [
            _Lane(shards, numbers, [plan.seed, SHARDS, epoch, lane] if plan.shuffle else None, states[lane])
            for lane, numbers in enumerate(lanes)
        ]
        self._plan, self._epoch = plan, epoch
        self._draws, self._ended = 0, [False] * len(lanes)
        if state is not None:
            self._draws, self._ended = state["draws"], list(state["ended"])
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    def __iter__(self) -> Iterator[ShardRow]:
        while (row := self._next()) is not None:
            yield row

    def _next(self) -> ShardRow | None:
        while not all(self._ended):
            lane = self._draw() if len(self._lanes) > 1 else 0
            if self._ended[lane] and self._plan.mix_strategy == "interleave_once":
                continue
            row = self._lanes[lane].next()
            if row is not None:
                return row
            self._ended = [True] * len(self._lanes) if self._ends_with_one else self._ended
            self._ended[lane] = True
            if self._plan.mix_strategy == "interleave_over" and not all(self._ended):
                self._lanes[lane].begin_anew()
                return self._lanes[lane].next()
        return None

    @property
    def _ends_with_one(self) -> bool:
        return self._plan.mix_strategy in ("concat", "interleave_under")

    def _draw(self) -> int:
        """The dataset that the next row comes from."""
        draw, self._draws = self._draws, self._draws + 1
        if not self._plan.probs:
            return draw % len(self._lanes)
        chunk = draw // CHUNK
        if self._drawn is None or self._drawn[0] != chunk:
            shares = np.cumsum(self._plan.probs) / np.sum(self._plan.probs)
            numbers = np.random.default_rng([self._plan.seed, DRAWS, self._epoch, chunk]).random(CHUNK)
            self._drawn = chunk, np.minimum(np.searchsorted(shares, numbers, side="right"), len(shares) - 1)
        return int(self._drawn[1][draw % CHUNK])

    def state(self) -> dict[str, Any]:
        """Where it is; plain Python."""
        lanes = [lane.state() for lane in self._lanes]
        return {"draws": self._draws, "ended": list(self._ended), "lanes": lanes}
