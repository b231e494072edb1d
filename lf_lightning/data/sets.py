"""The encoded sets of a run: which documents train, which validate, and in which order they are visited."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lf_lightning.data.order import epoch_order, split_rows
from lf_lightning.data.packing import block_units, knapsack_units, sequence_units
from lf_lightning.data.store import TokenStore
from lf_lightning.types import InputError, Unit

Split = Literal["train", "val", "test", "predict"]
Packing = Literal["none", "blocks", "knapsack"]
Names = Sequence[str | dict[str, Any]]


class EncodedSet(NamedTuple):
    """A token store, and which of its documents belong to the set."""

    store: TokenStore
    documents: NDArray[np.int64]

    def row_keys(self) -> set[tuple[str, int]]:
        """Name of the dataset and row number, from 1, of every row of the set."""
        names, rows = self.store.source_index[self.documents], self.store.row[self.documents]
        return {(self.store.names[name], int(row)) for name, row in zip(names, rows, strict=True)}

    def units(self, *, packing: Packing, max_length: int, seed: int, epoch: int, shuffle: bool) -> list[Unit]:
        """The units of an epoch in their order: a function of (data, seed, epoch) alone."""
        lengths = self.store.lengths[self.documents]
        order = epoch_order(len(self.documents), seed=seed, epoch=epoch, shuffle=shuffle)
        if packing == "none":
            units, unit_order = sequence_units(lengths), order
        else:
            make = block_units if packing == "blocks" else knapsack_units
            units = make(lengths, max_length, order)
            unit_order = epoch_order(len(units), seed=seed + 1, epoch=epoch, shuffle=shuffle)
        return [self._in_store(units[index]) for index in unit_order]

    def _in_store(self, unit: Unit) -> Unit:
        return Unit(tuple(span._replace(document=int(self.documents[span.document])) for span in unit.spans))


class EncodedSets:
    """Opens sets when they are asked for.

    Args:
        build: Encodes datasets, or opens them from the cache.
        names: The datasets of each set.
        val_size: Rows of the training data that validate instead: a count (>= 1) or a share (below 1).
        seed: Seed of that choice.
    """

    def __init__(
        self, build: Callable[[Names], TokenStore], names: dict[Split, Names], *, val_size: float, seed: int
    ) -> None:
        self._build, self._names, self._val_size, self._seed = build, names, val_size, seed
        self._open: dict[Split, EncodedSet] = {}

    def __contains__(self, split: Split) -> bool:
        """Whether there is such a set."""
        return bool(self._names[split]) or (split == "val" and bool(self._val_size) and bool(self._names["train"]))

    def __getitem__(self, split: Split) -> EncodedSet:
        """The set, opened now if it was not yet.

        Raises:
            InputError: A row cannot be used, or the split leaves one side empty.
        """
        if split not in self._open:
            if split == "train" or (split == "val" and not self._names["val"]):
                self._open_train()
            else:
                self._open[split] = self._whole(split)
        return self._open[split]

    def lines(self, split: Split) -> list[str]:
        """What was kept, cut and dropped of each dataset of a set."""
        return [summary.line() for summary in self[split].store.summaries]

    def _whole(self, split: Split) -> EncodedSet:
        store = self._build(self._names[split])
        return EncodedSet(store, np.arange(len(store)))

    def _open_train(self) -> None:
        """Open the training set, less the rows that validate, with all documents of each row."""
        whole = self._whole("train")
        self._open["train"] = whole
        if not self._val_size:
            return
        keys = np.stack([whole.store.source_index.astype(np.int64), np.asarray(whole.store.row)])
        rows, row_of_document = np.unique(keys, axis=1, return_inverse=True)
        num_rows = rows.shape[1]
        train, val = split_rows(num_rows, self._val_size, seed=self._seed)
        if not len(train) or not len(val):
            raise InputError(
                f"data.val_size: must leave rows on both sides, got {self._val_size:g} of {num_rows} rows. Change it."
            )
        validates = np.isin(row_of_document.reshape(-1), val)
        self._open["train"] = EncodedSet(whole.store, np.flatnonzero(~validates))
        self._open["val"] = EncodedSet(whole.store, np.flatnonzero(validates))
