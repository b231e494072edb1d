"""What a trainer may ask of a stage, checked for runs from Python too: strategies and precisions."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lf_lightning.types import InputError


def check_data(stage: str, task: str, data: Any) -> None:
    """Refuse a DataModule that encodes for another stage.

    Args:
        stage: Name of the stage.
        task: Its task.
        data: The DataModule; None where the user brings loaders.

    Raises:
        InputError: As said.
    """
    if data is not None and data.task != task:
        raise InputError(
            f"data.task: must be {task} for {stage}, got {data.task}. Pass DataModule(backbone, {task!r}, ...)."
        )


def open_data(stage: Any) -> None:
    """Have the sets of a stage encoded or opened while no process can wait for another in a collective.

    Args:
        stage: The stage, attached to a trainer whose process group has not started.

    Raises:
        InputError: The DataModule encodes for another stage, or its rows cannot be used.
    """
    check_data(type(stage).__name__, stage.task, stage.data)
    if stage.data is not None:
        stage.data.open_sets(stage.trainer.state.fn or "fit")


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would train wrong numbers without an error.

    Raises:
        InputError: The strategy or the precision is not one that the step contract holds for.
    """
    strategy: Any = trainer.strategy
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy by inheritance
        raise InputError(
            "trainer.strategy: must be auto, ddp or ModelParallelStrategy (FSDP2), "
            f"got {type(strategy).__name__}. Choose one of these."
        )
    if isinstance(strategy, ModelParallelStrategy):
        shared = strategy.device_mesh["tensor_parallel"].size()
        if shared != 1:
            raise InputError(
                f"trainer.strategy.init_args.tensor_parallel_size: must be 1, got {shared}. "
                f"Set data_parallel_size: {trainer.world_size} and tensor_parallel_size: 1."
            )
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise InputError(
            f"trainer.precision: must be 32-true, bf16-mixed or 16-mixed, got {trainer.precision}. "
            "Set model.init_args.backbone.dtype for the type of the weights."
        )
