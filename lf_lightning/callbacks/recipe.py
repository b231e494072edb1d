"""The configuration of a run that was started from Python, in the form of the command line's YAML."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer


def recipe_of(trainer: Trainer, pl_module: LightningModule) -> str:
    """What trainer, stage and data say of themselves, as YAML that `lf-lightning fit` takes."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    stage_values = {
        "backbone": pl_module.backbone_spec,
        "tuning": pl_module.tuning,
        "optimizer": pl_module.optimizer_spec,
        "schedule": pl_module.schedule_spec,
        "generation": pl_module.generation,
    }
    names = inspect.signature(type(pl_module).__init__).parameters
    stage_values |= {name: vars(pl_module)[name] for name in names if name in vars(pl_module)}
    recipe: dict[str, Any] = {
        "seed_everything": pl_module.seed,
        "trainer": {
            "max_steps": trainer.max_steps,
            "max_epochs": trainer.max_epochs,
            "precision": trainer.precision,
            "log_every_n_steps": trainer.log_every_n_steps,  # type: ignore[attr-defined]
            "default_root_dir": trainer.default_root_dir,
        },
        "model": {"class_path": type(pl_module).__name__, "init_args": {k: _plain(v) for k, v in stage_values.items()}},
    }
    if data is not None:
        recipe["data"] = {name: _plain(value) for name, value in data.arguments.items()}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Plain data of a spec: a dictionary, with its class where there is a choice of classes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(vars(value)[field.name]) for field in dataclasses.fields(value)}
        chosen = type(value).__mro__[1] is not object  # a subclass of an abstract spec: the class is part of the choice
        return {"class_path": type(value).__name__, "init_args": fields} if chosen else fields
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
