"""The log of a run: trainer_log.jsonl with LlamaFactory's field names, metrics.csv, all_results.json."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import advice, run_folder
from lf_lightning.console import say
from lf_lightning.types import TrainingStopped

JSONL, CSV, RESULTS, SAMPLES = "trainer_log.jsonl", "metrics.csv", "all_results.json", "samples.jsonl"
QUARANTINE = "quarantine.jsonl"
NO_METRICS = ("current_steps", "total_steps", "epoch", "percentage", "throughput", "total_tokens")
"""Numbers of a row of trainer_log.jsonl that are neither of training nor of validation."""


def log_is_due(trainer: Trainer, *, ahead: int = 0) -> bool:
    """Whether the optimizer step just made is logged: every `log_every_n_steps`-th, and the last one.

    Args:
        trainer: The trainer.
        ahead: Ask of the step that comes so many later.
    """
    step = trainer.global_step + ahead
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # a plain attribute of Trainer
    return step % max(every, 1) == 0 or step == trainer.estimated_stepping_batches


class RunLog(Callback):
    """Write one line per logging step and per validation, and the last values at the end."""

    def __init__(self) -> None:
        self._start = 0.0
        self._step_at_start = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start, self._step_at_start = time.time(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step where the stage has logged it."""
        if log_is_due(trainer) and trainer.is_global_zero:
            values = _values(trainer, "train/")
            row = {
                **self._progress(trainer),
                "loss": values.pop("loss"),
                "lr": values.pop("learning_rate"),
                "throughput": round(float(trainer.callback_metrics["tokens/s"]), 2),
                "total_tokens": _total_tokens(pl_module),
                **values,
            }
            self._write(trainer, row, {f"train/{name}": value for name, value in _values(trainer, "train/").items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the values of the set."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        values = _values(trainer, "val/")
        if trainer.state.fn == "fit":
            row = {**self._progress(trainer), **{f"eval_{name}": value for name, value in values.items()}}
            self._write(trainer, row, {f"val/{name}": value for name, value in values.items()})
        else:
            self._report(trainer, pl_module, "eval", values)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the values of the test set to all_results.json."""
        self._report(trainer, pl_module, "test", _values(trainer, "test/"))

    def _report(self, trainer: Trainer, stage: Any, kind: str, values: dict[str, float]) -> None:
        """Say and write the values of a set that was measured by itself, and of which weights they are."""
        if trainer.is_global_zero:
            weights = str(stage.weights_folder or "as the configuration gives them")
            measured = {f"{kind}_{name}": value for name, value in values.items()}
            write_results(trainer, {**measured, f"{kind}_weights": weights})
            line = "  ".join(f"{kind}_{name} {value:.4f}" for name, value in values.items())
            say(f"{line}  (in {run_folder(trainer) / RESULTS})")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last values of the run to all_results.json."""
        if trainer.is_global_zero:
            write_last_values(trainer, pl_module)

    def _progress(self, trainer: Trainer) -> dict[str, Any]:
        step, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        elapsed = time.time() - self._start
        done_here = max(step - self._step_at_start, 1)
        return {
            "current_steps": step,
            "total_steps": total,
            "epoch": round(step / max(trainer.num_training_batches, 1), 4),
            "percentage": round(100 * step / total, 2) if total else 100.0,
            "elapsed_time": str(timedelta(seconds=int(elapsed))),
            "remaining_time": str(timedelta(seconds=int(elapsed / done_here * (total - step)))),
        }

    def _write(self, trainer: Trainer, row: dict[str, Any], metrics: dict[str, float]) -> None:
        folder = run_folder(trainer)
        try:
            with (folder / JSONL).open("a") as handle:
                handle.write(json.dumps({name: _finite(value) for name, value in row.items()}, allow_nan=False) + "\n")
            _append_csv(folder / CSV, {"step": row["current_steps"], "epoch": row["epoch"], **metrics})
        except OSError as error:
            where = f"{folder / JSONL}: cannot be written, got {error.strerror}"
            raise TrainingStopped(f"{where}. {advice(folder)}") from error


def _total_tokens(stage: Any) -> int:
    return int(stage.tokens.total)


def _finite(value: Any) -> Any:
    """JSON knows no infinity and no NaN: null says them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _values(trainer: Trainer, prefix: str) -> dict[str, float]:
    """The logged values whose name begins so, without that beginning."""
    return {
        name.removeprefix(prefix): float(value)
        for name, value in trainer.callback_metrics.items()
        if name.startswith(prefix)
    }


def _append_csv(path: Path, row: dict[str, Any]) -> None:
    """Append a row; a column that is new makes the file be written again with it."""
    old: list[dict[str, Any]] = []
    columns: list[str] = []
    if path.is_file():
        with path.open(newline="") as handle:
            columns = next(csv.reader(handle), [])
    new = [name for name in row if name not in columns]
    if new:
        if columns:
            with path.open(newline="") as handle:
                old = list(csv.DictReader(handle))
        columns = columns + new
    hidden = path.with_name(f".{path.name}.tmp") if new else path
    with hidden.open("w" if new else "a", newline="") as handle:
        writer = csv.DictWriter(handle, columns, restval="")
        if new:
            writer.writeheader()
            writer.writerows(old)
        writer.writerow(row)
    if new:
        hidden.replace(path)


def cut_logs(folder: Path, step: int, *, is_validated: bool = True) -> None:
    """Take back what was logged after a step, and a line that a kill has torn.

    Args:
        folder: Of the run.
        step: The last one that stays.
        is_validated: Whether the validation after that step stays too.
    """

    def stays(at: int, *, is_validation: bool) -> bool:
        return at < step or (at == step and (is_validated or not is_validation))

    for path in (folder / JSONL, folder / SAMPLES):
        _keep_rows(path, lambda row: stays(row.get("current_steps", 0), is_validation="loss" not in row))
    _keep_rows(folder / QUARANTINE, lambda row: stays(row.get("step", 0), is_validation=False))
    path = folder / CSV
    if path.is_file():
        with path.open(newline="") as handle:
            reader = csv.DictReader(handle)
            columns, table = list(reader.fieldnames or []), list(reader)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, extrasaction="ignore")
        writer.writeheader()
        whole = [row for row in table if None not in row.values() and row["step"].isdigit()]
        kept = [row for row in whole if stays(int(row["step"]), is_validation=not row.get("train/loss"))]
        writer.writerows(kept)
        _replace(path, text.getvalue())


def _keep_rows(path: Path, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Drop rows of a file of one JSON object a line, and a line that is none; a file that is not there stays away."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: texts may hold other line ends
        rows = [row for line in lines if (row := _parsed(line)) is not None]
        _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if stays(row)))


def _replace(path: Path, text: str) -> None:
    """Give a file another content, all at once."""
    hidden = path.with_name(f".{path.name}.tmp")
    with hidden.open("w", newline="", encoding="utf-8") as handle:
        handle.write(text)
    hidden.replace(path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError:  # a line that a kill has torn
        return None
    return row


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's trainer_log.jsonl."""
    path = folder / JSONL
    lines = path.read_text().splitlines() if path.is_file() else []
    return [row for line in lines if (row := _parsed(line)) is not None]


def last_values(trainer: Trainer) -> dict[str, float]:
    """The last values of training and validation, `train/...` and `val/...`; those of an earlier process from its log.

    A resume that trains nothing has measured nothing itself.
    """
    found: dict[str, float] = {}
    for row in read_log(run_folder(trainer)):
        numbers = {name: row[name] for name in row.keys() - NO_METRICS if isinstance(row[name], int | float)}
        if "loss" in row:
            numbers["learning_rate"] = numbers.pop("lr", math.nan)
            found |= {f"train/{name}": float(value) for name, value in numbers.items()}
        else:
            found |= {f"val/{name.removeprefix('eval_')}": float(value) for name, value in numbers.items()}
    for prefix in ("train/", "val/"):
        found |= {f"{prefix}{name}": value for name, value in _values(trainer, prefix).items()}
    return found


def write_last_values(trainer: Trainer, stage: Any) -> None:
    """Write how a run ended to all_results.json."""
    results: dict[str, Any] = {
        name.replace("train/", "train_").replace("val/", "eval_"): value for name, value in last_values(trainer).items()
    }
    write_results(trainer, {**results, "steps": trainer.global_step, "total_tokens": _total_tokens(stage)})


def write_results(trainer: Trainer, values: dict[str, Any]) -> None:
    """Merge values into all_results.json."""
    path = run_folder(trainer) / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    merged = {name: _finite(value) for name, value in {**known, **values}.items()}
    path.write_text(json.dumps(merged, indent=1, allow_nan=False) + "\n")
