"""Attention for rows without padding: every document attends to itself, one after the other.

Registered with transformers' AttentionInterface without a mask function; the documents travel as keyword arguments of
the model call. Extras that a family passes (sliding window, softcap, sinks) are honoured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from lf_lightning.types import Document

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
    documents: tuple[Document, ...] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document with PyTorch's fused kernel.

    A token sees itself and what comes before it in its document; in a branch it sees the trunk and its own branch.

    Args:
        module: The attention layer that calls.
        query: (1, heads, T, D).
        key: (1, key heads, T, D); key heads divide heads.
        value: Like `key`.
        attention_mask: Must be None: this attention serves only calls that carry documents.
        documents: The documents, in order; their tokens add up to T.
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
    stretches = _stretches(documents, attention_mask, query)
    outputs = []
    for q, k, v in _pieces(stretches, query, key, value):
        mask = _mask(q.shape[2], k.shape[2], sliding_window, q.device)
        outputs.append(
            scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
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
    documents: tuple[Document, ...] | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The same written out: scores, cap, window, sinks, softmax in float32. Arguments as `sdpa_document_attention`."""
    stretches = _stretches(documents, attention_mask, query)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    for q, k, v in _pieces(stretches, query, key, value):
        scores = scale * (q @ k.transpose(2, 3))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        visible = _visible(q.shape[2], k.shape[2], sliding_window, q.device)
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
        if s_aux is not None:
            sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        accurate = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=accurate).to(q.dtype)[..., : k.shape[2]]
        outputs.append(drop(weights, dropout, training=module.training) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _stretches(
    documents: tuple[Document, ...] | None, attention_mask: Tensor | None, query: Tensor
) -> list[tuple[int, int]]:
    """Cut the row into stretches of tokens that attend causally to themselves.

    Returns:
        Length of each stretch, and how many tokens it sees before its own: the first tokens of the last stretch that
        has none before it. The trunk and its first branch lie side by side and are one such stretch.
    """
    if documents is None or attention_mask is not None:
        raise ValueError(
            "document attention was called without document lengths or with a mask: it would silently ignore padding. "
            "Call it through Backbone, or use Backbone.padded_attention() for generation."
        )
    assert query.shape[0] == 1, "documents lie in one row"
    assert sum(document.num_tokens for document in documents) == query.shape[2], "documents fill the row"
    stretches = []
    for trunk, branches in documents:
        stretches.append((trunk + sum(branches[:1]), 0))
        stretches += [(branch, trunk) for branch in branches[1:]]
    return stretches


def _pieces(stretches: list[tuple[int, int]], *row: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each stretch; the keys are those of the trunk, then its own."""
    lengths = [length for length, _ in stretches]
    seen: tuple[Tensor, ...] = row[1:]
    for (_, trunk), q, *own in zip(stretches, *(part.split(lengths, dim=2) for part in row), strict=True):
        if trunk:
            k, v = (torch.cat([part[:, :, :trunk], after], dim=2) for part, after in zip(seen, own, strict=True))
        else:
            k, v = seen = tuple(own)
        yield q, k, v


def _mask(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Any:
    """What the fused kernel takes as its mask; None where it needs no more than to be causal."""
    if sliding_window is not None and num_keys > sliding_window:
        return _visible(num_queries, num_keys, sliding_window, device)
    if num_queries == num_keys:
        return None
    if device.type == "cuda":  # flash attention takes this one without a mask; elsewhere it becomes a mask anyway
        return causal_lower_right(num_queries, num_keys)
    return _visible(num_queries, num_keys, None, device)


def _visible(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """True where a query (row) may look at a key (column): causal, the last query at the last key, in the window."""
    distance = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    distance = distance - torch.arange(num_keys, device=device)[None, :]
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)
