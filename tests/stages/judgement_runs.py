"""Small runs of rm, dpo and kto: rows, a configuration for the command line, and the same run from plain Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.pytorch import Callback, Trainer, seed_everything

import lf_lightning
from lf_lightning import (
    DPO,
    KTO,
    RM,
    AdamW,
    BackboneSpec,
    DataModule,
    GenerationSpec,
    PreferenceConstants,
    ReferenceSpec,
    RunCheckpoint,
    ScheduleSpec,
    ValueHeadSpec,
)
from lf_lightning.models import Tuning
from tests.cli.runs import LLAMA, config, lightning, log_rows

STAGES: dict[str, Any] = {"RM": RM, "DPO": DPO, "KTO": KTO}
WORDS = ["amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heath", "islet", "jetty", "knoll", "larch"]
PAIRS = [
    {
        "instruction": f"Say {word} {number % 3 + 1} times.",
        "chosen": " ".join([word] * (number % 3 + 1)),
        "rejected": word[::-1] + "!" * (number % 4),
        "margin": number % 3 / 2,
    }
    for number, word in enumerate(WORDS)
]
FEEDBACK = [
    {"instruction": row["instruction"], "output": row["chosen" if liked else "rejected"], "liked": liked}
    for number, row in enumerate(PAIRS)
    for liked in [number % 3 != 1]
]
RANKED = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
LIKED = {"prompt": "instruction", "response": "output", "kto_tag": "liked"}


def dataset(folder: Path, stage: str, *, margin: bool = False, rows: list[dict[str, Any]] | None = None) -> list[Any]:
    """Write the rows of a stage; the value of `data.datasets`."""
    is_kto = stage == "KTO"
    path = folder / f"{'feedback' if is_kto else 'pairs'}{'' if rows is None else len(rows)}.json"
    path.write_text(json.dumps(rows or (FEEDBACK if is_kto else PAIRS)))
    if is_kto:
        return [{"path": str(path), "columns": LIKED}]
    return [{"path": str(path), "ranking": True, "columns": RANKED | ({"margin": "margin"} if margin else {})}]


def judged(
    folder: Path, stage: str, run: str = "run", lora: Path | None = None, margin: bool = False, **changes: Any
) -> dict[str, Any]:
    """`config()` with a stage that judges, its own rows, and twelve of them in steps of four."""
    of_stage: dict[str, Any] = {"model__class_path": stage, "data__datasets": dataset(folder, stage, margin=margin)}
    if stage == "RM":
        of_stage["model__init_args__generation"] = ...  # it scores
    return config(folder / run, lora, **{**of_stage, **changes})


def fit(folder: Path, stage: str, run: str = "run", **changes: Any) -> Path:
    """Run `fit` in this process, without the plots, which take as long as all the rest; the run folder."""
    with patch("lf_lightning.callbacks.plots.plot_curve"):
        assert lightning("fit", folder, judged(folder, stage, run, **changes)) == 0
    return folder / run


SPECS: dict[str, Any] = {
    "backbone": BackboneSpec,
    "schedule": ScheduleSpec,
    "generation": GenerationSpec,
    "reference": ReferenceSpec,
    "constants": PreferenceConstants,
    "value_head": ValueHeadSpec,
}


def first_rows(folder: Path, stage: str, *, through_cli: bool = False, **changes: Any) -> list[dict[str, Any]]:
    """The log of a run of two steps; without the command line, whose parser takes most of the time, unless asked."""
    changes = {"trainer__max_steps": 2, "checkpoint__every_n_steps": None, "data__shuffle": False, **changes}
    if through_cli:
        return log_rows(fit(folder, stage, **changes))
    settings = judged(folder, stage, **changes)
    seed_everything(settings["seed_everything"])
    options = {}
    for name, value in settings["model"]["init_args"].items():
        if isinstance(value, dict) and "class_path" in value:
            value = getattr(lf_lightning, value["class_path"])(**value.get("init_args", {}))
        options[name] = SPECS[name](**value) if isinstance(value, dict) else value
    module = STAGES[stage](**options)
    callbacks = [RunCheckpoint(every_n_steps=None)]
    trainer = Trainer(**settings["trainer"], callbacks=callbacks, enable_progress_bar=False, enable_model_summary=False)
    with patch("lf_lightning.callbacks.plots.plot_curve"):
        trainer.fit(module, DataModule(options["backbone"], module.task, **settings["data"]))
    return log_rows(folder / "run")


def first_losses(folder: Path, stage: str, **changes: Any) -> list[float]:
    """The losses of `first_rows`."""
    return [row["loss"] for row in first_rows(folder, stage, **changes) if "loss" in row]


def python_fit(
    folder: Path, stage: str, tuning: Tuning, *callbacks: Callback, lora: Path | None = None, **options: Any
) -> tuple[Any, Trainer]:
    """Train as `fit` does with the same values, without the command line.

    Args:
        folder: Gets the rows and the folder `python`.
        stage: Name of the stage.
        tuning: How it is tuned.
        callbacks: Those of the Trainer beside the checkpoints.
        lora: Folder of the model; without one a model from scratch.
        options: Of the stage, and of the data where they begin with `data_`, of the Trainer with `trainer_`.
    """
    parts: dict[str, dict[str, Any]] = {"data": {}, "trainer": {}, "stage": {}}
    for name, value in options.items():
        kind, _, rest = name.partition("_")
        parts[kind if kind in ("data", "trainer") else "stage"][rest if kind in ("data", "trainer") else name] = value
    datasets = dataset(folder, stage)
    seed_everything(7)
    backbone = BackboneSpec(path=str(lora)) if lora else BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")
    module = STAGES[stage](
        backbone,
        tuning,
        AdamW(lr=1e-2),
        ScheduleSpec(kind="constant"),
        **parts["stage"],
    )
    of_data = {"max_length": 96, "global_batch_size": 4, "cache_dir": None, "datasets": datasets, **parts["data"]}
    of_trainer = {"max_steps": 4, "log_every_n_steps": 1, "enable_progress_bar": False, **parts["trainer"]}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder / "python",
        callbacks=[*callbacks, RunCheckpoint(every_n_steps=2)],
        **of_trainer,
    )
    with patch("lf_lightning.callbacks.plots.plot_curve"):
        trainer.fit(module, DataModule(backbone, module.task, **of_data), weights_only=True)
    return module, trainer
