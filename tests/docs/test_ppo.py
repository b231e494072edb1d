"""The page of ppo and grpo names what the code has."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from lf_lightning import GRPO, PPO, GRPOConstants, PPOConstants, Reward
from lf_lightning.models import Reward as Base
from tests.cli.runs import log_rows
from tests.stages.rollout_runs import LENGTH, SPREAD, fit


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "ppo.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [PPOConstants, GRPOConstants])
def test_every_constant_is_explained(kind: Any, page: str):
    assert [each.name for each in dataclasses.fields(kind) if f"`{each.name}" not in page] == []


def test_every_reward_is_explained(page: str):
    ours = {kind.__name__ for kind in Base.__subclasses__() if kind.__module__.startswith("lf_lightning.")}
    assert set(re.findall(r"(?m)^\| `(Reward[A-Z]\w+)` \|", page)) == ours
    assert Reward is Base


@pytest.mark.parametrize("stage", ["PPO", "GRPO"])
def test_every_name_that_a_run_logs_is_explained(
    stage: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    changes: dict[str, Any] = {"model.init_args.rewards": [SPREAD, LENGTH], "constants": {"entropy_coef": 0.01}}
    run = fit(tmp_path, stage, data__val_size=3, trainer__val_check_interval=4, **changes)
    of_any_run = {"current_steps", "total_steps", "epoch", "percentage", "elapsed_time", "remaining_time", "lr"}
    of_any_run |= {"throughput", "total_tokens", "grad_norm", "skipped_steps", "loss"}
    logged = {name for row in log_rows(run) for name in row} - of_any_run
    plain = {name for name in logged if not re.match(r"(eval_)?rewards/", name)}
    assert len(logged - plain) >= 4
    assert sorted(name for name in plain if f"`{name}`" not in page) == []


def test_the_metrics_of_the_page_are_those_of_the_stages(page: str):
    for kind in (PPO, GRPO):
        assert [name for name in kind.metrics if f"`{name}`" not in page] == []


def test_the_notebook_is_linked(page: str, root: Path):
    (path,) = re.findall(r"\.\./(notebooks/[^)]*)", page)
    assert (root / path).is_file()
