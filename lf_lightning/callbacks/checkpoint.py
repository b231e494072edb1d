"""Checkpoints that transformers and peft open as they stand, with the state to continue from beside the weights."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lf_lightning.callbacks.folder import STATE, complete_checkpoints, remove_checkpoint, run_folder, step_of
from lf_lightning.callbacks.run_log import cut_logs, read_log, write_last_values
from lf_lightning.callbacks.saving import KeepsErrors, Saving, StateFile
from lf_lightning.console import say
from lf_lightning.lightning_private import align_counts, run_validation, validation_is_due
from lf_lightning.models.saved import adapter_digest, check_saved
from lf_lightning.types import InputError, TrainingStopped


@runtime_checkable
class SavesPretrained(Protocol):
    """A callback that adds files to every checkpoint and to the final folder, before they get their name."""

    def on_save_pretrained(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Add files to the folder; called on every rank."""


class RunCheckpoint(ModelCheckpoint):
    """Save checkpoints/step-00000500/ while training, and final/ at the end.

    A checkpoint is saved before its step is validated; a run that goes on from it validates first. Every folder is
    opened again before it gets its name.

    Args:
        every_n_steps: Optimizer steps between checkpoints, > 0; empty means only the final folder.
        every_n_epochs: Epochs between checkpoints, at their last step, > 0; beside every_n_steps.
        save_top_k: Checkpoints to keep beside the newest: -1 for all. With `monitor` the best ones, else the newest.
        monitor: A logged value that says which checkpoints are best, for example val/loss.
        mode: Whether the smallest or the largest value is best.
    """

    def __init__(
        self,
        every_n_steps: int | None = 500,
        every_n_epochs: int | None = None,
        save_top_k: int = -1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__(save_top_k=0)  # of ModelCheckpoint itself only the type is used: Lightning adds none beside it
        for name, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise InputError(f"checkpoint.{name}: must be at least 1 or null, got {value}. Raise it.")
        if save_top_k < -1:
            raise InputError(f"checkpoint.save_top_k: must be -1 (all), 0 or more, got {save_top_k}. Raise it.")
        self.every_n_steps, self.epochs_between = every_n_steps, every_n_epochs
        self.keep, self.watched, self.best_is = save_top_k, monitor, mode
        self.values: dict[int, float] = {}
        """Step of a checkpoint -> value of `monitor` there."""
        self.saved: dict[int, Path] = {}
        """The step that this run has saved last -> the folder; empty before."""
        self._step_of_final: int | None = None
        self._is_validation_due = False
        self._change = AdapterChange()

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the state of a resume be written in a way that tells all ranks of errors."""
        strategy = trainer.strategy
        if not isinstance(strategy, KeepsErrors) and not isinstance(strategy.checkpoint_io, StateFile):
            strategy.checkpoint_io = StateFile(strategy.checkpoint_io)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is saved before the first step; but what ranks checkpoints must exist, and be complete.

        Raises:
            InputError: Nothing of the name of `monitor` is ever logged.
        """
        self._change.begin(pl_module)
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
        """Keep Lightning's counts the same as without a resume, and look at the rate that the step will have."""
        align_counts(trainer)
        self._change.look_before(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where a checkpoint is due."""
        self._change.look_after(pl_module)
        if self._is_due(trainer):
            self.save(trainer, pl_module)

    def _is_due(self, trainer: Trainer) -> bool:
        epoch = trainer.current_epoch + 1
        at_step = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        at_epoch = self.epochs_between is not None and trainer.is_last_batch and epoch % self.epochs_between == 0
        return at_step or at_epoch

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
        """Write the final folder where there was nothing left to train; and validate the last step before."""
        if self._step_of_final != trainer.global_step:
            if self._is_validation_due:
                self._repeat_validation(trainer)
                if trainer.is_global_zero:
                    write_last_values(trainer, pl_module)  # once more: all other callbacks are at their end already
            self._save_final(trainer, pl_module)

    # ------------------------------------------------------------------ what

    def save(self, trainer: Trainer, pl_module: LightningModule) -> Path:
        """Write a checkpoint of this step: all of it or nothing.

        Raises:
            TrainingStopped: It cannot be written, or what was written is not what was trained.
        """
        target = run_folder(trainer) / "checkpoints" / f"step-{trainer.global_step:08d}"
        self._is_validation_due = validation_is_due(trainer)
        self._write(trainer, pl_module, target, with_state=True)
        self.saved = {trainer.global_step: target}
        self._prune(trainer)
        return target

    def _save_final(self, trainer: Trainer, pl_module: LightningModule) -> None:
        target = run_folder(trainer) / "final"
        self._write(trainer, pl_module, target, with_state=False)
        self._step_of_final = trainer.global_step
        say(f"saved {target}")

    def _write(self, trainer: Trainer, pl_module: LightningModule, target: Path, *, with_state: bool) -> None:
        """Fill a folder on all ranks, open it again, and give it its name."""
        stage: Any = pl_module
        saving = Saving(trainer, target)
        saving.begin(with_state=with_state)
        saving.do(lambda: stage.save_pretrained(saving.folder))
        if with_state:
            saving.settle()  # what comes next looks at what was written
            saving.do(lambda: stage.save_unnamed(saving.folder))
        for callback in vars(trainer)["callbacks"]:
            if isinstance(callback, SavesPretrained):
                saving.do(partial(callback.on_save_pretrained, trainer, pl_module, saving.folder))
        if with_state:
            saving.do(lambda: _save_state(trainer, saving.folder / STATE))
        saving.do(lambda: self._change.check(stage, trainer.global_step))
        saving.finish(lambda: check_saved(stage.backbone, saving.folder))

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
        self._is_validation_due = bool(state_dict["is_validation_due"])


def _save_state(trainer: Trainer, path: Path) -> None:
    """Write what only a resume needs."""
    trainer.save_checkpoint(path)
    writer = trainer.strategy if isinstance(trainer.strategy, KeepsErrors) else trainer.strategy.checkpoint_io
    assert isinstance(writer, KeepsErrors)
    writer.raise_kept()


class AdapterChange:
    """Whether training reaches the adapter that is saved: a step with a gradient and a rate must have changed it."""

    def __init__(self) -> None:
        self._start: str | None = None
        self._rate = 0.0
        self._first_step: int | None = None
        self._num_steps = 0

    def begin(self, stage: Any) -> None:
        """Remember the adapter before the first step."""
        self._start, self._first_step, self._num_steps = adapter_digest(stage.backbone), stage.global_step, 0

    def look_before(self, trainer: Trainer) -> None:
        """Look at the learning rate of the step about to be made."""
        self._rate = max(group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups)

    def look_after(self, stage: Any) -> None:
        """Count a step that had a gradient and a learning rate."""
        self._num_steps += stage.grad_norm > 0 and self._rate > 0

    def check(self, stage: Any, step: int) -> None:
        """Refuse to save an adapter that no step has changed.

        Raises:
            TrainingStopped: As said.
        """
        if self._start is not None and self._num_steps and adapter_digest(stage.backbone) == self._start:
            raise TrainingStopped(
                f"an adapter that {self._num_steps} steps with a gradient have not changed since step "
                f"{self._first_step}: something puts its weights back"
            )
