"""Judged answers become tensors: each response with its prompt, or the responses as branches over one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lf_lightning.data.collate import Array, Stretch, batch_of
from lf_lightning.data.encode import truncated_lengths
from lf_lightning.data.store import TokenStore
from lf_lightning.types import IGNORE, Document, FeedbackBatch, Layout, PreferenceBatch, TokenBatch, Unit


class Tree(NamedTuple):
    """A prompt and one or two responses to it. The last token of the prompt opens each branch: it predicts there."""

    trunk: Array  # the prompt but for its last token
    branches: tuple[Array, ...]  # each the last token of the prompt, then the tokens of a response
    first: int  # sequence of the first branch; the next one has the next number


def preference_batch(
    units: Sequence[Unit],
    store: TokenStore,
    *,
    layout: Layout,
    share_prompt: bool,
    reference: NDArray[np.float64] | None = None,
) -> PreferenceBatch:
    """Collate the pairs of one micro-batch.

    Args:
        units: One document each; none for a filler.
        store: Where the pairs lie.
        layout: `padded` gives each response a row, `padding_free` puts all into one.
        share_prompt: Run each prompt once for both responses; padding_free only.
        reference: Stored reference log-probs of all documents of the store; (D, 2, 2).
    """
    trees = [_pair(unit.spans[0].document, store, first=2 * index) for index, unit in enumerate(units)]
    rows = _documents_of(units)
    return PreferenceBatch(
        tokens=_batch(
            trees, layout=layout, share_prompt=share_prompt, num_units=len(units), num_sequences=2 * len(units)
        ),
        rows=torch.from_numpy(rows),
        margins=_looked_up(store.facts["margin"], rows, torch.float64),
        reference=None if reference is None else _looked_up(reference, rows, torch.float64),
    )


def feedback_batch(
    units: Sequence[Unit],
    store: TokenStore,
    *,
    layout: Layout,
    share_prompt: bool,
    max_length: int,
    reference: NDArray[np.float64] | None = None,
) -> FeedbackBatch:
    """Collate the feedback rows of one micro-batch, each beside its partner's response to the same prompt.

    Args:
        units: One document each; none for a filler.
        store: Where the rows lie.
        layout: `padded` gives each response a row, `padding_free` puts all into one.
        share_prompt: Run a prompt once for both responses where both leave it equally long; padding_free only.
        max_length: Most tokens of prompt and response together: each of the two pairings is cut by its own lengths.
        reference: Stored reference log-probs of all documents of the store; (D, 2).
    """
    own = [_judged(unit, None, store, max_length, first=index) for index, unit in enumerate(units)]
    others = [
        _judged(unit, unit.partner, store, max_length, first=index)
        for index, unit in enumerate(units)
        if unit.partner is not None
    ]
    by_unit = {tree.first: tree for tree in others}
    both = list(chain.from_iterable(_side_by_side(tree, by_unit.get(tree.first)) for tree in own))
    lay: dict[str, Any] = {"layout": layout, "share_prompt": share_prompt}
    rows, num_units = _documents_of(units), len(units)
    return FeedbackBatch(
        responses=_batch(own, **lay, num_units=num_units, num_sequences=num_units),
        mismatched=_batch(others, **lay, num_units=len(others), num_sequences=num_units),
        both=_batch(both, **lay, num_units=num_units, num_sequences=2 * num_units),
        rows=torch.from_numpy(rows),
        is_desirable=_looked_up(store.facts["is_desirable"], rows, torch.bool),
        has_partner=torch.tensor([unit.partner is not None for unit in units], dtype=torch.bool),
        reference=None if reference is None else _looked_up(reference, rows, torch.float64),
    )


def preference_costs(units: Sequence[Unit], store: TokenStore, *, layout: Layout, share_prompt: bool) -> list[int]:
    """Tokens that each pair takes in a micro-batch; padded, two rows as long as the longer one."""
    documents = _documents_of(units)
    prompt, chosen = (store.facts[name][documents] for name in ("prompt_length", "chosen_length"))
    rejected = store.lengths[documents] - prompt - chosen
    if layout == "padded":
        costs = 2 * (prompt + np.maximum(chosen, rejected))
    else:
        costs = chosen + rejected + (prompt + 1 if share_prompt else 2 * prompt)
    return [int(cost) for cost in costs]


def feedback_costs(
    units: Sequence[Unit], store: TokenStore, *, layout: Layout, share_prompt: bool, max_length: int
) -> list[int]:
    """Tokens that each feedback row takes with its partner's response; padded, two rows as long as the longer one."""
    costs = []
    for unit in units:
        document = unit.spans[0].document
        prompt, response = _cut(document, document, store, max_length)
        if unit.partner is None:
            costs.append(prompt + response)
            continue
        beside, partner = _cut(document, unit.partner, store, max_length)
        if layout == "padded":
            costs.append(2 * max(prompt + response, beside + partner))
        else:
            shared = share_prompt and prompt == beside
            costs.append(response + partner + (prompt + 1 if shared else prompt + beside))
    return costs


