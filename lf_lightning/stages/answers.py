"""Answers to a batch of prompts, as `predict` and callbacks want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lf_lightning.models import GenerationSpec, TransformersEngine
from lf_lightning.stages.deepspeed import check_generates
from lf_lightning.types import Answer, PromptBatch

if TYPE_CHECKING:
    from lf_lightning.stages.base import Stage


def answers_of(
    stage: Stage, batch: PromptBatch, spec: GenerationSpec, *, seeds: Sequence[int] | None = None
) -> list[Answer]:
    """Generate an answer to each prompt; fillers are left out.

    Args:
        stage: Connected to its trainer.
        batch: Prompts, on the stage's device.
        spec: How to choose tokens.
        seeds: With sampling, as `GenerationEngine.generate` takes them.

    Raises:
        InputError: The strategy has no whole weights to generate with.
    """
    check_generates(stage.trainer.strategy)
    data, engine = stage.data, TransformersEngine()
    assert data is not None, "answers need the DataModule's tokenizer"
    with engine.ready(stage.backbone):
        tokens = engine.generate(stage.backbone, batch, spec, stop_token_ids=data.stop_token_ids, seeds=seeds)
    texts = data.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    answers = map(Answer._make, zip(batch.rows, batch.prompts, texts, batch.references, strict=True))
    return [answer for answer in answers if answer.row >= 0]
