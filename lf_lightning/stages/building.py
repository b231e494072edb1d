"""From a stage's specs to the model that it trains, on the trainer's devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lf_lightning.console import say
from lf_lightning.models import Backbone, Full, load_backbone
from lf_lightning.models.export import load_weights
from lf_lightning.models.new_tokens import NewRows
from lf_lightning.models.probe import check_output_layer
from lf_lightning.models.sharding import check_sharded, cut_again, shard
from lf_lightning.shards import reading_dim
from lf_lightning.stages.fsdp2 import FSDP2Strategy
from lf_lightning.types import InputError, Quantization

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lf_lightning.stages.base import Stage


def sharing_mesh(stage: Stage) -> DeviceMesh | None:
    """The ranks that share a stage's model; None where each has one of its own."""
    strategy = stage.trainer.strategy
    return strategy.sharing_mesh if isinstance(strategy, FSDP2Strategy) else None


def check_gradients_meet(stage: Stage) -> None:
    """Make sure that the gradient of everything that trains is reduced over ranks.

    Raises:
        InputError: Something was added after the model was sharded.
    """
    if sharing_mesh(stage) is not None:
        check_sharded(stage.backbone)


def new_rows_of(stage: Stage) -> NewRows:
    """Words that the data's tokenizer has and the model does not know yet.

    Raises:
        InputError: There is no DataModule, which alone knows their ids.
    """
    if stage.data is not None:
        return stage.data.new_rows  # type: ignore[no-any-return]  # no stage imports the DataModule
    if stage.backbone_spec.added_tokens:
        raise InputError(
            "model.init_args.backbone.new_tokens: need a DataModule, whose tokenizer learns them, got loaders. "
            "Pass datamodule=DataModule(...)."
        )
    return {}


def place_of(stage: Stage, quantization: Quantization | None) -> torch.device | None:
    """Where a model is built: on its GPU where weights are quantized while they are read, else on the CPU (None)."""
    device = stage.trainer.strategy.root_device
    return device if quantization is not None and device.type == "cuda" else None


def keeps_bfloat16(stage: Stage) -> bool:
    """Whether what trains stays bfloat16, since the optimizer knows how to step it."""
    return stage.optimizer_spec.keeps_bfloat16 and isinstance(stage.tuning, Full)


def build_backbone(stage: Stage) -> Backbone:
    """Load the model, extend and check it, shard it where the strategy asks for it, and leave it in train mode.

    Args:
        stage: Connected to its trainer.
    """
    data = stage.data
    vocab_size = len(data.tokenizer) if data is not None else 0
    mesh = sharing_mesh(stage)
    reading = reading_dim(mesh) if mesh is not None else None
    backbone = load_backbone(
        stage.backbone_spec,
        stage.tuning,
        vocab_size=vocab_size,
        seed=stage.seed,
        mesh=reading,
        keeps_bfloat16=keeps_bfloat16(stage),
        device=place_of(stage, stage.backbone_spec.quantization),
        new_rows=new_rows_of(stage),
    )
    if data is not None:
        backbone.causal_lm.generation_config.eos_token_id = data.stop_token_ids
        backbone.causal_lm.generation_config.pad_token_id = data.tokenizer.pad_token_id
    stage.extend_backbone(backbone)
    if mesh is not None:
        shard(backbone, mesh)
    if stage.weights_folder is not None:
        load_weights(backbone, stage.weights_folder)
    check_output_layer(backbone)
    cut_again(backbone)
    trained, everything = backbone.num_parameters()
    share = f", {trained:,} of them train ({100 * trained / everything:.2f} %)"
    place = f" on {stage.trainer.world_size} x {stage.trainer.strategy.root_device}"
    say(f"model: {everything:,} parameters{share if stage.trainer.state.fn == 'fit' else ''}{place}")
    return backbone.train()
