"""Keeps the model on which a new adapter lies, where other adapters were merged into it first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import MANIFEST, hidden_folder, name_folder, run_folder, sync_folder
from lf_lightning.console import say
from lf_lightning.models import Full, load_backbone

BASE = "base"
"""Folder of the merged model in the run folder."""


class SaveMergedBase(Callback):
    """Write the merged model to base/ in the run folder, once, and let every saved adapter name it.

    Only where `backbone.merge_adapters` is given and a new adapter trains: what is saved would be wrong on any other
    model.
    """

    def on_save_pretrained(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Write what is missing; called before the folder gets its name, on every rank."""
        stage: Any = pl_module
        if not (stage.backbone.is_adapter and stage.backbone_spec.merge_adapters and trainer.is_global_zero):
            return
        target = run_folder(trainer) / BASE
        if not (target / MANIFEST).is_file():
            self._write(trainer, stage, target)
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text()) | {"base_model_name_or_path": str(target)}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def _write(self, trainer: Trainer, stage: Any, target: Path) -> None:
        """Merge once more, from the files: the live model may be sharded, and has an adapter in it."""
        data, hidden = trainer.datamodule, hidden_folder(target)  # type: ignore[attr-defined]  # a plain attribute
        rows = {} if data is None else {"new_rows": data.new_rows}
        vocab_size = 0 if data is None else len(data.tokenizer)
        merged = load_backbone(
            stage.backbone_spec, Full(), vocab_size=vocab_size, seed=stage.seed, trains=False, **rows
        )
        shutil.rmtree(hidden, ignore_errors=True)
        merged.causal_lm.save_pretrained(hidden)
        if data is not None:
            data.tokenizer.save_pretrained(hidden)
        sync_folder(hidden)
        name_folder(hidden, target)
        say(f"saved {target}, on which the adapters of this run lie")
