"""Each private name that we touch still means what we take it to mean."""

import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer, seed_everything

from lf_lightning.lightning_private import global_seed, parser_schema, validation_follows
from tests.callbacks.python_run import fit


def test_the_global_seed_is_that_of_the_last_seed_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards
    seed_everything(31)
    assert global_seed() == 31
    seed_everything(5)
    assert global_seed() == 5


def test_without_seed_everything_the_global_seed_is_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert global_seed() == 0
    assert "PL_GLOBAL_SEED" not in os.environ


class Follows(Callback):
    """Asks after every step, and sees what comes."""

    def __init__(self) -> None:
        self.asked: dict[int, bool] = {}
        self.came: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.asked[trainer.global_step] = validation_follows(trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self.came.append(trainer.global_step)


@pytest.mark.parametrize(
    "options",
    [
        {"val_size": 3, "val_check_interval": 2, "check_val_every_n_epoch": None},
        {"val_size": 3},  # at the end of an epoch of three steps
        {"val_size": 3, "val_check_interval": 0.5},
        {"val_size": 3, "limit_val_batches": 0},
        {"val_size": 0},
    ],
)
def test_a_validation_follows_exactly_where_it_is_said_to(options: dict[str, Any], tmp_path: Path):
    follows = Follows()
    fit(tmp_path, follows, max_steps=7, num_sanity_val_steps=0, **options)
    assert sorted(follows.asked) == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, asked in follows.asked.items() if asked] == follows.came
    assert bool(follows.came) == (options["val_size"] > 0 and "limit_val_batches" not in options)


class Fruit:
    """Something to eat."""


class Apple(Fruit):
    """Grows on trees.

    Args:
        weight: In grams, > 0.
    """

    def __init__(self, weight: int = 100) -> None:
        self.weight = weight


def test_the_schema_of_a_parser_knows_types_choices_classes_and_meanings():
    parser = ArgumentParser()
    parser.add_argument("--ripe", type=Literal["yes", "no"], default="no", help="Whether to eat it.")
    parser.add_argument("--fruit", type=Fruit)
    parser.add_argument("--layer", type=torch.nn.Module | None, default=None)
    schema = parser_schema(parser)
    options = schema["properties"]
    assert options["ripe"] == {"enum": ["yes", "no"], "description": "Whether to eat it.", "default": "no"}
    assert options["layer"] == {"anyOf": [{"type": "null"}, {"type": ["object", "string"]}]}
    assert options["fruit"] == {"$ref": "#/$defs/Fruit"}
    by_name = {
        kind["properties"]["class_path"]["enum"][1]: kind
        for kind in schema["$defs"]["Fruit"]["anyOf"]
        if "enum" in kind.get("properties", {}).get("class_path", {})
    }
    assert sorted(by_name) == ["Apple", "Fruit"]
    assert by_name["Apple"]["properties"]["class_path"]["enum"] == [f"{__name__}.Apple", "Apple"]
    weight = by_name["Apple"]["properties"]["init_args"]["properties"]["weight"]
    assert weight == {"type": "integer", "description": "In grams, > 0.", "default": 100}
