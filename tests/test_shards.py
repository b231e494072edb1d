"""Which part of a tensor is whose, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lf_lightning.optim.state_files import load_rows, whole_states
from lf_lightning.shards import box_of


@pytest.mark.parametrize(
    ("shape", "cuts", "box"),
    [
        ((7,), [(0, 0, 2)], [(0, 4)]),
        ((7,), [(0, 1, 2)], [(4, 7)]),
        ((2, 3), [(0, 2, 3)], [(2, 2), (0, 3)]),  # a rank without any row
        ((8, 6), [(0, 1, 2), (0, 1, 2)], [(6, 8), (0, 6)]),  # the second half of the second half
        ((8, 6), [(1, 1, 2), (0, 0, 2)], [(0, 4), (3, 6)]),
        ((8, 6), [], [(0, 8), (0, 6)]),
    ],
)
def test_cuts_follow_each_other(shape: Any, cuts: Any, box: list[tuple[int, int]]):
    assert [(each.start, each.stop) for each in box_of(shape, cuts)] == box


WHOLE = {0: torch.arange(48.0).reshape(8, 6), 1: torch.arange(48.0).reshape(8, 6) + 100, 2: torch.arange(5.0)}
SPLIT = {0: 0, 1: 1}  # parameter -> the dimension that ranks of a layer share; the third lies whole on each


@pytest.fixture
def written(tmp_path: Path) -> tuple[list[dict[str, Any]], Path]:
    """What four ranks write of an optimizer: two that share rows, times two that share layers."""
    for part in range(2):
        for split in range(2):
            tensors = {}
            for number, whole in WHOLE.items():
                cuts = [(SPLIT[number], split, 2)] if number in SPLIT else []
                if cuts or split == 0:
                    piece: Tensor = whole[box_of(whole.shape, [*cuts, (0, part, 2)])]
                    tensors[f"0.{number}.exp_avg"] = piece.contiguous()
            save_file(tensors, tmp_path / f"optimizer-{2 * part + split + 1:05d}-of-00004.safetensors")
    state = {
        "state": {number: {"step": torch.tensor(3.0)} for number in WHOLE},
        "param_groups": [{"lr": 0.1, "params": [0, 1, 2]}],
        "cut": {number: {"exp_avg": list(whole.shape)} for number, whole in WHOLE.items()},
        "split": SPLIT,
        "num_files": 2,
        "num_splits": 2,
    }
    return [state], tmp_path


def test_what_ranks_of_a_layer_wrote_is_put_together(written: tuple[list[dict[str, Any]], Path]):
    states, folder = written
    (found,) = whole_states(states, folder)
    for number, whole in WHOLE.items():
        assert torch.equal(found["state"][number]["exp_avg"], whole)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros_like(whole)) for whole in WHOLE.values()])
    load_rows([optimizer], states, folder)
    loaded = [optimizer.state[each]["exp_avg"] for each in optimizer.param_groups[0]["params"]]
    assert all(torch.equal(got, want) for got, want in zip(loaded, WHOLE.values(), strict=True))
