"""Responses with their prompts become tensors, each token beside its place in the rollout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from lf_lightning.data.collate import Stretch, batch_of
from lf_lightning.types import IGNORE, Document, Layout, RolloutBatch


class Exchange(NamedTuple):
    """A prompt and the response to it."""

    prompt_ids: tuple[int, ...]  # at least one
    response_ids: tuple[int, ...]  # at least one
    row: int  # place of the response in its rollout
    first: int  # place of its first token among those of all responses, laid end to end by row

    @property
    def num_tokens(self) -> int:
        """Tokens of both."""
        return len(self.prompt_ids) + len(self.response_ids)


def rollout_batch(exchanges: Sequence[Exchange], *, layout: Layout) -> RolloutBatch:
    """Collate the responses of one micro-batch; only their tokens are predicted.

    Args:
        exchanges: At least one, or none for a filler.
        layout: `padded` gives each a row, `padding_free` puts all into one.
    """
    rows = [[_stretch(exchange, index)] for index, exchange in enumerate(exchanges)]
    tokens = batch_of(rows, layout=layout, num_units=len(exchanges), num_sequences=len(exchanges))
    places = torch.full_like(tokens.targets, -1)
    if exchanges:  # what counts stands in the order of the exchanges in either layout
        known = [np.arange(exchange.first, exchange.first + len(exchange.response_ids)) for exchange in exchanges]
        places[tokens.targets != IGNORE] = torch.from_numpy(np.concatenate(known))
    return RolloutBatch(tokens, torch.tensor([exchange.row for exchange in exchanges], dtype=torch.int64), places)


def exchanges_of(prompts: Sequence[tuple[int, ...]], responses: Sequence[tuple[int, ...]]) -> list[Exchange]:
    """Prompts beside their responses, numbered in this order.

    Args:
        prompts: Token ids of R prompts.
        responses: Token ids of the response to each.
    """
    firsts = np.cumsum([0, *(len(response) for response in responses)])[:-1].tolist()
    pairs = zip(prompts, responses, firsts, strict=True)
    return [Exchange(prompt, response, row, first) for row, (prompt, response, first) in enumerate(pairs)]


def _stretch(exchange: Exchange, index: int) -> Stretch:
    """Nothing is predicted in the prompt but the first token of the response, by its last."""
    ids = np.array(exchange.prompt_ids + exchange.response_ids, np.int32)
    targets = np.full(len(ids), IGNORE, np.int32)
    targets[len(exchange.prompt_ids) - 1 : -1] = exchange.response_ids
    places = np.arange(len(ids), dtype=np.int32)
    return Stretch(Document(len(ids)), ids, targets, places, np.full(len(ids), index))
