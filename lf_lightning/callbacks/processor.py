"""Saves the tokenizer, with the chat template that training used, beside every checkpoint."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class SaveProcessorCallback(Callback):
    """Save tokenizer and chat template into every checkpoint and into the final folder."""

    def on_save_pretrained(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Write the files; called before the folder gets its name."""
        data = trainer.datamodule  # type: ignore[attr-defined]  # a plain attribute of Trainer
        if data is not None and trainer.is_global_zero:
            data.tokenizer.save_pretrained(folder)
