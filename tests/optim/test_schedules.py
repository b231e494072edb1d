"""Schedules by numbers worked out by hand, and what a resume makes of them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lf_lightning import AdamW, InputError, LoRAPlus, Muon, ScheduleSpec
from lf_lightning.optim import group_options, restate
from tests.optim.toy import build, toy


def rates(spec: ScheduleSpec, num_steps: int) -> list[float]:
    """The rate of each step, and the one after the last."""
    optimizer = build(AdamW(lr=8.0), toy())
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
        ({"kind": "linear", "min_ratio": 0.5}, [8, 7, 6, 5, 4]),
        ({"kind": "linear", "warmup_steps": 4}, [0, 2, 4, 6, 8]),
        ({"kind": "linear", "warmup_steps": 8}, [0, 1, 2, 3, 4]),
        ({"kind": "cosine"}, [8, 4 + 2 * math.sqrt(2), 4, 4 - 2 * math.sqrt(2), 0]),
        ({"kind": "cosine", "warmup_steps": 2}, [0, 4, 8, 4, 0]),
        ({"kind": "cosine", "warmup_steps": 2, "min_ratio": 0.25}, [0, 4, 8, 5, 2]),
        ({"kind": "polynomial"}, [8, 4.5, 2, 0.5, 0]),
        ({"kind": "polynomial", "power": 3.0}, [8, 27 / 8, 1, 1 / 8, 0]),
        ({"kind": "polynomial", "power": 1.0, "warmup_steps": 2, "min_ratio": 0.5}, [0, 4, 8, 6, 4]),
        ({"kind": "inverse_sqrt", "timescale": 1}, [8, 8 / math.sqrt(2), 8 / math.sqrt(3), 4, 8 / math.sqrt(5)]),
        ({"kind": "inverse_sqrt", "warmup_steps": 1}, [0, 8, 8 / math.sqrt(2), 8 / math.sqrt(3), 4]),
        ({"kind": "inverse_sqrt", "warmup_steps": 2, "timescale": 3}, [0, 4, 8, 4 * math.sqrt(3), 8 * math.sqrt(0.6)]),
        ({"kind": "warmup_stable_decay"}, [8, 8, 6, 2, 0]),  # a third of 4 is one step; cosine over the other three
        ({"kind": "warmup_stable_decay", "stable_ratio": 0.5}, [8, 8, 8, 4, 0]),
        ({"kind": "warmup_stable_decay", "stable_ratio": 1.0}, [8, 8, 8, 8, 0]),
        ({"kind": "warmup_stable_decay", "stable_ratio": 0.0, "warmup_steps": 2}, [0, 4, 8, 4, 0]),
        ({"kind": "warmup_stable_decay", "stable_ratio": 0.5, "min_ratio": 0.5}, [8, 8, 8, 6, 4]),
        ({"kind": "warmup_stable_decay", "warmup_steps": 8}, [0, 1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_the_rate_of_each_of_four_steps(options: dict[str, Any], want: list[float]) -> None:
    spec = ScheduleSpec(**options)
    assert rates(spec, 4) == pytest.approx(want, abs=1e-9)
    assert spec.rates(8.0, 4) == pytest.approx(want[:4], abs=1e-9), "without a run"


def test_warmup_stable_decay_splits_as_llamafactory_does() -> None:
    # T = 100, W = 10: R = 90, stable floor(R / 3) = 30, decay 60
    found = ScheduleSpec(kind="warmup_stable_decay", warmup_steps=10).rates(1.0, 100)
    assert found[9] < 1.0
    assert found[10:40] == [1.0] * 30
    assert found[41] < 1.0
    assert found[70] == pytest.approx(0.5)


def test_every_group_follows_in_its_own_measure() -> None:
    for spec, want in ((LoRAPlus(1.0), [1.0, 16.0, 1e-6]), (Muon(1.0, adamw_lr=0.5), [1.0, 0.5])):
        assert list(spec.peak_rates.values()) == want
    optimizer = build(Muon(8.0, adamw_lr=4.0), toy())
    schedule = ScheduleSpec(kind="polynomial", min_ratio=0.5, power=1.0).build(optimizer, 2)
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([6.0, 3.0, 3.0])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "polynomial", "inverse_sqrt", "warmup_stable_decay"])
def test_a_run_without_steps_can_be_scheduled(kind: Any) -> None:
    ScheduleSpec(kind=kind).build(build(AdamW(), toy()), 0)


def test_a_run_without_an_end_cannot() -> None:
    with pytest.raises(InputError, match=r"trainer\.max_steps: must say where the run ends, got no end"):
        ScheduleSpec().build(build(AdamW(), toy()), math.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_ratio": 1.0}, r"warmup_ratio: must be in \[0, 1\), got 1\.0"),
        ({"warmup_ratio": -0.1}, r"warmup_ratio: must be in \[0, 1\), got -0\.1"),
        ({"warmup_steps": -1}, "warmup_steps: must be 0 or more, got -1"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "exclude each other"),
        ({"min_ratio": 1.0}, r"min_ratio: must be in \[0, 1\), got 1\.0"),
        ({"kind": "constant", "min_ratio": 0.1}, r"min_ratio: must be left out unless kind is linear or cosine or"),
        ({"power": 2.0}, r"power: must be left out unless kind is polynomial, got 2\.0 with kind: linear"),
        ({"kind": "polynomial", "power": 0.0}, "power: must be positive or null"),
        ({"timescale": 5}, "timescale: must be left out unless kind is inverse_sqrt"),
        ({"kind": "inverse_sqrt", "timescale": 0}, "timescale: must be positive or null"),
        ({"stable_ratio": 0.0}, "stable_ratio: must be left out unless kind is warmup_stable_decay"),
        ({"kind": "warmup_stable_decay", "stable_ratio": 1.5}, r"stable_ratio: must be in \[0, 1\] or null"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=rf"model\.init_args\.schedule.*{message}"):
        ScheduleSpec(**options)


def test_restored_options_give_way_to_configured_ones_and_the_place_in_the_run_stays() -> None:
    old = build(AdamW(lr=8.0, betas=(0.9, 0.999)), toy())
    old_schedule = ScheduleSpec(kind="linear").build(old, 4)
    for _ in range(3):
        old.step()
        old_schedule.step()
    new = build(AdamW(lr=1.0, betas=(0.5, 0.6), weight_decay=0.25), toy())
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
