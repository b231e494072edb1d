"""Answers to prompts, through transformers' generate with its cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lf_lightning.models.backbone import Backbone
from lf_lightning.types import GenerationSpec, PromptBatch


@torch.no_grad()
def generate_answers(
    backbone: Backbone, batch: PromptBatch, spec: GenerationSpec, *, stop_token_ids: Sequence[int]
) -> Tensor:
    """Continue each prompt up to a stop token.

    Args:
        backbone: The model; its mode is put back afterwards.
        batch: Prompts, padded on the left; (B, T).
        spec: How to choose tokens.
        stop_token_ids: Tokens that end an answer; the first one fills answers that ended early.

    Returns:
        New tokens only, (B, at most max_new_tokens), on the device of the prompts.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        do_sample=spec.do_sample,
        temperature=spec.temperature if spec.do_sample else None,
        top_p=spec.top_p if spec.do_sample else None,
        top_k=spec.top_k if spec.do_sample else None,
        num_beams=spec.num_beams,
        repetition_penalty=spec.repetition_penalty,
        eos_token_id=list(stop_token_ids),
        pad_token_id=stop_token_ids[0],
        use_cache=True,
    )
    was_training = backbone.training
    backbone.eval()
    causal_lm: Any = backbone.causal_lm  # transformers leaves generate untyped
    with backbone.padded_attention():
        tokens: Tensor = causal_lm.generate(
            input_ids=batch.input_ids, attention_mask=batch.mask, generation_config=config
        )
    backbone.train(was_training)
    return tokens[:, batch.input_ids.shape[1] :]
