"""Rewards of the contract runs: plain functions of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def spread(prompts: Sequence[str], responses: Sequence[str], batch: Any) -> list[float]:
    """Something that differs from response to response, and depends on the prompt too."""
    pairs = zip(batch.prompt_ids, batch.response_ids, strict=True)
    return [(sum(response) * 7 + sum(prompt)) % 13 / 4 - 1 for prompt, response in pairs]


def length(prompts: Sequence[str], responses: Sequence[str], batch: Any, *, per: float) -> list[float]:
    """Tokens of the response."""
    return [len(response) / per for response in batch.response_ids]
