"""Attention for rows without padding: every document attends to itself, one after the other, and no mask is built.

Registered with transformers' AttentionInterface without a mask function; the lengths of the documents travel as keyword
arguments of the model call. Extras that a family passes (sliding window, softcap, sinks) are honoured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

SDPA_DOCUMENTS = "lf_documents_sdpa"
EAGER_DOCUMENTS = "lf_documents_eager"


def register() -> None:
    """Make the two kernels known to transformers under their names."""
    from transformers import AttentionInterface

    AttentionInterface.register(SDPA_DOCUMENTS, sdpa_document_attention)
    AttentionInterface.register(EAGER_DOCUMENTS, eager_document_attention)


def sdpa_document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: tuple[int, ...] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document with PyTorch's fused kernel.

    Args:
        module: The attention layer that calls.
        query: (1, heads, T, D).
        key: (1, key heads, T, D); key heads divide heads.
        value: Like `key`.
        attention_mask: Must be None: this attention serves only calls that carry documents.
        documents: Length of each document; they add up to T.
        scaling: Factor of the scores; None means 1 / sqrt(D).
        dropout: Probability of dropping an attention weight.
        sliding_window: A token sees itself and this many tokens less one before it; None means all.
        softcap: Scores become softcap * tanh(score / softcap).
        s_aux: Attention sinks, one logit a head; (heads,).

    Returns:
        The attended values, (1, T, heads, D), and None for the weights, which are never held.
    """
    if softcap is not None or s_aux is not None:
        return eager_document_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            documents=documents,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            s_aux=s_aux,
        )
    lengths = _checked(documents, attention_mask, query)
    outputs = []
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        windowed = sliding_window is not None and q.shape[2] > sliding_window
        outputs.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=_visible(q.shape[2], sliding_window, q.device) if windowed else None,
                is_causal=not windowed,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def eager_document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: tuple[int, ...] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same written out: scores, cap, window, sinks, softmax in float32. Arguments as `sdpa_document_attention`."""
    lengths = _checked(documents, attention_mask, query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    for q, k, v in zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True):
        scores = scale * (q @ k.transpose(2, 3))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~_visible(q.shape[2], sliding_window, q.device), torch.finfo(scores.dtype).min)
        if s_aux is not None:
            sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        accurate = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=accurate).to(q.dtype)[..., : k.shape[2]]
        outputs.append(drop(weights, dropout, training=module.training) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _checked(documents: tuple[int, ...] | None, attention_mask: Tensor | None, query: Tensor) -> list[int]:
    if documents is None or attention_mask is not None:
        raise ValueError(
            "document attention was called without document lengths or with a mask: it would silently ignore padding. "
            "Call it through Backbone, or use Backbone.padded_attention() for generation."
        )
    assert query.shape[0] == 1, "documents lie in one row"
    assert sum(documents) == query.shape[2], "documents fill the row"
    return list(documents)


def _visible(length: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """True where a query (row) may look at a key (column): causal, and within the window; (length, length)."""
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)
