"""Rows of a stream become documents as they are needed, and the place of the first one that nobody took."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lf_lightning.console import say
from lf_lightning.data.build import Encoder
from lf_lightning.data.encode import Encoded, EncodedRow, RowProblem, encode_rows
from lf_lightning.data.encode_judgements import FACTS, encode_judgements
from lf_lightning.data.shards import ShardRow
from lf_lightning.data.store import NUM_REASONS, InvalidRows, StoreSummary, TokenStore
from lf_lightning.data.stream import Buffer, Stream
from lf_lightning.types import InputError

AT_ONCE = 128
"""Rows that are encoded together, in one call of the tokenizer for each dataset; the result does not depend on it."""
COUNTS = ("rows", "kept", "documents", "cut_rows", "cut_tokens", "dropped", "per_turn", "last_turn")
"""What is counted of the rows of each dataset in a pass: StoreSummary's, without `num_`."""


class StreamedDocument(NamedTuple):
    """A document, or tokens of one, and the row that it is made of."""

    shard: int
    row: int
    encoded: Encoded


class _Entry(NamedTuple):
    """A row that was encoded, and where it stands."""

    buffer: Buffer
    place: int  # of the row in its buffer
    origin: ShardRow
    result: EncodedRow | RowProblem

    @property
    def documents(self) -> tuple[Encoded, ...]:
        """What it gives; nothing where the row cannot be used."""
        return self.result.examples if isinstance(self.result, EncodedRow) else ()


