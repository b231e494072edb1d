"""Where a run is at this moment, as seen from outside: for kills that are to hit a certain phase."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.stages.rollout import RolloutStage

MARKS = "phases.txt"
PHASES = ("step", "save", "validation", "rollout")
"""Where a kill can hit a run that is under way; before and after its steps it is in `start` or `end`."""


class MarkPhases(Callback):
    """Write into the run folder, line by line, which phase begins. It only looks, and the first rank alone writes.

    A save is not marked: it is seen by the hidden folder that it fills.
    """

    _handle: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step, or the rollout before it, begins."""
        if trainer.is_global_zero:
            self._handle = os.open(run_folder(trainer) / MARKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._mark_next(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins; there is nothing to roll out any more."""
        self._mark(Moment("step", trainer.global_step + 1))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next step, or the rollout before it, begins; saves and validations announce themselves."""
        self._mark_next(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation begins."""
        self._mark(Moment("validation", trainer.global_step))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation is over."""
        self._mark_next(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All steps are made."""
        self._mark(Moment("end", trainer.global_step))

    def _mark_next(self, trainer: Trainer, stage: LightningModule) -> None:
        rolls_out = isinstance(stage, RolloutStage) and not stage.data.rollout_in_progress
        self._mark(Moment("rollout" if rolls_out else "step", trainer.global_step + 1))

    def _mark(self, moment: Moment) -> None:
        if self._handle is not None:  # one write a line: a kill leaves it whole or absent
            os.write(self._handle, f"{moment.phase} {moment.step}\n".encode())


class Moment(NamedTuple):
    """Where a run is."""

    phase: str  # one of PHASES, start or end
    step: int  # the step that is being made, or that is saved or validated; 0 at the start


def moment_of(run: Path) -> Moment:
    """Where the run in a folder is, or was when it was killed.

    Without marks it has not begun: a hidden folder is then what an earlier kill has left.
    """
    if not (run / MARKS).is_file():
        return Moment("start", 0)
    for hidden in (*(run / "checkpoints").glob(".step-*.tmp"), *run.glob(".final.tmp")):
        name = hidden.name.removesuffix(".tmp")
        return Moment("save", int(name.rpartition("-")[2]) if "step-" in name else last_mark(run).step)
    return last_mark(run)


def begun_at(run: Path) -> int | None:
    """The step that the last process of a run had behind it when it began to train; None where it never did."""
    path = run / MARKS
    lines = path.read_text().splitlines() if path.is_file() else []
    return int(lines[0].split()[1]) - 1 if lines else None


def last_mark(run: Path) -> Moment:
    """The last line that `MarkPhases` wrote."""
    path = run / MARKS
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        return Moment("start", 0)
    phase, step = lines[-1].split()
    return Moment(phase, int(step))
