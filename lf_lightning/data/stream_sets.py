"""The sets of a run whose training rows are a stream: only those that validate are read before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from lf_lightning.data.build import Encoder
from lf_lightning.data.content_key import tokenizer_facts
from lf_lightning.data.prompts import Prompt
from lf_lightning.data.sets import EncodedSet, EncodedSets, Split
from lf_lightning.data.shards import Shard, held_out, shards_of
from lf_lightning.data.source import Source
from lf_lightning.data.stream import Stream, StreamPlan
from lf_lightning.types import InputError

BUFFER_SIZE = 16384
"""Rows that are mixed together unless said."""


class _Opened(NamedTuple):
    sources: list[Source]
    shards: list[Shard]  # of what trains
    validating: list[Source]  # the rows that validate, as records


class StreamSets(EncodedSets):
    """Sets of which `train` is a stream. With `val_size` the first rows of the datasets validate, and never train.

    Arguments as of `EncodedSets`. The other sets are encoded before the run, as ever.
    """

    @cached_property
    def _opened(self) -> _Opened:
        sources = self._reader.sources(self._names["train"], streaming=True)
        shards = shards_of(sources)
        if not self._val_size:
            return _Opened(sources, shards, [])
        kept: list[Shard] = []
        validating: list[Source] = []
        for index, source in enumerate(sources):
            own = [shard for shard in shards if shard.source == index]
            num_rows = int(self._val_size) // len(sources) + (index < int(self._val_size) % len(sources))
            rows, left = held_out(source.name, own, num_rows) if num_rows else ([], own)
            kept += left
            if rows:
                plain = {field.name: vars(source)[field.name] for field in fields(Source)}
                validating.append(Source(**{**plain, "path": None, "records": tuple(rows)}))
        return _Opened(sources, kept, validating)

    def __getitem__(self, split: Split) -> EncodedSet:
        """The set, opened now if it was not yet.

        Raises:
            InputError: It is the stream, a row cannot be used, or the split leaves one side empty.
        """
        if split == "train":
            raise InputError(
                "data.streaming: must be false for what looks at the training rows before they are read, such as "
                "model.init_args.reference.precompute, got true. Change one of them."
            )
        return super().__getitem__(split)

    def _open_train(self) -> None:
        """Encode the rows that validate; they are few, and kept in memory."""
        store = self._reader.store_of(self._opened.validating, cache_dir=None)
        self._open["val"] = EncodedSet(store, np.arange(len(store)))

    def open(self, split: Split) -> None:
        """Encode a set, or open it from the cache; of the stream, find its shards.

        Raises:
            InputError: A row cannot be used, or a dataset cannot be reached.
        """
        _ = self.encoder if split == "train" else self[split]

    def lines(self, split: Split) -> list[str]:
        """What was kept, cut and dropped of each dataset of a set; of the stream, what it is read from."""
        if split == "train":
            shards = self._opened.shards
            counts = [sum(shard.source == index for shard in shards) for index in range(len(self._opened.sources))]
            named = zip(self._opened.sources, counts, strict=True)
            return [f"{source.name}: a stream of {count:,} shard{'s' * (count != 1)}" for source, count in named]
        return [summary.line() for summary in self[split].store.summaries] if split in self else []

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a set with the answers that the data gives.

        Raises:
            InputError: There is no such set.
        """
        split = self.predicted if split == "predict" else split
        if split == "val" and not self._names["val"] and "val" in self:
            return self._reader.prompts_of(self._opened.validating)
        return super().prompts(split)

    @cached_property
    def encoder(self) -> Encoder:
        """What encodes the rows of the stream.

        Raises:
            InputError: A dataset does not suit the task, or cannot be reached.
        """
        return self._reader.encoder(self._opened.sources)

    def stream(self, options: dict[str, Any]) -> Stream:
        """The rows that train.

        Args:
            options: The data's options by name.
        """
        size = BUFFER_SIZE if options["buffer_size"] is None else max(1, options["buffer_size"])
        shuffle: bool = options["shuffle"]
        probs: Sequence[float] = options["interleave_probs"] or ()
        plan = StreamPlan(self._seed, shuffle, size if shuffle else 1, options["mix_strategy"], tuple(probs))
        return Stream(self._opened.shards, plan)

    def contents(self) -> str:
        """Digest over what tells these shards from others, in hexadecimal.

        Of a file it knows size and ends: reading all of it would take as long as the stream.
        """
        return _digest(shard.digest for shard in self._opened.shards)

    def tokens(self) -> str:
        """Digest over template and tokenizer, in hexadecimal."""
        template = json.dumps(asdict(self.encoder.template), sort_keys=True)
        return _digest([template, *tokenizer_facts(self.encoder.tokenizer)])


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()[:32]