class StreamDocuments:
    """The documents of a stream, a pass after the other.

    Every rank reads and encodes all of them: the layout of a step wants all lengths, and this way no rank waits for
    another, nor decides anything that the others do not know.

    Args:
        stream: The rows.
        encoder: What encodes them.
        invalid_rows: `stop` at the first row that cannot be used, or `skip` and count such rows.
    """

    def __init__(self, stream: Stream, encoder: Encoder, *, invalid_rows: InvalidRows) -> None:
        self.stream, self._encoder, self._stops = stream, encoder, invalid_rows == "stop"
        self._reasons: set[str] = set()
        self.begin(0)

    def begin(self, epoch: int) -> None:
        """Go on with the first row of a pass."""
        self.load_state_dict(
            {"epoch": epoch, "buffer": 0, "start": None, "row": 0, "documents": 0, "tokens": 0, "counts": {}}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; rows are read when they are asked for."""
        self.epoch: int = state["epoch"]
        self._buffers = self.stream.buffers(state["epoch"], state["buffer"], state["start"])
        self._buffer: Buffer | None = None
        self._loaded = {name: state[name] for name in ("epoch", "buffer", "start")}
        self._index: int = state["row"]
        self._entries: deque[_Entry] = deque()
        self._documents, self._tokens = state["documents"], state["tokens"]  # taken of the first entry
        self._counts = {int(source): dict(counts) for source, counts in state["counts"].items()}

    def state_dict(self) -> dict[str, Any]:
        """The place of the first token that nobody took; plain Python, as small for the last row as for the first.

        It names the buffer of its row by what reads it again, and the row by its number in the buffer's order.
        """
        buffer: Buffer | None
        if self._entries:
            buffer, index = self._entries[0].buffer, self._entries[0].place
        else:
            buffer, index = self._buffer, self._index
        place: dict[str, Any] = self._loaded
        if buffer is not None:
            place = {"epoch": buffer.epoch, "buffer": buffer.number, "start": buffer.start}
            if index == len(buffer.rows) and not buffer.is_last:
                place, index = {**place, "buffer": buffer.number + 1, "start": buffer.end}, 0
        taken = {"row": index, "documents": self._documents, "tokens": self._tokens}
        return {**place, **taken, "counts": {source: dict(counts) for source, counts in self._counts.items()}}

    # ------------------------------------------------------------------ taking

    def take(self, num_documents: int) -> list[StreamedDocument]:
        """The next documents; fewer at the end of a pass, never none.

        Raises:
            InputError: A row cannot be used, or none of a whole pass.
        """
        return self._taken(lambda: self._take(num_documents))

    def take_tokens(self, num_tokens: int) -> list[StreamedDocument]:
        """The next documents as far as they make so many tokens together; fewer at the end of a pass, never none.

        Raises:
            InputError: As of `take`.
        """
        return self._taken(lambda: self._take_tokens(num_tokens))

    def _taken(self, take: Callable[[], list[StreamedDocument]]) -> list[StreamedDocument]:
        for _ in range(2):  # the rest of a pass may hold nothing, a whole one must not
            if found := take():
                return found
            self._end_pass()
        names = ", ".join(dict.fromkeys(source.name for source in self._encoder.sources))
        raise InputError(f"data.datasets: no row of {names} can be used. Check formatting, columns and max_length.")

    def _take(self, num_documents: int) -> list[StreamedDocument]:
        found: list[StreamedDocument] = []
        while (missing := num_documents - len(found)) and (entry := self._first()) is not None:
            left = entry.documents[self._documents :][:missing]
            found += [StreamedDocument(entry.origin.shard, entry.origin.row, encoded) for encoded in left]
            self._documents += len(left)
            self._drop_used()
        return found

    def _take_tokens(self, num_tokens: int) -> list[StreamedDocument]:
        found: list[StreamedDocument] = []
        while num_tokens and (entry := self._first()) is not None:
            whole = entry.documents[self._documents]
            end = min(len(whole.input_ids), self._tokens + num_tokens)
            part = slice(self._tokens, end)
            cut = whole._replace(input_ids=whole.input_ids[part], labels=whole.labels[part])
            found.append(StreamedDocument(entry.origin.shard, entry.origin.row, cut))
            num_tokens -= end - self._tokens
            self._tokens = end
            if end == len(whole.input_ids):
                self._documents, self._tokens = self._documents + 1, 0
                self._drop_used()
        return found

    def _first(self) -> _Entry | None:
        """The first row with something left, None at the end of a pass; what cannot be used is refused or dropped."""
        while self._entries or self._read():
            entry = self._entries[0]
            if self._documents < len(entry.documents):
                return entry
            if isinstance(entry.result, RowProblem):
                self._complain(entry.origin, entry.result.reason)
            self._drop_used()
        return None

    def _drop_used(self) -> None:
        """Count the first row where nothing of it is left."""
        if self._documents == len(self._entries[0].documents):
            self._count(self._entries.popleft())
            self._documents = 0

    # ------------------------------------------------------------------ reading

    def _read(self) -> bool:
        """Encode the next rows of the pass; whether there were any."""
        buffer = self._buffer
        if buffer is None or (self._index == len(buffer.rows) and not buffer.is_last):
            buffer, self._index = next(self._buffers), 0 if buffer is not None else self._index
            self._buffer = buffer
        chosen = range(self._index, min(self._index + AT_ONCE, len(buffer.rows)))
        origins = [buffer.rows[index] for index in chosen]
        for index, origin, result in zip(chosen, origins, self._encoded(origins), strict=True):
            self._entries.append(_Entry(buffer, index, origin, result))
        self._index += len(chosen)
        return bool(chosen)

    def _encoded(self, origins: Sequence[ShardRow]) -> list[EncodedRow | RowProblem]:
        """What becomes of each row: those of a dataset in one call of the tokenizer."""
        encoder = self._encoder
        encode = encode_judgements if encoder.options.task in FACTS else encode_rows
        results: dict[int, EncodedRow | RowProblem] = {}
        source_of = [self.stream.shards[origin.shard].source for origin in origins]
        for source in dict.fromkeys(source_of):
            places = [place for place, each in enumerate(source_of) if each == source]
            rows = [origins[place].values for place in places]
            found = encode(rows, encoder.sources[source], encoder.options, encoder.tokenizer, encoder.template)
            results |= zip(places, sorted(found, key=lambda result: result.row), strict=True)
        return [results[place] for place in range(len(origins))]

    def _complain(self, origin: ShardRow, reason: str) -> None:
        name = self.stream.shards[origin.shard].name
        if self._stops:
            raise InputError(f"{name}, row {origin.row}: {reason}. Fix the row, or set data.invalid_rows: skip.")
        if len(self._reasons) < NUM_REASONS and reason not in self._reasons:
            self._reasons.add(reason)
            say(f"streaming: {name}, row {origin.row} dropped: {reason}; further ones are counted")

    # ------------------------------------------------------------------ counting

    def _count(self, entry: _Entry) -> None:
        source = self.stream.shards[entry.origin.shard].source
        counts = self._counts.setdefault(source, dict.fromkeys(COUNTS, 0))
        counts["rows"] += 1
        if isinstance(entry.result, RowProblem):
            counts["dropped"] += 1
            return
        counts["kept"] += 1
        counts["documents"] += len(entry.documents)
        counts["cut_rows"] += bool(entry.result.num_cut)
        counts["cut_tokens"] += entry.result.num_cut
        for way in ("per_turn", "last_turn"):
            counts[way] += entry.result.way == way

    def _end_pass(self) -> None:
        for line in self.lines():
            say(f"streaming: pass {self.epoch + 1} is over. {line}")
        self.begin(self.epoch + 1)

    def lines(self) -> list[str]:
        """What became of the rows of each dataset in this pass."""
        names = [source.name for source in self._encoder.sources]
        return [
            StoreSummary(names[source], **{f"num_{name}": number for name, number in counts.items()}).line()
            for source, counts in sorted(self._counts.items())
        ]


def store_of_documents(documents: Sequence[StreamedDocument], stream: Stream, encoder: Encoder) -> TokenStore:
    """Documents as a store in memory, in their order.

    Args:
        documents: At least one.
        stream: Whose shards they name.
        encoder: Its task decides what is kept beside the tokens.
    """
    lengths = [len(document.encoded.input_ids) for document in documents]
    kinds = FACTS.get(encoder.options.task, {})
    return TokenStore(
        input_ids=np.concatenate([np.array(document.encoded.input_ids, np.int32) for document in documents]),
        labels=np.concatenate([np.array(document.encoded.labels, np.int32) for document in documents]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
        source_index=np.array([document.shard for document in documents], np.int32),
        row=np.array([document.row for document in documents], np.int64),
        names=tuple(shard.name for shard in stream.shards),
        summaries=(),
        facts={
            name: np.array([document.encoded.facts[name] for document in documents], kind)
            for name, kind in kinds.items()
        },
    )
