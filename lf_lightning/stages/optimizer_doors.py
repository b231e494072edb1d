"""What an optimizer asks of tuning, trainer and data; refused before a model is loaded, from Python too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lf_lightning.models import Full
from lf_lightning.optim import AdamW, OptimizerSpec
from lf_lightning.stages.doors import strategy_kind
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from lf_lightning.stages.base import Stage

INIT = "model.init_args"


def check_specs(stage: Stage) -> None:
    """Refuse specs of a stage that do not fit together.

    Raises:
        InputError: As said, in one line.
    """
    spec, tuning = stage.optimizer_spec, type(stage.tuning).__name__
    if stage.max_grad_norm is not None and not stage.max_grad_norm > 0:
        raise InputError(
            f"{INIT}.max_grad_norm: must be positive or null, got {stage.max_grad_norm}. Use null for no limit."
        )
    name = type(spec).__name__
    if spec.tunings and tuning not in spec.tunings:
        raise InputError(
            f"{INIT}.optimizer.class_path: {name} trains whole weights, got tuning {tuning}. "
            f"Use AdamW, or tuning {' or '.join(spec.tunings)}."
        )
    if name in ("BAdam", "BAdamRatio") and stage.task in ("rm", "ppo"):
        raise InputError(
            f"{INIT}.optimizer.class_path: {name} trains blocks of the model and no value head, got {stage.task}. "
            "Use AdamW."
        )
    if name == "LoRAPlus" and isinstance(stage.tuning, Full):
        raise InputError(f"{INIT}.optimizer.class_path: LoRAPlus needs a LoRA, got tuning {tuning}. Use AdamW.")
    if isinstance(spec, AdamW) and spec.weights != "float32":
        _check_bfloat16(stage, spec.weights)
    if spec.is_layerwise:
        _check_layerwise(stage)


def _check_bfloat16(stage: Stage, weights: str) -> None:
    where = f"{INIT}.optimizer.init_args.weights"
    if not isinstance(stage.tuning, Full):
        raise InputError(
            f"{where}: must be float32 unless the tuning is Full, got {weights} with {type(stage.tuning).__name__}. "
            "Change one of them."
        )
    if stage.backbone_spec.dtype not in ("auto", "bfloat16"):
        raise InputError(
            f"{where}: must be float32 with backbone.dtype: {stage.backbone_spec.dtype}, got {weights}. "
            "Set dtype: bfloat16."
        )


def _check_layerwise(stage: Stage) -> None:
    needs = "with optimizer.init_args.layerwise: true"
    if stage.max_grad_norm is not None:
        raise InputError(
            f"{INIT}.max_grad_norm: must be null {needs}, which never has all gradients at once, "
            f"got {stage.max_grad_norm}. Set null."
        )
    if stage.non_finite != "stop":
        raise InputError(
            f"{INIT}.non_finite: must be stop {needs}, which cannot take a step back, got {stage.non_finite}. Set stop."
        )
    if stage.task in ("ppo", "grpo"):
        raise InputError(
            f"{INIT}.optimizer.init_args.layerwise: must be false with {type(stage).__name__}, which may give a step "
            "up after its backward, got true. Set false."
        )


def check_fused(precision: str | int | None, *, fused: bool) -> None:
    """Refuse fused kernels under 16-mixed: Lightning would clip and log gradients that are still scaled.

    Raises:
        InputError: As said, in one line.
    """
    if precision == "16-mixed" and fused:
        raise InputError(
            f"{INIT}.optimizer.init_args.fused: must be false with trainer.precision: 16-mixed, got true. "
            "Change one of them."
        )


def check_in_run(spec: OptimizerSpec, trainer: Trainer, data: Any) -> None:
    """Refuse a trainer or batches under which an optimizer would not compute what it computes on one device.

    Args:
        spec: The optimizer.
        trainer: The trainer; it need not have started.
        data: The DataModule; None where the user brings loaders.

    Raises:
        InputError: As said, in one line.
    """
    name, kind = type(spec).__name__, strategy_kind(type(trainer.strategy))
    options = vars(spec)
    check_fused(trainer.precision, fused=bool(options.get("fused")))
    if trainer.precision == "16-mixed" and spec.keeps_bfloat16:
        raise InputError(f"trainer.precision: must be 32-true or bf16-mixed with {name}, got 16-mixed. Use bf16-mixed.")
    on_cpu = trainer.strategy.root_device.type == "cpu"
    if on_cpu and (name == "PagedAdamW" or options.get("paged")):
        where = "class_path: PagedAdamW" if name == "PagedAdamW" else "init_args.paged:"
        raise InputError(f"{INIT}.optimizer.{where} needs a GPU, got the CPU. Use AdamW, or AdamW8bit unpaged.")
    if kind not in spec.strategies:
        raise InputError(
            f"trainer.strategy: must be {' or '.join(spec.strategies)} with {name}, got {kind}. Use AdamW to shard."
        )
    if "ddp" not in spec.strategies and trainer.world_size > 1:
        raise InputError(f"trainer.devices: must be 1 with {name}, got {trainer.world_size} ranks. Set 1.")
    if spec.is_layerwise:
        _check_one_micro_batch(trainer, data)


def _check_one_micro_batch(trainer: Trainer, data: Any) -> None:
    needs = "with optimizer.init_args.layerwise: true"
    if trainer.world_size > 1:
        raise InputError(f"trainer.devices: must be 1 {needs}, got {trainer.world_size} ranks. Set 1.")
    if trainer.precision == "16-mixed":
        raise InputError(f"trainer.precision: must be 32-true or bf16-mixed {needs}, got 16-mixed. Use bf16-mixed.")
    if data is None:
        return  # the optimizer itself says so, once a second micro-batch comes
    size, step = data.arguments["micro_batch_size"], data.global_batch_size
    if size is None or size < step:
        raise InputError(
            f"data.micro_batch_size: must be at least data.global_batch_size, {step}, {needs}, for which a step is one "
            f"micro-batch, got {'none' if size is None else size}. Set {step}."
        )
