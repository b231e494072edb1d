"""How strategies that cut the optimizer over ranks write and read the state of a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lf_lightning.callbacks.saving import KeepsErrors
from lf_lightning.optim.state_files import save_rows


class SavesRows(KeepsErrors):
    """First base of a strategy: each rank writes its rows of the optimizer, and the first one all that is not cut."""

    is_global_zero: Any
    _state_folder: Path

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write this rank's rows beside the file, which the first rank writes."""
        try:
            checkpoint["optimizer_states"] = save_rows(checkpoint["optimizer_states"], Path(filepath).parent)
            if self.is_global_zero:
                torch.save(checkpoint, filepath)
        except (OSError, RuntimeError, SafetensorError) as error:  # the other ranks wait for this one first
            self._kept = error

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file; large tensors stay on the disk until they are asked for."""
        self._state_folder = Path(checkpoint_path).parent
        found: dict[str, Any] = torch.load(checkpoint_path, map_location="cpu", mmap=True, weights_only=True)
        return found

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: a stage writes its weights itself, beside this state."""
        return {}

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether weights wait for the optimizer: they go in once the model is built, as everywhere else."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls `load_optimizer_state_dict`."""
        return True
