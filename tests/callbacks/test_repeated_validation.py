"""A checkpoint is written before its step is validated: a run that goes on from it validates that step first."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lf_lightning import RunCheckpoint
from tests.callbacks.python_run import fit
from tests.cli.runs import log_rows, losses, weights

OPTIONS: dict[str, Any] = {"val_size": 3, "val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 7}
STATE = "trainer_state/state.ckpt"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven steps, with checkpoints and validations at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("straight")
    fit(folder, RunCheckpoint(every_n_steps=2), **OPTIONS)
    return folder / "run"


def resumed(straight: Path, folder: Path, step: int, *, num_lines: int) -> Path:
    """The same run, cut off at a step with so many lines of its log written, and continued."""
    run = folder / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "final")
    for checkpoint in (run / "checkpoints").iterdir():
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    for name, head in (("trainer_log.jsonl", 0), ("metrics.csv", 1)):
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(lines[: head + num_lines]))
    checkpoint = run / "checkpoints" / f"step-{step:08d}" / STATE
    fit(folder, RunCheckpoint(every_n_steps=2), ckpt_path=checkpoint, **OPTIONS)
    return run


def told(run: Path) -> list[dict[str, Any]]:
    clocks = ("elapsed_time", "remaining_time", "throughput")
    return [{name: value for name, value in row.items() if name not in clocks} for row in log_rows(run)]


@pytest.mark.parametrize(
    ("step", "num_lines"),
    [(2, 2), (2, 3), (2, 5), (4, 5), (4, 6), (6, 8)],
    ids=["in it", "after it", "a step later", "in the second", "after the second", "in the last"],
)
def test_a_run_that_stopped_in_or_after_a_validation_logs_it_once(
    step: int, num_lines: int, straight: Path, tmp_path: Path
):
    run = resumed(straight, tmp_path, step, num_lines=num_lines)
    assert [row["current_steps"] for row in told(straight) if "eval_loss" in row] == [2, 4, 6]
    assert told(run) == told(straight)
    assert weights(run / "final") == weights(straight / "final")
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "2", "3", "4", "4", "5", "6", "6", "7"]


def test_a_checkpoint_says_whether_its_step_is_still_to_be_validated(straight: Path, tmp_path: Path):
    fit(tmp_path, RunCheckpoint(every_n_steps=3), **OPTIONS)
    found = {}
    for run in (straight, tmp_path / "run"):
        for path in sorted((run / "checkpoints").iterdir()):
            state = torch.load(path / STATE, weights_only=True)
            found[int(path.name.split("-")[1])] = state["callbacks"]["RunCheckpoint"]["is_validation_due"]
    assert found == {2: True, 4: True, 6: True, 3: False}


def test_a_resume_from_a_checkpoint_without_validation_runs_none(tmp_path: Path):
    (tmp_path / "one").mkdir()
    fit(tmp_path / "one", RunCheckpoint(every_n_steps=3), **OPTIONS)
    logged = told(tmp_path / "one" / "run")
    run = tmp_path / "one" / "run"
    fit(
        tmp_path / "one", RunCheckpoint(every_n_steps=3), ckpt_path=run / "checkpoints/step-00000003" / STATE, **OPTIONS
    )
    assert told(run) == logged


def test_a_callback_that_counts_validations_has_seen_all_of_them(tmp_path: Path):
    def stops() -> EarlyStopping:
        return EarlyStopping("val/loss", patience=1, mode="max")  # the loss falls: it stops at the second

    (tmp_path / "one").mkdir()
    trainer = fit(tmp_path / "one", stops(), RunCheckpoint(every_n_steps=2), **OPTIONS)
    assert trainer.global_step == 4
    run = tmp_path / "one" / "run"
    shutil.rmtree(run / "checkpoints/step-00000004")
    again = stops()
    trainer = fit(
        tmp_path / "one",
        again,
        RunCheckpoint(every_n_steps=2),
        ckpt_path=run / "checkpoints/step-00000002" / STATE,
        **OPTIONS,
    )
    assert trainer.global_step == 4
    assert again.wait_count == 1
    assert losses(run) == losses(run)[:4]


@pytest.mark.parametrize("num_lines", [8, 9], ids=["in it", "after it"])
def test_the_validation_of_the_very_last_step_is_made_up_for_and_reported(num_lines: int, tmp_path: Path):
    options = {**OPTIONS, "max_steps": 6}
    (tmp_path / "one").mkdir()
    fit(tmp_path / "one", RunCheckpoint(every_n_steps=2), **options)
    straight = tmp_path / "one" / "run"
    run = tmp_path / "two" / "run"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "final")
    (run / "all_results.json").unlink()
    lines = (run / "trainer_log.jsonl").read_text().splitlines(keepends=True)
    (run / "trainer_log.jsonl").write_text("".join(lines[:num_lines]))
    checkpoint = run / "checkpoints" / "step-00000006" / STATE
    trainer = fit(tmp_path / "two", RunCheckpoint(every_n_steps=2), ckpt_path=checkpoint, **options)
    assert trainer.global_step == 6
    assert told(run) == told(straight)
    results = [json.loads((each / "all_results.json").read_text()) for each in (run, straight)]
    assert results[0] == results[1]
    assert {"train_loss", "train_grad_norm", "train_learning_rate", "eval_loss", "steps"} <= results[0].keys()
    tables = [table_of(each / "final" / "README.md") for each in (run, straight)]
    assert tables[0] == tables[1]
    assert any(line.startswith("| val/loss |") for line in tables[0])


def table_of(card: Path) -> list[str]:
    """The last values in a model card."""
    return [line for line in card.read_text().splitlines() if line.startswith("|")]
