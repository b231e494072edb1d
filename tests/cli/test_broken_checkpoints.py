"""A checkpoint that is not as it was saved: `last` takes the one before it and says why, a named one is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cli.runs import ROWS, config, lightning, losses, steps, weights, write

NEWEST = "checkpoints/step-00000004"


@pytest.fixture
def run(here: Path, full_run: Path) -> Path:
    """A copy of the finished run, with checkpoints after the second and the fourth step."""
    (here / "rows.json").write_text(json.dumps(ROWS))
    shutil.copytree(full_run, here / "run")
    return here / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "got one without manifest.json"),
    "half a manifest": (lambda folder: cut(folder / "manifest.json"), "must list names, sizes and hashes"),
    "an empty manifest": (lambda folder: (folder / "manifest.json").write_text(""), "must list names, sizes"),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors: must have "),
    "a turned bit": (lambda folder: turn_a_bit(folder / "model.safetensors"), "got other bytes"),
    "no state": (lambda folder: (folder / "trainer_state/state.ckpt").unlink(), "state.ckpt: must have "),
    "half a state": (lambda folder: cut(folder / "trainer_state/state.ckpt"), "state.ckpt: must have "),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: must have "),
}


@pytest.mark.parametrize("harm", BROKEN)
def test_last_skips_it_says_why_and_ends_with_the_same_weights(
    harm: str, run: Path, here: Path, full_run: Path, capsys: pytest.CaptureFixture[str]
):
    act, why = BROKEN[harm]
    act(run / NEWEST)
    assert lightning("fit", here, config("run"), "--ckpt_path", "last") == 0
    told = capsys.readouterr().err
    (line,) = (line for line in told.splitlines() if line.startswith("skipped run/checkpoints/step-00000004"))
    assert why in line
    assert "continuing at step 2 from run/checkpoints/step-00000002" in told
    assert weights(run / "final") == weights(full_run / "final")
    assert losses(run) == losses(full_run)


@pytest.mark.parametrize("harm", BROKEN)
def test_a_named_one_is_refused_in_one_line(harm: str, run: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    BROKEN[harm][0](run / NEWEST)
    assert lightning("fit", here, config("run"), "--ckpt_path", f"run/{NEWEST}") == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith(("lf-lightning: error: run/", "lf-lightning: error: --ckpt_path: "))


def test_where_none_is_whole_nothing_begins_and_nothing_is_lost(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
):
    for folder in ("checkpoints/step-00000002", NEWEST):
        cut(run / folder / "model.safetensors")
    assert lightning("fit", here, config("run"), "--ckpt_path", "last") == 2
    told = capsys.readouterr().err
    assert told.count("skipped run/checkpoints/step-") == 2
    assert "must be a new run folder, got one with 2 complete checkpoints" in told
    assert (run / NEWEST / "model.safetensors").is_file()


def test_a_checkpoint_of_another_stage_is_refused_by_name(run: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "texts.json").write_text(json.dumps([{"text": row["output"]} for row in ROWS]))
    source = {"path": "texts.json", "formatting": "text", "columns": {"text": "text"}}
    other = config("other", model__class_path="PT", data__datasets=[source])
    assert lightning("fit", here, other, "--ckpt_path", f"run/{NEWEST}") == 2
    assert "model.class_path: must be SFT, the stage of this checkpoint, got PT" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data__seed": 8}, "data.seed: must be the same as in the checkpoint, 7, got 8"),
        ({"data__global_batch_size": 3}, "data.global_batch_size: must be the same as in the checkpoint, 4, got 3"),
        ({"data__template": "alpaca"}, "data.template: must be the same as in the checkpoint, auto, got alpaca"),
        ({"data__max_samples": 8}, "data.max_samples: must be the same as in the checkpoint, null, got 8"),
        (
            {"data__train_on_prompt": True},
            "data.train_on_prompt: must be the same as in the checkpoint, false, got true",
        ),
        ({}, "data.datasets: must give the rows of the checkpoint, in the same tokens, got others"),
    ],
)
def test_other_data_than_the_checkpoints_is_refused_and_may_be_accepted(
    changes: dict[str, object], line: str, run: Path, here: Path, capsys: pytest.CaptureFixture[str]
):
    if not changes:
        (here / "rows.json").write_text(json.dumps([*ROWS[:-1], {**ROWS[-1], "output": "x"}]))
    longer = config("run", trainer__max_steps=5, **changes)
    assert lightning("fit", here, longer, "--ckpt_path", "last") == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith(f"lf-lightning: error: {line}")
    assert told.splitlines()[-1].endswith("or set data.accept_changes: true.")
    assert lightning("fit", here, longer, "--ckpt_path", "last", "--data.accept_changes", "true") == 0
    assert f"accepted: {line}" in capsys.readouterr().err
    state = torch.load(run / "checkpoints/step-00000004/trainer_state/state.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert len(losses(run)) == 5


FULL_DISK = """
import resource
from lightning.pytorch import Callback


class FullDisk(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4 and trainer.is_global_zero:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
"""


def test_where_one_rank_cannot_write_both_stop_with_its_line(here: Path, root: Path):
    (here / "full_disk.py").write_text(FULL_DISK)
    changes = {"trainer__devices": 2, "trainer__strategy": "ddp", "trainer__max_steps": 6}
    settings = config("run", trainer__callbacks=[{"class_path": "full_disk.FullDisk"}], **changes)
    command = [sys.executable, "-m", "lf_lightning", "fit", "--config", write(here, settings)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, env=environment, timeout=400, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    want = "lf-lightning: error: run/checkpoints/step-00000004: cannot be saved, got "
    told = done.stderr.count(want)  # Lightning may end a rank before it has said so too
    assert told in (1, 2), done.stderr[-1500:]
    assert done.stderr.count("The last good checkpoint is run/checkpoints/step-00000002") == told
    assert steps(here / "run") == ["step-00000002"]


def test_an_epoch_may_be_the_interval(here: Path):
    by_epoch = {"checkpoint__every_n_steps": None, "checkpoint__every_n_epochs": 2}
    assert lightning("fit", here, config("run", trainer__max_steps=8, **by_epoch)) == 0  # three steps an epoch
    assert steps(here / "run") == ["step-00000006"]
