"""Parameter groups, AdamW and schedules, by numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lf_lightning import AdamW, InputError, ScheduleSpec
from lf_lightning.optim import group_options, restate
from lf_lightning.optim.optimizers import decay_groups


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(5, 2))


def test_biases_and_norms_are_not_decayed() -> None:
    module = model()
    decayed, others = decay_groups(module.named_parameters(), 0.1)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(2, 3), (5, 2)]
    assert [tuple(parameter.shape) for parameter in others["params"]] == [(2,), (2,), (2,)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out() -> None:
    module = model()
    module[0].requires_grad_(False)
    module[1].requires_grad_(False)
    (group,) = decay_groups(module.named_parameters(), 0.1)
    assert [id(parameter) for parameter in group["params"]] == [id(module[2].weight)]


def test_every_option_of_adamw_reaches_the_optimizer() -> None:
    optimizer = AdamW(lr=0.3, betas=(0.5, 0.6), eps=0.7, weight_decay=0.8).build(model().named_parameters())
    options = group_options(optimizer)
    assert [(each["lr"], each["betas"], each["eps"], each["weight_decay"]) for each in options] == [
        (0.3, (0.5, 0.6), 0.7, 0.8),
        (0.3, (0.5, 0.6), 0.7, 0.0),
    ]
    assert not options[0]["fused"]
    assert group_options(AdamW(fused=True).build(model().named_parameters()))[0]["fused"]


def test_the_first_steps_are_those_of_the_paper() -> None:
    # step 1: m_hat = g, v_hat = g^2, so the move is lr * g / (|g| + eps); before it the weight shrinks by lr * decay
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    optimizer = AdamW(lr=0.1, betas=(0.9, 0.99), eps=1.0, weight_decay=0.5).build([("weight", weight)])
    weight.grad = torch.tensor([[4.0]], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.05) - 0.1 * 4 / (4 + 1), abs=1e-12)
    # step 2 with g = -1: m_hat = (0.9 * 0.4 - 0.1) / 0.19, v_hat = (0.99 * 0.16 + 0.01) / 0.0199
    weight.grad = torch.tensor([[-1.0]], dtype=torch.float64)
    optimizer.step()
    move = 0.1 * (0.26 / 0.19) / (math.sqrt(0.1684 / 0.0199) + 1)
    assert weight.item() == pytest.approx(1.82 * 0.95 - move, abs=1e-12)


@pytest.mark.parametrize("lr", [0.0, -1.0, math.nan])
def test_a_rate_that_is_not_positive_is_refused(lr: float) -> None:
    with pytest.raises(InputError, match=r"optimizer\.init_args\.lr: must be positive"):
        AdamW(lr=lr)


def rates(spec: ScheduleSpec, num_steps: int) -> list[float]:
    optimizer = AdamW(lr=8.0).build(model().named_parameters())
    schedule = spec.build(optimizer, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return [*found, optimizer.param_groups[1]["lr"]]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"kind": "constant"}, [8, 8, 8, 8, 8]),
        ({"kind": "constant", "warmup_steps": 2}, [0, 4, 8, 8, 8]),
        ({"kind": "linear"}, [8, 6, 4, 2, 0]),
        ({"kind": "linear", "warmup_steps": 2}, [0, 4, 8, 4, 0]),
        ({"kind": "linear", "warmup_ratio": 0.5}, [0, 4, 8, 4, 0]),
        ({"kind": "linear", "warmup_ratio": 0.01}, [0, 8, 16 / 3, 8 / 3, 0]),
        ({"kind": "cosine"}, [8, 4 + 2 * math.sqrt(2), 4, 4 - 2 * math.sqrt(2), 0]),
        ({"kind": "cosine", "warmup_steps": 2}, [0, 4, 8, 4, 0]),
    ],
)
def test_the_rate_of_each_of_four_steps(options: dict[str, Any], want: list[float]) -> None:
    assert rates(ScheduleSpec(**options), 4) == pytest.approx(want, abs=1e-9)


def test_a_run_without_steps_can_be_scheduled() -> None:
    for kind in ("constant", "linear", "cosine"):
        ScheduleSpec(kind=kind).build(AdamW().build(model().named_parameters()), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_ratio": 1.0}, r"warmup_ratio: must be in \[0, 1\), got 1\.0"),
        ({"warmup_ratio": -0.1}, r"warmup_ratio: must be in \[0, 1\), got -0\.1"),
        ({"warmup_steps": -1}, "warmup_steps: must be 0 or more, got -1"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "exclude each other"),
    ],
)
def test_warm_ups_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ScheduleSpec(**options)


def test_restored_options_give_way_to_configured_ones_and_the_place_in_the_run_stays() -> None:
    old = AdamW(lr=8.0, betas=(0.9, 0.999)).build(model().named_parameters())
    old_schedule = ScheduleSpec(kind="linear").build(old, 4)
    for _ in range(3):
        old.step()
        old_schedule.step()
    new = AdamW(lr=1.0, betas=(0.5, 0.6), weight_decay=0.25).build(model().named_parameters())
    new_schedule = ScheduleSpec(kind="linear").build(new, 4)
    configured = group_options(new)
    new.load_state_dict(old.state_dict())
    new_schedule.load_state_dict(old_schedule.state_dict())
    assert new.param_groups[0]["betas"] == (0.9, 0.999), "what Lightning restores, before we restate"
    restate(new, new_schedule, configured)
    assert [group["lr"] for group in new.param_groups] == [0.25, 0.25]
    assert [group["betas"] for group in new.param_groups] == [(0.5, 0.6), (0.5, 0.6)]
    assert [group["weight_decay"] for group in new.param_groups] == [0.25, 0.0]
    new.step()
    new_schedule.step()
    assert [group["lr"] for group in new.param_groups] == [0.0, 0.0]
