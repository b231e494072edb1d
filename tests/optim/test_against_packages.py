"""GaLore and Adam-mini against the packages of their authors, where these compute what the papers say."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import nn

from lf_lightning import AdamMini, GaLore
from lf_lightning.optim.low_rank import Side
from tests.optim.toy import HEAD, WIDTH, Toy, toy, train


def furthest(one: Any, other: Any) -> float:
    """Largest difference of a weight, relative to the largest move of its tensor."""
    start = dict(toy().named_parameters())
    theirs = other.weights()
    return max(
        float((value - theirs[name]).abs().max() / (value - start[name]).abs().max())
        for name, value in one.weights().items()
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("side", get_args(Side))
def test_galore_is_that_of_galore_torch(side: Any) -> None:
    package = pytest.importorskip("galore_torch")

    def theirs(model: Toy) -> torch.optim.Optimizer:
        low = [each.weight for each in model.layers.modules() if isinstance(each, nn.Linear)]
        rest = [each for each in model.parameters() if not any(each is matrix for matrix in low)]
        options = {"rank": 3, "update_proj_gap": 3, "scale": 2.0, "proj_type": side}
        return package.GaLoreAdafactor(
            [{"params": low, **options}, {"params": rest}], lr=1e-2, relative_step=False, scale_parameter=False
        )

    ours = train(GaLore(1e-2, rank=3, interval=3, projection=side, base="adafactor"), 8)
    assert furthest(ours, train(AdamMini(), 8, optimizer=theirs)) < 1e-3


def test_adam_mini_is_that_of_its_package_where_heads_are_as_it_thinks() -> None:
    package = pytest.importorskip("adam_mini")

    def theirs(model: Toy) -> torch.optim.Optimizer:
        named = (
            (name.replace("up_proj", "mlp").replace("down_proj", "mlp"), each)
            for name, each in model.named_parameters()
        )
        return package.Adam_mini(named, lr=1e-2, weight_decay=0.1, dim=WIDTH, n_heads=WIDTH // HEAD, verbose=False)

    ours = train(AdamMini(1e-2, weight_decay=0.1), 8)
    assert furthest(ours, train(AdamMini(), 8, optimizer=theirs)) < 1e-4
