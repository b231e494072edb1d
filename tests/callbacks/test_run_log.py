"""The log of a run, and how it is taken back to a checkpoint."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lf_lightning.callbacks.plots import plot_curve, smoothed
from lf_lightning.callbacks.run_log import cut_logs, read_log
from tests.callbacks.python_run import fit
from tests.cli.runs import log_rows


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    rows = [{"current_steps": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    rows.insert(2, {"current_steps": 2, "eval_loss": 0.75})
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "trainer_log.jsonl").write_text("\n".join(lines) + '\n{"current_steps": 4, "lo')
    (tmp_path / "metrics.csv").write_text(
        "step,epoch,train/loss,val/loss\n1,0.5,1.0,\n2,1.0,0.5,\n2,1.0,,0.75\n3,1.5,0.3\n4,2"
    )
    return tmp_path


def test_a_torn_line_is_no_row(logs: Path):
    assert [row["current_steps"] for row in read_log(logs)] == [1, 2, 2, 3]


@pytest.mark.parametrize(("step", "kept"), [(0, []), (1, [1]), (2, [1, 2, 2]), (9, [1, 2, 2, 3])])
def test_what_came_after_a_step_is_taken_back(step: int, kept: list[int], logs: Path):
    cut_logs(logs, step)
    lines = (logs / "trainer_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["current_steps"] for line in lines] == kept


def test_the_csv_is_taken_back_too_and_keeps_its_columns(logs: Path):
    cut_logs(logs, 2)
    assert (logs / "metrics.csv").read_text().splitlines() == [
        "step,epoch,train/loss,val/loss",
        "1,0.5,1.0,",
        "2,1.0,0.5,",
        "2,1.0,,0.75",
    ]


def test_without_logs_there_is_nothing_to_take_back(tmp_path: Path):
    cut_logs(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []
    assert read_log(tmp_path) == []


def test_a_column_that_appears_later_keeps_the_rows_before_it(tmp_path: Path):
    fit(tmp_path, val_size=2, max_steps=4)  # validation at the end of the first epoch, after step 3
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 3, 4]
    assert [bool(row["train/loss"]) for row in rows] == [True, True, True, False, True]
    assert [bool(row["val/loss"]) for row in rows] == [False, False, False, True, False]
    evaluated = [row for row in log_rows(tmp_path / "run") if "eval_loss" in row]
    assert [float(row["val/loss"]) for row in rows if row["val/loss"]] == [row["eval_loss"] for row in evaluated]
    assert evaluated[0].keys() >= {"current_steps", "total_steps", "eval_loss", "eval_perplexity", "eval_accuracy"}


def test_smoothing_is_llamafactorys():
    # w = 1.8 (1 / (1 + exp(-0.1)) - 0.5) = 0.0449625 for two points
    assert smoothed((1.0, 2.0)) == pytest.approx([1.0, 1.9550375], abs=1e-7)
    assert smoothed((3.0,)) == [3.0]
    assert smoothed((5.0,) * 40) == pytest.approx([5.0] * 40)


def test_more_points_are_smoothed_more():
    zigzag = [1.0, 2.0] * 50
    assert max(smoothed(tuple(zigzag))[50:]) - min(smoothed(tuple(zigzag))[50:]) < 0.1
    assert max(smoothed((1.0, 2.0, 1.0, 2.0))) > 1.8


def test_a_curve_needs_two_points(tmp_path: Path):
    rows = [
        {"current_steps": 1, "loss": 1.0},
        {"current_steps": 2, "eval_loss": 0.5},
        {"current_steps": 2, "loss": 0.5},
    ]
    (tmp_path / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_curve(tmp_path, "eval_loss") is None
    path = plot_curve(tmp_path, "loss")
    assert path == tmp_path / "training_loss.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.glob("*.png")] == ["training_loss.png"]
