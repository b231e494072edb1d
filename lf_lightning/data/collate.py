"""Units of a token store become tensors: padded rows, or one row without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lf_lightning.data.prompts import Prompt
from lf_lightning.types import IGNORE, Document, Layout, PromptBatch, TokenBatch, Unit

Array = NDArray[np.int32]


class Tokens(Protocol):
    """Where the tokens lie: `document(index)` gives the input ids and the labels (unshifted) of one document."""

    def document(self, index: int) -> tuple[Array, Array]:
        """Input ids and labels of a document, both (length,)."""


class Stretch(NamedTuple):
    """Tokens that lie side by side in one row and attend to nothing else of it. L tokens."""

    document: Document
    input_ids: Array  # (L,)
    targets: Array  # (L,) already shifted
    positions: Array  # (L,)
    sequences: Array | None = None  # (L,) the sequence whose token is predicted; looked at where a target counts


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
    rows = [[_stretch(*document) for document in _documents(unit, tokens, isolate=isolate)] for unit in units]
    return batch_of(rows, layout=layout, num_units=len(units))


def batch_of(
    rows: Sequence[Sequence[Stretch]], *, layout: Layout, num_units: int, num_sequences: int | None = None
) -> TokenBatch:
    """Lay stretches out as one micro-batch.

    Args:
        rows: The stretches of each row of the padded layout; `padding_free` puts all into one. None at all make a
            filler.
        layout: `padded` or `padding_free`.
        num_units: Units in it.
        num_sequences: Sequences that are told apart; None where nobody asks.
    """
    num_tokens = sum(len(stretch.input_ids) for row in rows for stretch in row)
    filler = Stretch(Document(2), np.zeros(2, np.int32), np.full(2, IGNORE, np.int32), np.arange(2, dtype=np.int32))
    lines = [row for row in rows if row] or [[filler]]
    if layout == "padding_free":
        lines = [[stretch for row in lines for stretch in row]]
    shape = len(lines), max(sum(len(stretch.input_ids) for stretch in row) for row in lines)
    input_ids = np.zeros(shape, dtype=np.int64)  # any word pads: nothing looks at it, nothing counts it
    targets = np.full(shape, IGNORE, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    sequences = None if num_sequences is None else np.full(shape, num_sequences, dtype=np.int64)
    for index, row in enumerate(lines):
        start = 0
        for stretch in row:
            end = start + len(stretch.input_ids)
            input_ids[index, start:end] = stretch.input_ids
            targets[index, start:end] = stretch.targets
            positions[index, start:end] = stretch.positions
            if sequences is not None and stretch.sequences is not None:
                counted = stretch.targets != IGNORE
                sequences[index, start:end][counted] = stretch.sequences[counted]
            start = end
        positions[index, start:] = np.arange(shape[1] - start)
    free = layout == "padding_free"
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions) if free or any(len(row) > 1 for row in lines) else None,
        documents=tuple(stretch.document for stretch in lines[0]) if free else None,
        num_units=num_units,
        num_tokens=num_tokens,
        sequences=None if sequences is None else torch.from_numpy(sequences),
        num_sequences=num_sequences or 0,
    )


def _stretch(ids: Array, labels: Array) -> Stretch:
    targets = np.empty_like(labels)
    targets[:-1], targets[-1] = labels[1:], IGNORE
    return Stretch(Document(len(ids)), ids, targets, np.arange(len(ids), dtype=np.int32))


def _documents(unit: Unit, tokens: Tokens, *, isolate: bool) -> list[tuple[Array, Array]]:
    """The stretches of a unit that attend to each other: its spans, or all of them as one."""
    parts = []
    for span in unit.spans:
        ids, labels = tokens.document(span.document)
        parts.append((ids[span.start : span.end], labels[span.start : span.end]))
    if isolate or len(parts) == 1:
        return parts
    return [(np.concatenate([ids for ids, _ in parts]), np.concatenate([labels for _, labels in parts]))]


def prompt_batch(
    prompts: Sequence[Prompt], rows: Sequence[int], *, pad_id: int, max_length: int | None = None
) -> PromptBatch:
    """Collate prompts for generation, padded on the left.

    Args:
        prompts: At least one prompt.
        rows: Position of each prompt in its set; -1 for a filler.
        pad_id: Token that pads.
        max_length: Most tokens of prompt and answer together; None where nothing limits them.
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
        limits=() if max_length is None else tuple(max_length - len(prompt.ids) for prompt in prompts),
    )
