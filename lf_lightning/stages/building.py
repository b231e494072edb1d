"""From a stage's specs to the model that it trains, on the trainer's devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.strategies import ModelParallelStrategy

from lf_lightning.console import say
from lf_lightning.models import Backbone, load_backbone
from lf_lightning.models.export import load_weights
from lf_lightning.models.probe import check_output_layer
from lf_lightning.models.sharding import shard

if TYPE_CHECKING:
    from lf_lightning.stages.base import Stage


def build_backbone(stage: Stage) -> Backbone:
    """Load the model, extend and check it, shard it where the strategy asks for it, and leave it in train mode.

    Args:
        stage: Connected to its trainer.
    """
    data = stage.data
    vocab_size = len(data.tokenizer) if data is not None else 0
    backbone = load_backbone(stage.backbone_spec, stage.tuning, vocab_size=vocab_size, seed=stage.seed)
    if data is not None:
        backbone.causal_lm.generation_config.eos_token_id = data.stop_token_ids
        backbone.causal_lm.generation_config.pad_token_id = data.tokenizer.pad_token_id
    stage.extend_backbone(backbone)
    if stage.weights_folder is not None:
        load_weights(backbone, stage.weights_folder)
    check_output_layer(backbone)
    if isinstance(stage.trainer.strategy, ModelParallelStrategy):
        assert stage.device_mesh is not None
        shard(backbone, stage.device_mesh)
    trained, everything = backbone.num_parameters()
    share = f", {trained:,} of them train ({100 * trained / everything:.2f} %)"
    place = f" on {stage.trainer.world_size} x {stage.trainer.strategy.root_device}"
    say(f"model: {everything:,} parameters{share if stage.trainer.state.fn == 'fit' else ''}{place}")
    return backbone.train()
