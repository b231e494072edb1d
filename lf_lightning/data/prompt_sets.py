"""The prompts of a run that learns from its own responses: nothing is encoded before training but them."""

from __future__ import annotations

from collections import defaultdict

from lf_lightning.data.order import split_rows
from lf_lightning.data.prompts import Prompt
from lf_lightning.data.sets import EncodedSets, Split
from lf_lightning.types import InputError


class PromptSets(EncodedSets):
    """Sets of which only the prompts are read, once. Arguments as of `EncodedSets`."""

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a set with the answers that the data gives.

        Raises:
            InputError: There is no such set, a row cannot be used, none is left, or `val_size` leaves one side empty.
        """
        split = self.predicted if split == "predict" else split
        if split not in self._read:
            if split == "train" or (split == "val" and not self._names["val"] and "val" in self):
                self._read_train()
            else:
                self._read[split] = super().prompts(split)
                self._check(split)
        return self._read[split]

    def lines(self, split: Split) -> list[str]:
        """How many prompts each dataset of a set gives; nothing where the set names none of its own."""
        if not self._names[split]:
            return []
        lengths: dict[str, list[int]] = defaultdict(list)
        for prompt in self.prompts(split) + (self.prompts("val") if self._is_split(split) else []):
            lengths[prompt.source].append(len(prompt.ids))
        return [f"{name}: {len(own):,} prompts (longest {max(own):,} tokens)" for name, own in lengths.items()]

    def open(self, split: Split) -> None:
        """Read the prompts of a set; they are encoded then and there, and not kept between runs.

        Raises:
            InputError: As of `prompts`.
        """
        self.prompts(split)

    def _is_split(self, split: Split) -> bool:
        return split == "train" and bool(self._val_size)

    def _read_train(self) -> None:
        self._read["train"] = everything = super().prompts("train")
        self._check("train")
        if not self._val_size:
            return
        train, val = split_rows(len(everything), self._val_size, seed=self._seed)
        if not len(train) or not len(val):
            raise InputError(
                f"data.val_size: must leave rows on both sides, got {self._val_size:g} of {len(everything)} rows. "
                "Change it."
            )
        self._read["train"] = [everything[row] for row in train]
        self._read["val"] = [everything[row] for row in val]

    def _check(self, split: Split) -> None:
        if not self._read[split]:
            raise InputError(f"data: the {split} set must hold prompts, got none. Name another dataset.")
