"""Signals from plain Python: what they save, what they raise, and what stays as it was."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lf_lightning import RunCheckpoint
from lf_lightning.callbacks import Interrupted, last_checkpoint
from tests.callbacks.python_run import fit
from tests.cli.runs import log_rows, losses, steps, weights


class Sends(Callback):
    """Raise signals in a hook of a step.

    Args:
        hook: Where.
        step: Optimizer steps made before.
        numbers: What is sent.
    """

    def __init__(self, hook: str, step: int, *numbers: signal.Signals) -> None:
        self.step, self.numbers = step, numbers
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            for number in self.numbers:
                signal.raise_signal(number)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Handlers of this process, which a run must leave as they were."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    after = {number: signal.getsignal(number) for number in signal.valid_signals()}
    for number, handler in before.items():
        if after[number] is not handler and handler is not None:
            signal.signal(number, handler)
    assert after == before


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a signal."""
    folder = tmp_path_factory.mktemp("straight")
    fit(folder, val_size=3, val_check_interval=2, check_val_every_n_epoch=None)
    return folder / "run"


def interrupted(folder: Path, *callbacks: Callback, **options: Any) -> int:
    """The code with which a run leaves."""
    with pytest.raises(Interrupted) as raised:
        fit(folder, *callbacks, **{"val_size": 3, "val_check_interval": 2, "check_val_every_n_epoch": None, **options})
    assert not (folder / "run" / "final").exists()
    return raised.value.code


CASES = [
    ("on_train_batch_start", 0, 1),
    ("on_train_batch_start", 1, 2),  # a validation follows
    ("on_train_batch_end", 3, 3),
    ("on_validation_batch_start", 2, 2),
]


def told(run: Path) -> list[tuple[int, float | None, float | None]]:
    """Steps, losses and losses of validations of the log, in its order."""
    return [(row["current_steps"], row.get("loss"), row.get("eval_loss")) for row in log_rows(run)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
@pytest.mark.parametrize(
    ("hook", "step", "saved"), CASES, ids=["first step", "second step", "third step", "validation"]
)
def test_a_resume_after_a_signal_reaches_the_weights_of_a_run_without_one(
    hook: str, step: int, saved: int, number: signal.Signals, code: int, tmp_path: Path, straight: Path
):
    checkpoints = RunCheckpoint(every_n_steps=None)
    assert interrupted(tmp_path, Sends(hook, step, number), checkpoints) == code
    assert steps(tmp_path / "run") == [f"step-{saved:08d}"]
    assert losses(tmp_path / "run") == losses(straight)[:saved]
    again = {"val_size": 3, "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit(tmp_path, ckpt_path=last_checkpoint(tmp_path / "run"), **again)
    assert weights(tmp_path / "run" / "final") == weights(straight / "final")
    assert told(tmp_path / "run") == told(straight)


def test_a_checkpoint_that_the_step_has_already_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    written, save = [], RunCheckpoint.save
    monkeypatch.setattr(RunCheckpoint, "save", lambda *given: written.append(given[1].global_step) or save(*given))
    assert interrupted(tmp_path, Sends("on_validation_batch_start", 2, signal.SIGTERM)) == 143
    assert written == [2]
    run = tmp_path / "run"
    assert (
        f"interrupted after step 2: saved {run / 'checkpoints' / 'step-00000002'}, continue with --ckpt_path last"
        in capsys.readouterr().err.splitlines()
    )


def test_a_second_ctrl_c_saves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    sends = Sends("on_train_batch_start", 1, signal.SIGINT, signal.SIGINT)
    assert interrupted(tmp_path, sends, RunCheckpoint(every_n_steps=None)) == 130
    assert steps(tmp_path / "run") == []
    assert "SIGINT: finishing the step, then saving; Ctrl-C stops at once" in capfd.readouterr().err


def test_a_second_sigterm_changes_nothing(tmp_path: Path):
    sends = Sends("on_train_batch_start", 1, signal.SIGTERM, signal.SIGTERM)
    assert interrupted(tmp_path, sends, RunCheckpoint(every_n_steps=None)) == 143
    assert steps(tmp_path / "run") == ["step-00000002"]


def test_a_signal_while_the_final_folder_is_written_lets_the_run_finish(tmp_path: Path):
    fit(tmp_path, Sends("on_train_end", 4, signal.SIGTERM))
    assert (tmp_path / "run" / "final" / "manifest.json").is_file()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fit(tmp_path, Sends("on_train_batch_start", 1, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "run" / "final").is_dir()


def test_the_loggers_get_the_step_that_a_signal_ends(tmp_path: Path):
    logger = CSVLogger(tmp_path, name="log", version="0")
    assert interrupted(tmp_path, Sends("on_train_batch_start", 2, signal.SIGTERM), logger=logger) == 143
    with (tmp_path / "log" / "0" / "metrics.csv").open(newline="") as table:
        assert [row["step"] for row in csv.DictReader(table) if row["train/loss"]] == ["0", "1", "2"]


def test_without_a_checkpoint_callback_the_line_says_that_nothing_was_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lf_lightning.callbacks.signals.RunCheckpoint", type("Absent", (), {}))
    sends = Sends("on_train_batch_start", 1, signal.SIGTERM)
    assert interrupted(tmp_path, sends, RunCheckpoint(every_n_steps=None)) == 143
    assert "interrupted after step 2: nothing saved, the trainer has no RunCheckpoint" in capsys.readouterr().err


RANKS = """
import os, subprocess, sys, time
from lf_lightning.callbacks.signals import one_end
if os.environ.get("LOCAL_RANK"):
    print(os.getpid(), flush=True)
with one_end():
    if not os.environ.get("LOCAL_RANK"):
        subprocess.Popen([sys.executable, __file__], env={**os.environ, "LOCAL_RANK": "1"})
    time.sleep(600)
"""


def test_a_rank_that_waits_for_others_ends_with_the_process_that_started_it(tmp_path: Path, root: Path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment) as first:
        assert first.stdout is not None
        other = int(first.stdout.readline())
        first.kill()
        first.wait()
        deadline = time.monotonic() + 60
        while is_alive(other):
            assert time.monotonic() < deadline, "the second rank lives on"
            time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs on; one that has ended may stay in the table until its parent looks."""
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()
