"""The configuration of a run that was started from Python, in the form of the command line's YAML."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from lf_lightning.callbacks.checkpoint import RunCheckpoint
from lf_lightning.models import GenerationEngine
from lf_lightning.models.rewards import Reward, options_of


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
    stage_values = {name: value for name, value in stage_values.items() if name in names}
    stage_values |= {name: vars(pl_module)[name] for name in names if name in vars(pl_module)}
    recipe: dict[str, Any] = {
        "seed_everything": pl_module.seed,
        "trainer": {**_trainer_options(trainer), "default_root_dir": str(trainer.default_root_dir)},
        "checkpoint": _checkpoint_options(trainer),
        "model": {"class_path": type(pl_module).__name__, "init_args": {k: _plain(v) for k, v in stage_values.items()}},
    }
    if data is not None:
        recipe["data"] = {name: _plain(value) for name, value in data.arguments.items()}
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def _trainer_options(trainer: Trainer) -> dict[str, Any]:
    """What a trainer says of itself, under the names of its arguments."""
    plain: Any = trainer  # Lightning leaves some of these untyped
    return {
        "max_steps": plain.max_steps,
        "max_epochs": plain.max_epochs,
        "precision": plain.precision,
        "accelerator": plain.accelerator.name(),
        "devices": plain.num_devices,
        "num_nodes": plain.num_nodes,
        "strategy": "ddp" if isinstance(plain.strategy, DDPStrategy) else "auto",
        "val_check_interval": plain.val_check_interval,
        "check_val_every_n_epoch": plain.check_val_every_n_epoch,
        "limit_train_batches": plain.limit_train_batches,
        "limit_val_batches": plain.limit_val_batches,
        "log_every_n_steps": plain.log_every_n_steps,
    }


def _checkpoint_options(trainer: Trainer) -> dict[str, Any]:
    """The options of the run's checkpoints."""
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, RunCheckpoint):
            return {
                "every_n_steps": callback.every_n_steps,
                "every_n_epochs": callback.epochs_between,
                "save_top_k": callback.keep,
                "monitor": callback.watched,
                "mode": callback.best_is,
            }
    return {}


def _plain(value: Any) -> Any:
    """Plain data of a spec: a dictionary, with its class where there is a choice of classes."""
    if isinstance(value, Reward | GenerationEngine):
        options = value.option_values() if isinstance(value, Reward) else options_of(value)
        return {"class_path": _class_path(type(value)), "init_args": _plain(options)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(vars(value)[field.name]) for field in dataclasses.fields(value)}
        chosen = type(value).__mro__[1] is not object  # a subclass of an abstract spec: the class is part of the choice
        return {"class_path": _class_path(type(value)), "init_args": fields} if chosen else fields
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _class_path(kind: type) -> str:
    """What chooses a class: one of ours by its name, another by its path."""
    return kind.__name__ if kind.__module__.split(".")[0] == "lf_lightning" else f"{kind.__module__}.{kind.__name__}"
