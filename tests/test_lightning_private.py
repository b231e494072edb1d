"""Each private name that we touch still means what we take it to mean."""

import os
from typing import Literal

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

from lf_lightning.lightning_private import global_seed, parser_schema, share_over_all_ranks


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


def test_all_ranks_of_all_nodes_share_the_model_as_data_parallel_ones(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        "lightning.pytorch.strategies.model_parallel._setup_device_mesh", lambda *sizes: asked.append(sizes)
    )
    monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", lambda self: None)
    monkeypatch.setattr(ModelParallelStrategy, "world_size", 6)
    strategy = ModelParallelStrategy()
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 2
    strategy.cluster_environment = LightningEnvironment()
    strategy._lightning_module = LightningModule()
    strategy.accelerator = CPUAccelerator()
    share_over_all_ranks(strategy)
    strategy.setup_environment()
    assert asked[0][:2] == (6, 1)


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
