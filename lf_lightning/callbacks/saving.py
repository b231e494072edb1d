"""Writing a folder on all ranks at once: whatever goes wrong on any of them is said on all, in one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError

from lf_lightning.callbacks.folder import advice, hidden_folder, name_folder, run_folder, sync_folder
from lf_lightning.callbacks.predictions import from_all_ranks
from lf_lightning.types import TrainingStopped

WRITE_ERRORS = (OSError, SafetensorError)
"""What a full disk, a folder that is gone or one that cannot be written raises."""


class Saving:
    """One folder in the making. The ranks work side by side, and stop together.

    Each piece of work may contain collectives, but writes only after them; so a rank whose disk is full still takes
    part in all collectives, and nobody waits for it.

    Args:
        trainer: Whose run it is.
        target: The folder to make or to replace.
    """

    def __init__(self, trainer: Trainer, target: Path) -> None:
        self._trainer, self._target = trainer, target
        self.folder = hidden_folder(target)
        """Where to write; it takes the name of `target` at the end."""
        self._trouble = ""

    def do(self, work: Callable[[], None]) -> None:
        """Do a piece of the work, and remember the first thing that goes wrong."""
        try:
            work()
        except WRITE_ERRORS as error:
            self._trouble = self._trouble or reason(error)
        except TrainingStopped as error:
            self._trouble = self._trouble or str(error)

    def settle(self) -> None:
        """Wait for all ranks.

        Raises:
            TrainingStopped: Something went wrong on one of them; what is half made is removed.
        """
        told = [line for line in from_all_ranks(self._trouble) if line]
        if not told:
            return
        if self._trainer.is_global_zero:
            shutil.rmtree(self.folder, ignore_errors=True)
        raise TrainingStopped(f"{self._target}: cannot be saved, got {told[0]}. {advice(run_folder(self._trainer))}")

    def begin(self, *, with_state: bool) -> None:
        """Make the hidden folder, and in it the one for what only a resume needs."""
        self.do(lambda: self._begin(with_state))
        self.settle()

    def finish(self, check: Callable[[], None]) -> None:
        """Check what was written, write the manifest, and give the folder its name, on the first rank."""
        self.settle()
        if self._trainer.is_global_zero:
            self.do(lambda: self._finish(check))
        self.settle()

    def _begin(self, with_state: bool) -> None:
        if not self._trainer.is_global_zero:
            return
        root = run_folder(self._trainer)
        if not (root / "config.yaml").is_file():
            raise TrainingStopped(f"a run folder that somebody has emptied or removed, {root}")
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "trainer_state" if with_state else self.folder).mkdir(parents=True)

    def _finish(self, check: Callable[[], None]) -> None:
        check()
        sync_folder(self.folder)
        name_folder(self.folder, self._target)


class KeepsErrors:
    """What writes the state of a resume, and lets every rank reach the next collective before it raises."""

    _kept: Exception | None = None

    def raise_kept(self) -> None:
        """Raise what went wrong in the last save.

        Raises:
            OSError: A file could not be written.
        """
        error, self._kept = self._kept, None
        if error is not None:
            raise error if isinstance(error, OSError) else OSError(reason(error))


class StateFile(CheckpointIO, KeepsErrors):
    """Writes the state of a resume straight into its folder, and keeps the error for `Saving` to tell all ranks.

    Lightning's own writes to a temporary folder first, which may be another disk, and lets the other ranks wait for one
    that has failed.

    Args:
        inner: What reads and removes, and writes where it is the user's own.
    """

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write tensors and plain Python to a file."""
        try:
            with Path(path).open("wb") as handle:
                torch.save(checkpoint, handle)
                handle.flush()
                os.fsync(handle.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer gives its own error where the disk is full
            self._kept = error

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Read a state."""
        return self.inner.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a state."""
        self.inner.remove_checkpoint(path)


def reason(error: Exception) -> str:
    """What a library says of an error, as the end of one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return " ".join(text.split())[:200].rstrip(".") + where
