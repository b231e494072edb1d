"""Documents become units without losing a token."""

from __future__ import annotations

import random
from bisect import bisect_right

import numpy as np

from lf_lightning.data.packing import block_units, knapsack_units, sequence_units
from lf_lightning.types import Span, Unit


def greedy_knapsack(lengths: list[int], capacity: int) -> list[list[int]]:
    """LlamaFactory's algorithm word by word (reference/llamafactory.md 1.0.2)."""
    rest, bins = sorted(lengths), []
    while rest:
        current, room = [], capacity
        while (index := bisect_right(rest, room)) > 0:
            room -= rest[index - 1]
            current.append(rest.pop(index - 1))
        bins.append(current)
    return bins


def tokens_of(units: list[Unit]) -> list[tuple[int, int]]:
    return sorted((s.document, token) for unit in units for s in unit.spans for token in range(s.start, s.end))


def test_a_sequence_unit_is_a_document() -> None:
    lengths, documents = np.array([3, 5]), np.array([9, 4])
    assert sequence_units(lengths) == [Unit((Span(0, 0, 3),)), Unit((Span(1, 0, 5),))]
    assert sequence_units(lengths, documents) == [Unit((Span(9, 0, 3),)), Unit((Span(4, 0, 5),))]


def test_blocks_are_cut_every_max_length_tokens_and_keep_the_tail() -> None:
    assert block_units([3, 5, 1], 4, [1, 0, 2]) == [
        Unit((Span(1, 0, 4),)),
        Unit((Span(1, 4, 5), Span(0, 0, 3))),
        Unit((Span(2, 0, 1),)),
    ]


def test_blocks_lose_no_token_and_all_but_the_last_are_full() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 40) for _ in range(200)]
    units = block_units(lengths, 16, draw.sample(range(200), 200))
    assert tokens_of(units) == [(document, token) for document in range(200) for token in range(lengths[document])]
    assert {unit.num_tokens for unit in units[:-1]} == {16}
    assert len(units) == -(-sum(lengths) // 16)


def test_knapsack_takes_the_longest_document_that_still_fits() -> None:
    units = knapsack_units([2, 5, 3, 4], 6, range(4))
    assert [[span.document for span in unit.spans] for unit in units] == [[1], [3, 0], [2]]


def test_knapsack_breaks_ties_by_the_order() -> None:
    packs = [[s.document for s in unit.spans] for unit in knapsack_units([2, 2, 2, 2], 4, [3, 1, 0, 2])]
    assert packs == [[3, 1], [0, 2]]


def test_knapsack_packs_like_llamafactory_whatever_the_order() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(1, 100) for _ in range(500)]
    expected = greedy_knapsack(lengths, 100)
    for seed in range(3):
        order = random.Random(seed).sample(range(500), 500)
        units = knapsack_units(lengths, 100, order)
        assert [[span.end - span.start for span in unit.spans] for unit in units] == expected
        assert tokens_of(units) == [(document, token) for document in range(500) for token in range(lengths[document])]


def test_knapsack_cuts_documents_above_max_length_and_loses_nothing() -> None:
    units = knapsack_units([9, 4, 8], 4, range(3))
    assert tokens_of(units) == [(d, t) for d, length in enumerate([9, 4, 8]) for t in range(length)]
    assert sorted(unit.num_tokens for unit in units) == [1, 4, 4, 4, 4, 4]


def test_many_documents_fill_their_packs() -> None:
    draw = random.Random(2)
    lengths = [draw.randint(1, 2048) for _ in range(100_000)]
    units = knapsack_units(lengths, 2048, range(100_000))
    assert sum(unit.num_tokens for unit in units) == sum(lengths)
    assert len(units) < 1.02 * sum(lengths) / 2048
