"""From a stage's specs to its optimizer and schedule; what differs where parameters are not all stepped together."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from lf_lightning.models import Backbone
from lf_lightning.models.adapters import decoder_blocks
from lf_lightning.models.sharding import clip_gradients
from lf_lightning.optim import LayerwiseOptimizer, PartialOptimizer, describe, trained_parameters
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from lf_lightning.stages.base import Stage


def optimizer_and_schedule(stage: Stage) -> dict[str, Any]:
    """Make the optimizer of a stage's trainable parameters, and its schedule in optimizer steps.

    Raises:
        InputError: The optimizer cannot train these parameters.
    """
    trained = describe(stage, **_anatomy(stage.backbone))
    if stage.optimizer_spec.keeps_bfloat16 and any(each.parameter.dtype == torch.float16 for each in trained):
        raise InputError(
            f"model.init_args.backbone.dtype: must be bfloat16 or float32 with {type(stage.optimizer_spec).__name__}, "
            "got float16. Set bfloat16."
        )
    optimizer = stage.optimizer_spec.build(trained, seed=stage.seed)
    schedule = stage.schedule_spec.build(optimizer, stage.trainer.estimated_stepping_batches)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _anatomy(backbone: Backbone) -> dict[str, Any]:
    """Heads, blocks and the size of an attention head of a model, as `describe` takes them."""
    model = backbone.causal_lm
    heads: list[nn.Module] = [head for head in (model.get_output_embeddings(), backbone.value_head) if head is not None]
    config = model.config.get_text_config().to_dict()
    size = config.get("head_dim") or config["hidden_size"] // config.get("num_attention_heads", 1)
    try:
        blocks = list(decoder_blocks(model))
    except InputError:  # a family without a list of blocks: an optimizer that needs them says so
        blocks = []
    return {"heads": heads, "blocks": blocks, "head_size": size}


def active_part(optimizer: Optimizer) -> AbstractContextManager[Any]:
    """Let gradients reach what the optimizer is about to step, where that is not everything."""
    return optimizer.only_active() if isinstance(optimizer, PartialOptimizer) else nullcontext()


def clipped_norm(optimizer: Optimizer, max_norm: float | None) -> float:
    """Clip the gradients of a step, and give their norm before; a layerwise optimizer has used them up already."""
    if isinstance(optimizer, LayerwiseOptimizer):
        return optimizer.grad_norm
    return float(clip_gradients(trained_parameters(optimizer), max_norm))
