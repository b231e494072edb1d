"""What a trainer may ask of a stage, checked for runs from Python too: strategies and precisions."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

from lf_lightning.stages.fsdp2 import FSDP2Strategy
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


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would train wrong numbers without an error.

    Raises:
        InputError: The strategy or the precision is not one that the step contract holds for.
    """
    strategy: Any = trainer.strategy
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy by inheritance
        raise InputError(
            "trainer.strategy: must be auto, ddp or fsdp2, "
            f"got {type(strategy).__name__}. Choose one of these."
        )
    if trainer.precision not in ("32-true", "bf16-mixed", "16-mixed"):
        raise InputError(
            f"trainer.precision: must be 32-true, bf16-mixed or 16-mixed, got {trainer.precision}. "
            "Set model.init_args.backbone.dtype for the type of the weights."
        )
