"""From documents to units: one sequence each, or packs of `max_length` tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lf_lightning.types import Span, Unit

Lengths = Sequence[int] | NDArray[np.int64]
"""Tokens of each document."""


def sequence_units(lengths: Lengths, documents: NDArray[np.int64] | None = None) -> list[Unit]:
    """One unit for each document, in their order.

    Args:
        lengths: Tokens of each document; (D,).
        documents: Number of each document; (D,). From 0 unless given.
    """
    numbers = range(len(lengths)) if documents is None else documents.tolist()  # plain numbers: a tenth of the time
    plain = np.asarray(lengths).tolist()
    return [Unit((Span(document, 0, length),)) for document, length in zip(numbers, plain, strict=True)]


def block_units(lengths: Lengths, max_length: int, order: Iterable[int]) -> list[Unit]:
    """All documents in a row, cut every `max_length` tokens; the last block may be shorter, no token is lost.

    Args:
        lengths: Tokens of each document.
        max_length: Tokens of a block, > 0.
        order: Documents in the order in which they are laid out.
    """
    units, spans, room = [], [], max_length
    for document in order:
        start, length = 0, int(lengths[document])
        while start < length:
            end = min(length, start + room)
            spans.append(Span(document, start, end))
            room -= end - start
            start = end
            if room == 0:
                units.append(Unit(tuple(spans)))
                spans, room = [], max_length
    if spans:
        units.append(Unit(tuple(spans)))
    return units


def knapsack_units(lengths: Lengths, max_length: int, order: Iterable[int]) -> list[Unit]:
    """Packs of at most `max_length` tokens: into each goes the longest document that still fits, until none does.

    A document above `max_length` is cut: its full pieces are packs of their own, its tail is packed like a document.

    Args:
        lengths: Tokens of each document.
        max_length: Most tokens of a pack, > 0.
        order: Documents of equal length are taken in this order. The number of packs and their lengths do not depend
            on it.

    Source: LlamaFactory's greedy_knapsack (with its ascending list, binary search and pops), in near-linear time.
    """
    units, shelves = _shelves(lengths, max_length, order)
    stocked = sorted(shelves)
    while stocked:
        spans, room = [], max_length
        while (shelf := bisect_right(stocked, room)) > 0:
            length = stocked[shelf - 1]
            spans.append(shelves[length].pop())
            room -= length
            if not shelves[length]:
                del stocked[shelf - 1]
        units.append(Unit(tuple(spans)))
    return units


def _shelves(lengths: Lengths, max_length: int, order: Iterable[int]) -> tuple[list[Unit], dict[int, list[Span]]]:
    """The full pieces of long documents, and all other spans by length, the first of `order` at the end of its list."""
    full: list[Unit] = []
    shelves: dict[int, list[Span]] = {}
    for document in order:
        length = int(lengths[document])
        tail = length - length % max_length if length > max_length else 0
        full += [Unit((Span(document, start, start + max_length),)) for start in range(0, tail, max_length)]
        if length > tail:
            shelves.setdefault(length - tail, []).append(Span(document, tail, length))
    for shelf in shelves.values():
        shelf.reverse()
    return full, shelves
