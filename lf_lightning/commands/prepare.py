"""Encode what a run will read before it starts, on any machine: no model, no trainer, no other process."""

from __future__ import annotations

from typing import Any

from lf_lightning.cli import Gate, build
from lf_lightning.console import say
from lf_lightning.data.checks import ROLLING
from lf_lightning.data.datamodule import SETS, DataModule
from lf_lightning.data.sets import Split
from lf_lightning.types import InputError, Isolation

PLAIN: dict[str, Any] = {"callbacks": None, "logger": False, "plugins": None, "profiler": None, "strategy": "auto"}
"""Part of a trainer -> what needs neither its machines nor its services."""
ASSUMED = Isolation(padded=True, padding_free=True, branches=True)
"""The verdict of the probe that `fit` makes on the model: that of the usual one."""


class DataGate(Gate):
    """The gate without a trainer: the configuration may be for machines that this one is not."""

    def instantiate_classes(self) -> None:
        """Build the data, and the stage without its model."""
        config = self.config.clone()
        for name, value in PLAIN.items():
            config.trainer[name] = value
        self.config_init = self.parser.instantiate(config)
        self.model, self.datamodule = self.config_init.model, self.config_init.data

    def finish(self) -> None:
        """Nothing: there is no run."""


def main(argv: list[str]) -> int:
    """Encode the data of a run beforehand."""
    prepare(build(argv, "prepare", DataGate).datamodule)
    return 0


def prepare(data: DataModule) -> None:
    """Leave every set of a run in the cache, and say what `fit` will say of them, and where they are.

    Raises:
        InputError: There is no cache or no training set, a row cannot be used, or the cache cannot be written.
    """
    splits: list[Split] = [split for split in SETS if split in data.sets]
    if "train" not in splits:
        raise InputError(f"data.{SETS['train']}: must name at least one dataset, got none. Name one.")
    if data.arguments["streaming"]:
        data.sets.open("train")
        _say_lines(data, ["train"])
        say("train: a stream is encoded while training reads it, there is nothing to prepare")
        splits = [split for split in SETS if data.names[split] and split != "train"]
    if splits and data.arguments["cache_dir"] is None:
        raise InputError("data.cache_dir: must be a folder for prepare, got null. Name one that the run can read too.")
    if data.task in ROLLING:
        _say_lines(data, splits)
        say(f"{data.task}: these prompts are in order; fit encodes them when it starts, and nothing is kept")
        return
    for split in splits:
        if split == "predict" and data.task != "rm":
            say(f"{split}: {len(data.prompts(split)):,} prompts, encoded when predict starts, and not kept")
            continue
        data.sets.open(split)
        _say_lines(data, [split])
    if "train" in splits:
        data.resolve_layout(ASSUMED)
        data.train_dataloader()  # says how many units, tokens and steps there are
    for split in splits:
        if split != "predict" or data.task == "rm":
            say(f"{split}: encoded in {data.sets[split].store.folder}")


def _say_lines(data: DataModule, splits: list[Split]) -> None:
    for line in [line for split in splits for line in data.sets.lines(split)]:
        say(line)
