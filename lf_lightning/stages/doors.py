"""What a trainer may ask of a stage, checked for runs from Python too: strategies and precisions."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lf_lightning.models.adapters import Full
from lf_lightning.models.freeze import Freeze
from lf_lightning.models.loading import read_config
from lf_lightning.models.tensor_parallel import check_plan
from lf_lightning.stages.deepspeed import NAMES, ZeroStrategy
from lf_lightning.stages.fsdp2 import FSDP2Strategy
from lf_lightning.types import InputError, Task

STRATEGIES = ("auto", "ddp", "fsdp2", *NAMES)
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
CLASSES: dict[str, type] = {
    "deepspeed": DeepSpeedStrategy,
    "fsdp2": FSDP2Strategy,
    "model_parallel": ModelParallelStrategy,
    "fsdp": FSDPStrategy,
    "ddp": DDPStrategy,
    "auto": SingleDeviceStrategy,
}
TOGETHER = ("pt", "sft", "dpo", "kto")
"""Tasks whose layers ranks may compute together: without rollouts and value heads."""
REFUSED_STRATEGIES = {
    "deepspeed": "Lightning's own DeepSpeed strategies are not supported: use deepspeed_1, deepspeed_2 or deepspeed_3.",
    "fsdp": "FSDP of the first generation is not supported: use fsdp2.",
    "model_parallel": "Use fsdp2, which is this strategy over all ranks; its options give HSDP and tensor parallelism.",
}
"""What to do instead, in the words of the error."""


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


def check_trainer(trainer: Trainer, task: Task) -> None:
    """Refuse what would train wrong numbers without an error, for runs from Python too.

    Raises:
        InputError: The strategy or the precision is not one that the step contract holds for.
    """
    strategy: Any = trainer.strategy
    is_fit = trainer.state.fn == "fit"
    check_run(
        strategy=NAMES[strategy.zero_stage - 1] if isinstance(strategy, ZeroStrategy) else type(strategy),
        precision=trainer.precision,
        accelerator="cpu" if strategy.root_device.type == "cpu" else "gpu",
        task=task if is_fit else "sft",  # nothing but training is closed to a task
    )
    check_sharing(strategy, trainer.lightning_module, verb=str(trainer.state.fn))


def check_sharing(strategy: Any, stage: Any, *, verb: str) -> None:
    """Refuse what ranks that compute each layer together cannot do, and groups that the ranks cannot form.

    Args:
        strategy: Of the trainer.
        stage: The stage.
        verb: What is run: fit, validate, test or predict.

    Raises:
        InputError: As said.
    """
    if not isinstance(strategy, FSDP2Strategy):
        return
    strategy.check_ranks()
    held = vars(stage).get("held")  # of the stages that have a reference
    for spec in (stage.backbone_spec, None if held is None else held.spec):
        if spec is not None and spec.quantization is not None:
            raise InputError(
                f"trainer.strategy: fsdp2 cannot cut weights in few bits, got {spec.quantization}. Use ddp."
            )
    where, size, tuning = "trainer.strategy.init_args.tensor_parallel", strategy.tensor_parallel, type(stage.tuning)
    if size == 1:
        return
    if stage.task not in TOGETHER:
        raise InputError(f"{where}: must be 1 for {stage.task}, got {size}. It is for {', '.join(TOGETHER)}.")
    if tuning not in (Full, Freeze):
        raise InputError(f"{where}: must be 1 with tuning {tuning.__name__}, got {size}. Use Full or Freeze.")
    if verb == "predict":
        raise InputError(f"{where}: must be 1 for predict, got {size}. Leave it out: fsdp2 alone answers prompts.")
    check_plan(read_config(stage.backbone_spec, vocab_size=1), size)


def check_run(*, strategy: str | type, precision: str | int | None, accelerator: str, task: str) -> None:
    """Refuse a combination that would train wrong numbers, or that nobody has run; before a model is loaded.

    Args:
        strategy: As `trainer.strategy` names it, or its class.
        precision: As `trainer.precision` names it.
        accelerator: As `trainer.accelerator` names it; `auto` is taken for one that can do what is asked.
        task: Of the stage. No tuning decides: what holds for one holds for all.

    Raises:
        InputError: As said, in one line.
    """
    kind = strategy_kind(strategy)
    shown = strategy if isinstance(strategy, str) else strategy.__name__
    if kind not in STRATEGIES:
        instead = REFUSED_STRATEGIES.get(kind, "Choose one of these.")
        raise InputError(
            f"trainer.strategy: must be {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}, got {shown}. {instead}"
        )
    if precision not in (None, 32, "32", *PRECISIONS):
        raise InputError(
            f"trainer.precision: must be 32-true, bf16-mixed or 16-mixed, got {precision}. "
            "Set model.init_args.backbone.dtype for the type of the weights."
        )
    if kind == "deepspeed_3" and task in ("ppo", "grpo"):
        raise InputError(
            f"trainer.strategy: must be another one for {task}, which generates with whole weights, got deepspeed_3. "
            "Use fsdp2, or deepspeed_2."
        )
    if precision != "16-mixed":
        return
    if accelerator == "cpu":
        raise InputError("trainer.precision: 16-mixed needs a GPU, got none. Use bf16-mixed.")
    if kind in NAMES:
        raise InputError(
            f"trainer.precision: must be 32-true or bf16-mixed with strategy {kind}, whose own scaling of gradients is "
            "not that of the other strategies, got 16-mixed. Use bf16-mixed."
        )
    if kind == "fsdp2":
        raise InputError(
            "trainer.precision: must be 32-true or bf16-mixed with strategy fsdp2, whose gradients are cut before they "
            "are unscaled, got 16-mixed. Use bf16-mixed."
        )
    if task in ("ppo", "grpo"):
        raise InputError("trainer.precision: must be 32-true or bf16-mixed for rollouts, got 16-mixed. Use bf16-mixed.")


def strategy_kind(strategy: str | type) -> str:
    """Which strategy a name or a class means: one of `STRATEGIES`, or another word.

    Subclasses count as what they are made of, DeepSpeed's first: it is a DDPStrategy by inheritance.
    """
    if isinstance(strategy, str):
        if strategy in STRATEGIES:
            return strategy
        starts = {"single_device": "auto", "ddp": "ddp", "deepspeed": "deepspeed", "model_parallel": "model_parallel"}
        return next((kind for start, kind in starts.items() if strategy.startswith(start)), strategy)
    for kind, base in CLASSES.items():
        if issubclass(strategy, base):
            return kind
    return strategy.__name__
