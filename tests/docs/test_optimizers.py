"""The page of optimizers names every class with its paper, and the bytes that its state takes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lf_lightning import Adafactor, AdamMini, AdamW, AdamW8bit, BAdam, BAdamRatio, GaLore, Muon
from lf_lightning.optim import OptimizerSpec, describe
from lf_lightning.optim.schedules import OF_KIND, Kind

SIDE, RANK = 256, 16
SPECS: dict[str, tuple[OptimizerSpec, torch.dtype, float]] = {
    "`AdamW`": (AdamW(), torch.float32, 1.0),
    "`AdamW`, `weights: kahan`": (AdamW(weights="kahan"), torch.bfloat16, 1.0),
    "`AdamW`, `weights: stochastic`": (AdamW(weights="stochastic"), torch.bfloat16, 1.0),
    "`AdamW8bit`": (AdamW8bit(), torch.float32, 1.0),
    "`Adafactor`": (Adafactor(), torch.float32, 1.0),
    "`Muon`": (Muon(), torch.float32, 1.0),
    "`AdamMini`": (AdamMini(), torch.float32, 1.0),
    "`GaLore`": (GaLore(rank=RANK), torch.float32, RANK / SIDE),
    "`BAdam`": (BAdam(), torch.bfloat16, 1.0),
    "`BAdamRatio`": (BAdamRatio(update_ratio=0.25), torch.bfloat16, 0.25),
}


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "optimizers.md").read_text(encoding="utf-8")


def rows(page: str) -> dict[str, list[str]]:
    table = page.split("## Which one")[1].split("\nBytes of state")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] == "| `"]
    return {name: cells for name, *cells in found}


def test_every_optimizer_has_a_row_with_its_paper_and_strategies(page: str) -> None:
    found = rows(page)
    ours = [kind for kind in OptimizerSpec.__subclasses__() if kind.__module__.startswith("lf_lightning.")]
    assert {name.split("`")[1] for name in found} == {kind.__name__ for kind in ours}
    for name, (paper, *_, strategies) in found.items():
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", paper)
        (kind,) = [kind for kind in ours if kind.__name__ == name.split("`")[1]]
        want = set(kind.strategies) - {"deepspeed"}
        assert set(strategies.removesuffix(" on one device").split(", ")) == want


@pytest.mark.parametrize("name", SPECS)
def test_the_bytes_of_state_are_those_of_the_optimizer(page: str, name: str) -> None:
    spec, dtype, share = SPECS[name]
    layer: Any = nn.Linear(SIDE, SIDE, bias=False, dtype=dtype)
    optimizer = spec.build(describe(layer, blocks=[layer]))
    layer.weight.grad = torch.randn_like(layer.weight)
    optimizer.step()
    held = [each for each in optimizer.state[layer.weight].values() if torch.is_tensor(each) and each.numel() > 256]
    found = sum(each.numel() * each.element_size() for each in held) / layer.weight.numel()
    want = float(rows(page)[name][2].split()[0]) * share
    if isinstance(spec, GaLore):
        want += 4 * share  # and the basis
    assert found == pytest.approx(want, abs=0.02)


def test_every_kind_of_schedule_is_there_with_its_options(page: str) -> None:
    table = page.split("## Schedules")[1].split("|---|---|---|")[1].split("\nThey are those")[0]
    kinds = dict(re.findall(r"(?m)^\| `(\w+)` \|.*\|(.*)\|$", table))
    assert set(kinds) == set(get_args(Kind))
    for kind, options in kinds.items():
        assert {name for name, of in OF_KIND.items() if kind in of} == set(re.findall(r"`(\w+)`", options))


def test_the_options_that_stand_beside_llamafactorys_exist(page: str) -> None:
    fields = {
        kind.__name__: {field.name for field in dataclasses.fields(kind)} for kind in OptimizerSpec.__subclasses__()
    }
    table = page.split("## LlamaFactory's keys")[1]
    named = re.findall(r"(?m)\| `(\w+)`: ((?:`\w+`,? ?)+)\|", table)
    assert len(named) == 5
    for kind, options in named:
        assert set(re.findall(r"`(\w+)`", options)) <= fields[kind]
