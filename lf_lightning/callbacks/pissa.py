"""Gives every saved PiSSA run the form that everybody can open: a plain LoRA on the original base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.models.pissa import convert_to_lora


class PissaConvertCallback(Callback):
    """Save the adapter of a PiSSA run as a LoRA of twice the rank, in every checkpoint and in the final folder.

    It is valid on the original base and computes what was trained. The adapter as it trains lies in
    trainer_state/adapter. The live weights are not touched: the files are converted.
    """

    def on_save_pretrained(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Convert what was written; called before the folder gets its name, on every rank."""
        stage: Any = pl_module
        if stage.backbone.start and trainer.is_global_zero:
            convert_to_lora(folder, stage.backbone.start)
