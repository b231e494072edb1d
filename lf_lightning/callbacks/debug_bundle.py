"""What one needs to look into an error: where training was, on which rows, with which configuration."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.callbacks.secrets import without_secrets
from lf_lightning.console import say
from lf_lightning.types import InputError, StepBatch, UnitId


class DebugBundle(Callback):
    """Write debug/step-<n>/ when an error ends training: configuration, last metrics, traceback, rows of the step.

    The error itself comes out as it is, with a note that names the folder. Each rank that fails writes its own
    traceback and rows. Signals and input that is refused before the first step leave none.
    """

    def __init__(self) -> None:
        self._is_training = False
        self._step: int | None = None
        self._rows: Callable[[], tuple[UnitId, ...]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on an error is one of training."""
        self._is_training, self._step, self._rows = True, None, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the step is made of."""
        self._step, self._rows = trainer.global_step + 1, _names(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is made."""
        self._step, self._rows = trainer.global_step + 1, None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remember what is validated."""
        self._rows = _names(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It is validated."""
        self._rows = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on an error is none of training."""
        self._is_training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the bundle; whatever goes wrong with it, the error that ended training stays the one that is told."""
        is_refused = isinstance(exception, InputError) and self._step is None
        if not self._is_training or not isinstance(exception, Exception) or is_refused:
            return
        self._is_training = False
        step = trainer.global_step + 1 if self._step is None else self._step
        folder = run_folder(trainer) / "debug" / f"step-{step:08d}"
        try:
            self._write(folder, trainer, exception)
        except (OSError, ValueError, TypeError, RuntimeError) as problem:  # a full disk, a device that is lost ...
            say(f"{folder}: cannot be written ({problem})")
        else:
            exception.add_note(f"What it was doing is in {folder}.")

    def _write(self, folder: Path, trainer: Trainer, exception: Exception) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        of_rank = f".rank-{trainer.global_rank}" if trainer.world_size > 1 else ""
        text = "".join(traceback.format_exception(exception))
        (folder / f"traceback{of_rank}.txt").write_text(without_secrets(text), encoding="utf-8")
        config = run_folder(trainer) / "config.yaml"
        if config.is_file():
            (folder / "config.yaml").write_text(config.read_text(encoding="utf-8"), encoding="utf-8")
        metrics = {name: _plain(float(value)) for name, value in sorted(trainer.callback_metrics.items())}
        _write_json(folder / "metrics.json", metrics)
        _write_json(folder / f"rows{of_rank}.json", [row._asdict() for row in self._rows_in_hand(trainer)])

    def _rows_in_hand(self, trainer: Trainer) -> tuple[UnitId, ...]:
        """The rows of this rank's batch; between two steps those of the rollout that is being made."""
        if self._rows is not None:
            return self._rows()
        # loaders of the user's own have no such method
        asked: Callable[[], tuple[UnitId, ...]] = getattr(vars(trainer)["datamodule"], "rows_asked", tuple)
        return asked()


def _names(batch: Any) -> Callable[[], tuple[UnitId, ...]]:
    return batch.rows if isinstance(batch, StepBatch) else tuple


def _plain(value: float) -> float | str:
    """JSON knows no infinity and no NaN: a word says them."""
    return value if abs(value) < float("inf") else str(value)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
