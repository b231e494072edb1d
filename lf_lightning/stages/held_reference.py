"""The reference of a stage: made of the policy before it trains, or a model beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from lf_lightning.models import Backbone, Reference, ReferenceSpec, Tuning, load_reference
from lf_lightning.models.reference import resolved_kind
from lf_lightning.models.sharding import shard
from lf_lightning.shards import reading_dim
from lf_lightning.stages.building import keeps_bfloat16, new_rows_of, place_of, sharing_mesh

if TYPE_CHECKING:
    from lf_lightning.stages.base import Stage


class HeldReference:
    """Keeps a stage's reference out of its modules: its weights are in no checkpoint and no optimizer.

    Args:
        spec: Which reference; None where the loss knows none.
        tuning: How the policy is tuned.
    """

    def __init__(self, spec: ReferenceSpec | None, tuning: Tuning) -> None:
        self.spec = spec
        self.is_separate = spec is not None and resolved_kind(spec, tuning) in ("copy", "model")
        self.model: Reference | None = None
        """None before it is made, and where nothing needs it any more."""

    def take_from(self, stage: Stage, policy: Backbone) -> None:
        """Make a reference of the policy's own weights, before it gets any trained ones or is sharded."""
        if self.spec is not None and not self.is_separate:
            self.model = self._loaded(self.spec, stage, policy)

    def companions(self, stage: Stage) -> list[Backbone]:
        """The reference where it is a model of its own, loaded when this is first asked."""
        if self.spec is None or not self.is_separate:
            return []
        if self.model is None:
            self.model = self._loaded(self.spec, stage, stage.backbone)
            mesh = sharing_mesh(stage)
            if mesh is not None:
                shard(self.model.backbone, mesh)
        return [self.model.backbone]

    def _loaded(self, spec: ReferenceSpec, stage: Stage, policy: Backbone) -> Reference:
        vocab_size = len(stage.data.tokenizer) if stage.data is not None else 0
        mesh = sharing_mesh(stage)
        return load_reference(
            spec,
            policy,
            stage.backbone_spec,
            stage.tuning,
            vocab_size=vocab_size,
            seed=stage.seed,
            device=place_of(stage, spec.quantization or stage.backbone_spec.quantization),
            mesh=reading_dim(mesh) if mesh is not None else None,
            new_rows=new_rows_of(stage),
            keeps_bfloat16=keeps_bfloat16(stage),
        )


@contextmanager
def quiet(backbone: Backbone) -> Iterator[None]:
    """Evaluation mode without gradients, for constants of a step or of a rollout."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(was_training)
