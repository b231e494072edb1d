"""The run of tests/cli/runs.py, started from plain Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything

from lf_lightning import SFT, AdamW, BackboneSpec, DataModule, Full, GenerationSpec, RunCheckpoint, ScheduleSpec
from tests.cli.runs import LLAMA, ROWS


def fit(folder: Path, *callbacks: Callback, ckpt_path: Path | str | None = None, **options: Any) -> Trainer:
    """Train as `config()` says, with a checkpoint every two steps unless the callbacks bring their own.

    Args:
        folder: Gets rows.json and the run folder.
        callbacks: Those of the Trainer.
        ckpt_path: A state file to continue from.
        options: Of the Trainer, the DataModule and the stage.
    """
    rows = folder / "rows.json"
    rows.write_text(json.dumps(ROWS))
    seed_everything(7)
    backbone = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")
    stage = SFT(
        backbone,
        Full(),
        AdamW(lr=options.pop("lr", 1e-2)),
        ScheduleSpec(kind="constant"),
        generation=GenerationSpec(max_new_tokens=4),
        non_finite=options.pop("non_finite", "stop"),
    )
    of_data = {name: options.pop(name) for name in ("val_size", "global_batch_size") if name in options}
    data = DataModule(
        backbone,
        datasets=[{"path": str(rows)}],
        **{"max_length": 96, "global_batch_size": 4, "cache_dir": None, **of_data},
    )
    own = any(isinstance(callback, RunCheckpoint) for callback in callbacks)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder / "run",
        callbacks=[*callbacks, *([] if own else [RunCheckpoint(every_n_steps=2)])],
        **{"max_steps": 4, "log_every_n_steps": 1, "enable_progress_bar": False, **options},
    )
    trainer.fit(stage, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer
