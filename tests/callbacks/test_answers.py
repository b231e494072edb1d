"""What a run shows of its answers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lf_lightning.callbacks import AnswersTable, PlainProgress
from lf_lightning.callbacks.predictions import gather_predictions
from lf_lightning.types import Answer
from tests.callbacks.python_run import fit


def test_answers_come_in_the_order_of_the_set():
    answers = [Answer(row, f"p{row}", "", "") for row in (2, 0, 1)]
    assert [answer.prompt for answer in gather_predictions(answers)] == ["p0", "p1", "p2"]


def test_the_table_shows_answers_before_and_after_and_counts_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(tmp_path, AnswersTable(num_rows=2, next_command="lf-lightning predict --config [x]"), val_size=5)
    text = capsys.readouterr().out
    assert "held-out prompts, before and after training" in text
    assert text.count("Count to ") == 2
    assert "<|im_start|>" not in text
    scores = re.findall(r"exact match (before|after) training: 0\.\d{3} \(\d of 5\)", text)
    assert scores == ["before", "after"]
    assert f"the model is in {tmp_path / 'run' / 'final'}" in text
    assert "next, try: lf-lightning predict --config [x]" in text


def test_answering_before_training_does_not_change_the_training(tmp_path: Path):
    from tests.cli.runs import losses, weights

    for name, callbacks in (("with", [AnswersTable()]), ("without", [])):
        (tmp_path / name).mkdir()
        fit(tmp_path / name, *callbacks, val_size=3)
    assert losses(tmp_path / "with" / "run") == losses(tmp_path / "without" / "run")
    assert weights(tmp_path / "with/run/final") == weights(tmp_path / "without/run/final")


def test_progress_is_a_line_for_each_logged_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(tmp_path, PlainProgress(), log_every_n_steps=3, val_size=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    assert re.fullmatch(r"step 3/4  loss \d\.\d{4}  [\d,]+ tokens/s", lines[0])
    assert re.fullmatch(r"step 3  val/loss \d\.\d{4}  val/perplexity \d+\.\d{4}  val/accuracy \d\.\d{4}", lines[1])
    assert re.fullmatch(r"step 4/4  loss \d\.\d{4}  [\d,]+ tokens/s", lines[2])
