"""Checkpoints that transformers and peft open as they stand, with the state to continue from beside the weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lf_lightning.callbacks.folder import complete_checkpoints, remove_checkpoint, run_folder, step_of, whole_folder
from lf_lightning.callbacks.run_log import cut_logs, read_log
from lf_lightning.console import say
from lf_lightning.lightning_private import align_counts, run_validation, validation_is_due
from lf_lightning.types import InputError


@runtime_checkable
class SavesPretrained(Protocol):
    """A callback that adds files to every checkpoint and to the final folder, before they get their name."""

    def on_save_pretrained(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Add files to the folder; called on every rank."""


class RunCheckpoint(ModelCheckpoint):
    """Save checkpoints/step-00000500/ while training, and final/ at the end.

    Args:
        every_n_steps: Optimizer steps between checkpoints, > 0; empty means only the final folder.
        save_top_k: Checkpoints to keep beside the newest: -1 for all. With `monitor` the best ones, else the newest.
        monitor: A logged value that says which checkpoints are best, for example val/loss.
        mode: Whether the smallest or the largest value is best.
    """

    def __init__(
        self,
        every_n_steps: int | None = 500,
        save_top_k: int = -1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__(save_top_k=0)  # of ModelCheckpoint itself only the type is used: Lightning adds none beside it
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"checkpoint.every_n_steps: must be at least 1 or null, got {every_n_steps}. Raise it.")
        if save_top_k < -1:
            raise InputError(f"checkpoint.save_top_k: must be -1 (all), 0 or more, got {save_top_k}. Raise it.")
        self.every_n_steps, self.keep, self.watched, self.best_is = every_n_steps, save_top_k, monitor, mode
        self.values: dict[int, float] = {}
        """Step of a checkpoint -> value of `monitor` there."""
        self._step_of_final: int | None = None
        self._is_validation_due = False

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing to prepare: the run folder is the trainer's."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is saved before the first step; but what ranks checkpoints must exist, and be complete.

        Raises:
            InputError: Nothing of the name of `monitor` is ever logged.
        """
        self._check_monitor(trainer, pl_module)
        self._repeat_validation(trainer)

    def _check_monitor(self, trainer: Trainer, stage: Any) -> None:
        if self.watched is None:
            return
        if stage.data is not None and "val" not in stage.data.sets:
            raise InputError("checkpoint.monitor: needs a validation set, got none. Set data.val_size, or remove it.")
        known = [f"val/{name}" for name in stage.set_values(dict.fromkeys(stage.measured, 0.0))]
        if self.watched not in known:
            raise InputError(f"checkpoint.monitor: must be one of {', '.join(known)}, got {self.watched}. Correct it.")
        # a checkpoint is written before its step is validated, so its own value is in the log only
        field = f"eval_{self.watched.removeprefix('val/')}"
        rows = read_log(run_folder(trainer))
        self.values |= {row["current_steps"]: row[field] for row in rows if row.get(field) is not None}

    def _repeat_validation(self, trainer: Trainer) -> None:
        """Validate now where the checkpoint was written before the validation of its step.

        Lightning would leave that validation out. Whether an earlier process finished it is not asked: callbacks that
        follow validations, such as EarlyStopping, are as the checkpoint knows them and have to see it again.
        """
        if self._is_validation_due:
            self._is_validation_due = False
            if trainer.is_global_zero:
                cut_logs(run_folder(trainer), trainer.global_step, is_validated=False)
            run_validation(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what the next checkpoint holds of Lightning's counts the same as without a resume."""
        align_counts(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a checkpoint is due."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember how good the checkpoint of this step is."""
        self._is_validation_due = False
        if self.watched is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self.values[trainer.global_step] = float(trainer.callback_metrics[self.watched])
        self._prune(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoints count optimizer steps, not epochs."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Nothing is saved in the middle of a step."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final folder."""
        self._save_final(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final folder where there was nothing left to train."""
        if self._step_of_final != trainer.global_step:
            self._save_final(trainer, pl_module)
            if self._is_validation_due:
                say(f"step {trainer.global_step} may not be validated: lf-lightning validate --ckpt_path last does it")

    # ------------------------------------------------------------------ what

    def save(self, trainer: Trainer, pl_module: LightningModule) -> Path:
        """Write a checkpoint of this step: all of it or nothing."""
        target = run_folder(trainer) / "checkpoints" / f"step-{trainer.global_step:08d}"
        self._is_validation_due = validation_is_due(trainer)
        with whole_folder(target, writes=trainer.is_global_zero) as folder:
            if trainer.is_global_zero:
                (folder / "trainer_state").mkdir()
            trainer.strategy.barrier()
            _fill(trainer, pl_module, folder)
            trainer.save_checkpoint(folder / "trainer_state" / "state.ckpt")
            trainer.strategy.barrier()
        trainer.strategy.barrier()
        self._prune(trainer)
        return target

    def _save_final(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = run_folder(trainer) / "final"
        with whole_folder(target, writes=trainer.is_global_zero) as folder:
            trainer.strategy.barrier()
            _fill(trainer, pl_module, folder)
            trainer.strategy.barrier()
        self._step_of_final = trainer.global_step
        say(f"saved {target}")

    def _prune(self, trainer: Trainer) -> None:
        """Remove checkpoints that are neither the newest nor among the best."""
        if self.keep < 0 or not trainer.is_global_zero:
            return
        *older, _newest = complete_checkpoints(run_folder(trainer)) or [Path()]
        worst = float("inf") if self.best_is == "min" else float("-inf")

        def rank(folder: Path) -> tuple[float, int]:
            step = step_of(folder) or 0
            value = self.values.get(step, worst) if self.watched else 0.0
            value = worst if math.isnan(value) else value
            return (value if self.best_is == "min" else -value), -step

        for folder in sorted(older, key=rank)[self.keep :]:
            remove_checkpoint(folder)

    # ------------------------------------------------------------------ state

    @property
    def state_key(self) -> str:
        """One of these belongs to a run, whatever its options are."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The values by which checkpoints are ranked, and whether this one's step is still to be validated."""
        return {"values": dict(self.values), "is_validation_due": self._is_validation_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the values of checkpoints that this process did not write."""
        self.values = dict(state_dict["values"])
        self._is_validation_due = bool(state_dict.get("is_validation_due"))  # older checkpoints do not say


def _fill(trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
    """Write the weights, then what callbacks add to them."""
    pl_module.save_pretrained(folder)  # type: ignore[operator]  # every stage has it
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # a plain attribute of Trainer
        if isinstance(callback, SavesPretrained):
            callback.on_save_pretrained(trainer, pl_module, folder)
