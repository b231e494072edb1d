"""`lf-lightning fit` on a stream: a resume is the run that never stopped; what cannot be is one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml

from lf_lightning.__main__ import main
from tests.cli.runs import INIT, ROWS, config, lightning, losses, steps, weights, write
from tests.data.streams import write_rows
from tests.stages.judgement_runs import judged

STREAM: dict[str, Any] = {"data__streaming": True, "data__buffer_size": 6}


def streamed(folder: Path, run: str, **changes: Any) -> dict[str, Any]:
    """Twelve rows in two files as a stream, three of which validate."""
    (folder / "rows").mkdir(exist_ok=True)
    write_rows(folder / "rows" / "a.jsonl", ROWS[:5])
    write_rows(folder / "rows" / "b.jsonl", ROWS[5:])
    given = {"data__datasets": [{"path": str(folder / "rows")}], "data__val_size": 3, **STREAM}
    return config(folder / run, **{**given, **changes})


def fit(folder: Path, settings: dict[str, Any], *arguments: str) -> int:
    with patch("lf_lightning.callbacks.plots.plot_curve"):
        return lightning("fit", folder, settings, *arguments)


PACKED = {
    "model__class_path": "PT",
    "data__packing": "blocks",
    "data__max_length": 48,
    "data__val_size": 0,
    f"{INIT}.optimizer.class_path": "AdamW",
}


def of_stage(here: Path, stage: str, run: str, **changes: Any) -> dict[str, Any]:
    if stage == "SFT":
        return streamed(here, run, **changes)
    if stage == "PT":
        write_rows(here / "texts.jsonl", [{"text": row["output"] * 3} for row in ROWS])
        datasets = [{"path": str(here / "texts.jsonl"), "formatting": "text"}]
        return config(here / run, **{**PACKED, **STREAM, "data__datasets": datasets, **changes})
    return judged(here, stage, run, **{**STREAM, **changes})


@pytest.mark.parametrize(("stage", "end"), [("SFT", 5), ("PT", 4), ("RM", 4), ("DPO", 4), ("KTO", 5)])
def test_a_resume_is_bit_identical_also_over_the_end_of_a_pass_and_with_a_later_end(here: Path, stage: str, end: int):
    """Twelve or fewer rows in steps of four: the fourth step is in the second pass; there the first run had ended."""
    assert fit(here, of_stage(here, stage, "straight", trainer__max_steps=8)) == 0
    assert fit(here, of_stage(here, stage, "run", trainer__max_steps=end)) == 0
    assert steps(here / "run")[-1] == "step-00000004"
    assert fit(here, of_stage(here, stage, "run", trainer__max_steps=8), "--ckpt_path", "last") == 0
    assert losses(here / "run") == losses(here / "straight")
    assert len(losses(here / "run")) == 8
    assert len(set(losses(here / "run"))) == 8
    assert weights(here / "run" / "final") == weights(here / "straight" / "final")


def test_a_stream_that_is_no_longer_than_the_rows_trains_as_the_rows_do(here: Path):
    """In the order of the files both are the same run, bit for bit."""
    rows = {"data__shuffle": False, "data__buffer_size": None, "data__val_size": 0, "trainer__max_steps": 3}
    assert fit(here, streamed(here, "stream", **rows)) == 0
    assert fit(here, streamed(here, "rows-run", **rows, data__streaming=False)) == 0
    assert losses(here / "stream") == losses(here / "rows-run")
    assert weights(here / "stream" / "final") == weights(here / "rows-run" / "final")


def test_the_configuration_of_a_run_starts_it_again(here: Path):
    assert fit(here, streamed(here, "run", trainer__max_steps=2)) == 0
    kept = yaml.safe_load((here / "run" / "config.yaml").read_text())
    assert kept["data"]["streaming"] is True
    with patch("lf_lightning.callbacks.plots.plot_curve"):
        assert main(["fit", "--config", str(here / "run" / "config.yaml"), "--overwrite", "true"]) == 0
    assert steps(here / "run") == ["step-00000002"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__max_steps": ...}, "trainer.max_steps: must say how long to train with data.streaming: true"),
        ({"trainer__max_epochs": 2}, "trainer.max_epochs: must be empty with data.streaming: true"),
        ({"checkpoint__every_n_epochs": 1}, "checkpoint.every_n_epochs: must be empty with data.streaming: true"),
        ({"data__max_samples": 5}, "data.max_samples: excludes data.streaming: true, got 5."),
        ({"data__mix_strategy": "interleaved"}, "data.mix_strategy: must be one of concat, interleave_under"),
        ({"data__datasets": [{"path": "rows/c.jsonl"}]}, "rows/c.jsonl does not exist"),
        ({"data__datasets": [{"path": "rows", "split": "x"}]}, "data.datasets[0]: split is read with hf_hub_url alone"),
    ],
)
def test_what_a_stream_cannot_do_is_one_line_before_a_model_is_built(
    here: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
):
    assert lightning("fit", here, streamed(here, "run", **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (here / "run" / "checkpoints").exists()


def test_precomputed_references_are_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    settings = judged(here, "DPO", **{**STREAM, f"{INIT}.reference": {"precompute": True}})
    assert lightning("fit", here, settings) == 2
    assert "model.init_args.reference.precompute: must be false with data.streaming: true" in capsys.readouterr().err


def test_a_row_that_cannot_be_used_is_one_line_in_the_midst_of_training(here: Path, capsys: pytest.CaptureFixture[str]):
    settings = streamed(here, "run", data__shuffle=False, data__buffer_size=None, trainer__max_steps=4)
    write_rows(here / "rows" / "b.jsonl", [*ROWS[5:], {"instruction": "?"}])
    assert lightning("fit", here, settings) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("lf-lightning: error: rows/b.jsonl, row 8: ")
    assert steps(here / "run") == ["step-00000002"]


def test_there_is_nothing_to_prepare_but_what_validates(here: Path, capsys: pytest.CaptureFixture[str]):
    assert lightning("prepare", here, streamed(here, "run")) == 0
    assert capsys.readouterr().err.splitlines() == [
        "rows: a stream of 2 shards",
        "train: a stream is encoded while training reads it, there is nothing to prepare",
    ]
    write_rows(here / "held.jsonl", ROWS[:2])
    held: dict[str, Any] = {"data__eval_datasets": [{"path": "held.jsonl"}], "data__val_size": 0}
    assert lightning("prepare", here, streamed(here, "run", **held, data__cache_dir="cache")) == 0
    *_, rows, folder = capsys.readouterr().err.splitlines()
    assert rows == "held: 2 rows, 2 kept, 0 cut, 0 dropped"
    assert folder.startswith("val: encoded in cache/")
    assert lightning("prepare", here, streamed(here, "run", **held)) == 2


def test_the_rows_that_validate_are_measured_and_answered_by_themselves(here: Path, capsys: pytest.CaptureFixture[str]):
    settings = streamed(here, "run", trainer__max_steps=2)
    assert fit(here, settings) == 0
    assert lightning("validate", here, settings, "--ckpt_path", "last") == 0
    assert "val/loss" in capsys.readouterr().err
    assert lightning("predict", here, settings, "--ckpt_path", "last") == 0
    assert len((here / "run" / "generated_predictions.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_bit_for_bit(here: Path, capsys: pytest.CaptureFixture[str]):
    settings = streamed(here, "run", data__micro_batch_size=1)
    arguments = ["--config", write(here, settings), "--kills", "3"]
    assert main(["verify-resume", *arguments]) == 0
    assert "equal, bit for bit, after 3 kills in 9 steps" in capsys.readouterr().out
