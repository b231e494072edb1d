"""The encoded sets of a run: which documents train, which validate, and in which order they are visited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lf_lightning.data.order import epoch_order, split_rows
from lf_lightning.data.packing import block_units, knapsack_units, sequence_units
from lf_lightning.data.partners import KLPairs, with_partners
from lf_lightning.data.prompts import Prompt
from lf_lightning.data.reader import Names, Reader
from lf_lightning.data.store import TokenStore
from lf_lightning.types import InputError, Unit

Split = Literal["train", "val", "test", "predict"]
Packing = Literal["none", "blocks", "knapsack"]


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
            return sequence_units(lengths[order], self.documents[order])
        make = block_units if packing == "blocks" else knapsack_units
        units = make(lengths, max_length, order)
        unit_order = epoch_order(len(units), seed=seed + 1, epoch=epoch, shuffle=shuffle)
        return [self._in_store(units[index]) for index in unit_order]

    def paired(self, units: Sequence[Unit], *, kl_pairs: KLPairs, step_size: int | None) -> list[Unit]:
        """The units of an epoch, each with its partner.

        Args:
            units: One document each, in the order of the epoch.
            kl_pairs: How partners are found.
            step_size: Units of an optimizer step; None where all units are one.
        """
        size = step_size or max(1, len(units))
        return with_partners(units, self.documents.tolist(), kl_pairs=kl_pairs, step_size=size)

    def num_desirable(self) -> tuple[int, int]:
        """Rows of kto that were liked, and rows that were not."""
        liked = int(self.store.facts["is_desirable"][self.documents].sum())
        return liked, len(self.documents) - liked

    def _in_store(self, unit: Unit) -> Unit:
        return Unit(tuple(span._replace(document=int(self.documents[span.document])) for span in unit.spans))


class EncodedSets:
    """Opens sets when they are asked for.

    Args:
        reader: Encodes datasets, or opens them from the cache.
        names: The datasets of each set.
        val_size: Rows of the training data that validate instead: a count (>= 1) or a share (below 1).
        seed: Seed of that choice.
    """

    def __init__(self, reader: Reader, names: dict[Split, Names], *, val_size: float, seed: int) -> None:
        self._reader, self._names, self._val_size, self._seed = reader, names, val_size, seed
        self._open: dict[Split, EncodedSet] = {}
        self._read: dict[Split, list[Prompt]] = {}

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
        """What was kept, cut and dropped of each dataset of a set; nothing where it names none of its own."""
        return [summary.line() for summary in self[split].store.summaries] if self._names[split] else []

    @property
    def predicted(self) -> Split:
        """The set that `predict` works on: the validation rows where no other are named."""
        return "val" if "val" in self and not self._names["predict"] else "predict"

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a set with the answers that the data gives; validation rows of a split training set too.

        Raises:
            InputError: There is no such set.
        """
        split = self.predicted if split == "predict" else split
        if split == "val" and not self._names["val"] and "val" in self:
            chosen = self["val"].row_keys()
            everything = self._reader.prompts(self._names["train"])
            return [prompt for prompt in everything if (prompt.source, prompt.row) in chosen]
        if not self._names[split]:
            raise InputError("data.predict_datasets: must name prompts to answer, got none. Name at least one dataset.")
        return self._reader.prompts(self._names[split])

    def open(self, split: Split) -> None:
        """Encode a set, or open it from the cache, so that using it later takes no time.

        Raises:
            InputError: A row cannot be used, or the split leaves one side empty.
        """
        _ = self[split]

    def _whole(self, split: Split) -> EncodedSet:
        store = self._reader.store(self._names[split])
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