def _documents_of(units: Sequence[Unit]) -> NDArray[np.int64]:
    return np.array([unit.spans[0].document for unit in units], dtype=np.int64)


def _looked_up(table: NDArray[Any], rows: NDArray[np.int64], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(table[rows])).to(dtype)


def _pair(document: int, store: TokenStore, *, first: int) -> Tree:
    ids, _ = store.document(document)
    prompt = int(store.facts["prompt_length"][document])
    end = prompt + int(store.facts["chosen_length"][document])
    last = ids[prompt - 1 : prompt]
    return Tree(ids[: prompt - 1], (ids[prompt - 1 : end], np.concatenate([last, ids[end:]])), first)


def _cut(document: int, response: int, store: TokenStore, max_length: int) -> tuple[int, int]:
    """Tokens that the prompt of one document and the response of another keep together."""
    source, target = store.facts["full_prompt_length"][document], store.facts["full_response_length"][response]
    return truncated_lengths(int(source), int(target), max_length)


def _judged(unit: Unit, partner: int | None, store: TokenStore, max_length: int, *, first: int) -> Tree:
    """The prompt of a unit with its own response, or with its partner's."""
    document = unit.spans[0].document
    answering = document if partner is None else partner
    prompt, response = _cut(document, answering, store, max_length)
    ids, (others, _) = store.document(document)[0], store.document(answering)
    begin = int(store.facts["prompt_length"][answering])
    branch = np.concatenate([ids[prompt - 1 : prompt], others[begin : begin + response]])
    return Tree(ids[: prompt - 1], (branch,), first)


def _side_by_side(own: Tree, other: Tree | None) -> list[Tree]:
    """A response and its partner's as sequences 2 i and 2 i + 1, over one trunk where theirs are equally long."""
    first = 2 * own.first
    if other is None:
        return [own._replace(first=first)]
    if len(own.trunk) == len(other.trunk):
        return [Tree(own.trunk, (*own.branches, *other.branches), first)]
    return [own._replace(first=first), other._replace(first=first + 1)]


def _batch(
    trees: Sequence[Tree], *, layout: Layout, share_prompt: bool, num_units: int, num_sequences: int
) -> TokenBatch:
    stretches = chain.from_iterable(
        _stretches(tree, shared=share_prompt and layout == "padding_free") for tree in trees
    )
    return batch_of(
        [[stretch] for stretch in stretches], layout=layout, num_units=num_units, num_sequences=num_sequences
    )


def _stretches(tree: Tree, *, shared: bool) -> list[Stretch]:
    """A tree as one stretch, or each branch with the trunk as its own."""
    if shared and len(tree.trunk) and len(tree.branches) > 1:
        lengths = tuple(len(branch) for branch in tree.branches)
        return [_stretch(tree, Document(len(tree.trunk), lengths))]
    parts = [Tree(tree.trunk, (branch,), tree.first + index) for index, branch in enumerate(tree.branches)]
    return [_stretch(part, Document(len(part.trunk) + len(part.branches[0]))) for part in parts]


def _stretch(tree: Tree, document: Document) -> Stretch:
    """Positions of each branch go on from the trunk; nothing is predicted in the trunk or after a branch."""
    start = len(tree.trunk)
    unpredicted = np.full(1, IGNORE, np.int32)
    ids, targets, positions, sequences = [tree.trunk], [np.full(start, IGNORE, np.int32)], [np.arange(start)], []
    for index, branch in enumerate(tree.branches):
        ids.append(branch)
        targets += [branch[1:], unpredicted]
        positions.append(np.arange(start, start + len(branch)))
        sequences.append(np.full(len(branch), tree.first + index))
    sequences = [np.zeros(start, np.int64), *sequences]
    return Stretch(document, *(np.concatenate(parts) for parts in (ids, targets, positions, sequences)))
