"""Units of a token store become tensors: padded rows, or one row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lf_lightning.data.prompts import Prompt
from lf_lightning.types import IGNORE, Layout, PromptBatch, TokenBatch, Unit

Array = NDArray[np.int32]


class Tokens(Protocol):
    """Where the tokens lie: `document(index)` gives the input ids and the labels (unshifted) of one document."""

    def document(self, index: int) -> tuple[Array, Array]:
        """Input ids and labels of a document, both (length,)."""


def token_batch(units: Sequence[Unit], tokens: Tokens, *, layout: Layout, isolate: bool) -> TokenBatch:
    """Collate the units of one micro-batch.

    Targets are the labels moved one to the left inside each document, so that a document's first token is never
    predicted from its neighbour.

    Args:
        units: At least one unit, or none for a filler: a real input of two tokens of which nothing counts.
        tokens: Where the units' tokens lie.
        layout: `padded` gives one row a unit, `padding_free` one row for all.
        isolate: Documents of a pack do not see each other.
    """
    rows = [_documents(unit, tokens, isolate=isolate) for unit in units]
    num_tokens = sum(len(ids) for row in rows for ids, _ in row)
    if not rows:
        rows = [[(np.zeros(2, dtype=np.int32), np.full(2, IGNORE, dtype=np.int32))]]
    if layout == "padding_free":
        rows = [[document for row in rows for document in row]]
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    input_ids = np.zeros((len(rows), length), dtype=np.int64)  # any word pads: nothing looks at it, nothing counts it
    targets = np.full((len(rows), length), IGNORE, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    for index, row in enumerate(rows):
        start = 0
        for ids, labels in row:
            end = start + len(ids)
            input_ids[index, start:end] = ids
            targets[index, start : end - 1] = labels[1:]
            positions[index, start:end] = np.arange(len(ids))
            start = end
        positions[index, start:] = np.arange(length - start)
    free = layout == "padding_free"
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions) if free or any(len(row) > 1 for row in rows) else None,
        documents=tuple(len(ids) for ids, _ in rows[0]) if free else None,
        num_units=len(units),
        num_tokens=num_tokens,
    )


def _documents(unit: Unit, tokens: Tokens, *, isolate: bool) -> list[tuple[Array, Array]]:
    """The stretches of a unit that attend to each other: its spans, or all of them as one."""
    parts = []
    for span in unit.spans:
        ids, labels = tokens.document(span.document)
        parts.append((ids[span.start : span.end], labels[span.start : span.end]))
    if isolate or len(parts) == 1:
        return parts
    return [(np.concatenate([ids for ids, _ in parts]), np.concatenate([labels for _, labels in parts]))]


def prompt_batch(prompts: Sequence[Prompt], rows: Sequence[int], *, pad_id: int) -> PromptBatch:
    """Collate prompts for generation, padded on the left.

    Args:
        prompts: At least one prompt.
        rows: Position of each prompt in its set; -1 for a filler.
        pad_id: Token that pads.
    """
    length = max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), length), dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        start = length - len(prompt.ids)
        input_ids[index, start:] = torch.tensor(prompt.ids)
        mask[index, start:] = 1
    return PromptBatch(
        input_ids=input_ids,
        mask=mask,
        rows=tuple(rows),
        prompts=tuple(prompt.text for prompt in prompts),
        references=tuple(prompt.reference for prompt in prompts),
    )
