"""Gives every saved reward model its head: beside the plain model, or in the form that transformers scores with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.models.value_head import export_sequence_classification, save_value_head


class FixValueHeadModelCallback(Callback):
    """Save the value head of every checkpoint and of the final folder, as `value_head.save_as` says.

    The model's own files stay what transformers or peft open, without any name of a wrapper in them.
    """

    def on_save_pretrained(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Add the head; called before the folder gets its name, on every rank."""
        stage: Any = pl_module
        head = stage.backbone.value_head
        if head is None:
            return
        if stage.value_head.save_as == "value_head":
            save_value_head(stage.backbone, folder, writes=trainer.is_global_zero)
            return
        data = trainer.datamodule  # type: ignore[attr-defined]  # a plain attribute of Trainer
        spare = None if data is None else spare_pad_id(data.tokenizer, data.stop_token_ids)
        pad_id = export_sequence_classification(stage.backbone, folder, writes=trainer.is_global_zero, pad_id=spare)
        if data is not None and pad_id is not None and trainer.is_global_zero:
            tokenizer = copy.deepcopy(data.tokenizer)
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)  # batches are padded with what is not scored
            tokenizer.save_pretrained(folder)


def spare_pad_id(tokenizer: Any, stop_token_ids: Sequence[int]) -> int | None:
    """A special token that never ends a response, the pad token first; None where there is none."""
    candidates = [tokenizer.pad_token_id, *tokenizer.all_special_ids]
    return next((token for token in candidates if token is not None and token not in stop_token_ids), None)
