"""Units become tensors: every expected row is written out."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lf_lightning.data.collate import prompt_batch, token_batch
from lf_lightning.data.prompts import Prompt
from lf_lightning.types import Document, Layout, Span, TokenBatch, Unit

N = -100


class Documents:
    """Tokens in memory."""

    def __init__(self, *documents: tuple[list[int], list[int]]) -> None:
        self._documents = documents

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        ids, labels = self._documents[index]
        return np.array(ids, np.int32), np.array(labels, np.int32)


TOKENS = Documents(([11, 12, 13], [N, 12, 13]), ([21, 22], [21, 22]), ([31, 32, 33, 34], [N, N, N, 34]))


def whole(document: int, length: int) -> Unit:
    return Unit((Span(document, 0, length),))


A, B, C = whole(0, 3), whole(1, 2), whole(2, 4)
PACK = Unit((Span(0, 0, 3), Span(1, 0, 2)))


def tensors(batch: TokenBatch) -> tuple[list[list[int]], list[list[int]], list[list[int]] | None]:
    positions = None if batch.positions is None else batch.positions.tolist()
    return batch.input_ids.tolist(), batch.targets.tolist(), positions


def test_padded_rows_are_as_long_as_the_longest_and_padding_counts_nothing() -> None:
    batch = token_batch([A, C], TOKENS, layout="padded", isolate=False)
    assert tensors(batch) == ([[11, 12, 13, 0], [31, 32, 33, 34]], [[12, 13, N, N], [N, N, 34, N]], None)
    assert (batch.documents, batch.num_units, batch.num_tokens) == (None, 2, 7)


def test_a_first_token_is_never_a_target_even_where_its_label_counts() -> None:
    batch = token_batch([A, B], TOKENS, layout="padding_free", isolate=False)
    assert tensors(batch) == ([[11, 12, 13, 21, 22]], [[12, 13, N, 22, N]], [[0, 1, 2, 0, 1]])
    assert (batch.documents, batch.num_units, batch.num_tokens) == ((Document(3), Document(2)), 2, 5)


def test_an_isolated_pack_restarts_positions_and_predicts_nothing_across_documents() -> None:
    padded = token_batch([PACK, C], TOKENS, layout="padded", isolate=True)
    assert tensors(padded) == (
        [[11, 12, 13, 21, 22], [31, 32, 33, 34, 0]],
        [[12, 13, N, 22, N], [N, N, 34, N, N]],
        [[0, 1, 2, 0, 1], [0, 1, 2, 3, 0]],
    )
    free = token_batch([PACK, C], TOKENS, layout="padding_free", isolate=True)
    assert tensors(free) == (
        [[11, 12, 13, 21, 22, 31, 32, 33, 34]],
        [[12, 13, N, 22, N, N, N, 34, N]],
        [[0, 1, 2, 0, 1, 0, 1, 2, 3]],
    )
    assert free.documents == (Document(3), Document(2), Document(4))
    assert (free.num_units, free.num_tokens) == (2, 9)


def test_a_pack_that_is_not_isolated_is_one_document() -> None:
    padded = token_batch([PACK], TOKENS, layout="padded", isolate=False)
    assert tensors(padded) == ([[11, 12, 13, 21, 22]], [[12, 13, 21, 22, N]], None)
    free = token_batch([PACK, B], TOKENS, layout="padding_free", isolate=False)
    assert tensors(free) == (
        [[11, 12, 13, 21, 22, 21, 22]],
        [[12, 13, 21, 22, N, 22, N]],
        [[0, 1, 2, 3, 4, 0, 1]],
    )
    assert free.documents == (Document(5), Document(2))


def test_a_span_inside_a_document_predicts_only_what_lies_in_it() -> None:
    middle = Unit((Span(0, 1, 3), Span(2, 2, 4)))
    batch = token_batch([middle], TOKENS, layout="padding_free", isolate=True)
    assert tensors(batch) == ([[12, 13, 33, 34]], [[13, N, 34, N]], [[0, 1, 0, 1]])


def test_a_span_of_one_token_predicts_nothing() -> None:
    batch = token_batch([Unit((Span(1, 1, 2),))], TOKENS, layout="padded", isolate=False)
    assert tensors(batch) == ([[22]], [[N]], None)


@pytest.mark.parametrize(("layout", "documents"), [("padded", None), ("padding_free", (Document(2),))])
def test_a_filler_is_a_real_input_of_which_nothing_counts(
    layout: Layout, documents: tuple[Document, ...] | None
) -> None:
    batch = token_batch([], TOKENS, layout=layout, isolate=True)
    assert batch.input_ids.tolist() == [[0, 0]]
    assert batch.targets.tolist() == [[N, N]]
    assert (batch.documents, batch.num_units, batch.num_tokens) == (documents, 0, 0)


@pytest.mark.parametrize("isolate", [True, False])
def test_random_units_count_the_same_targets_in_both_layouts(isolate: bool) -> None:
    draw = random.Random(0)
    for _ in range(100):
        documents = [[draw.randint(1, 99) for _ in range(draw.randint(1, 12))] for _ in range(8)]
        tokens = Documents(*((ids, [label if draw.random() < 0.6 else N for label in ids]) for ids in documents))
        chosen = draw.sample(range(8), 6)
        spans = [Span(index, 0, len(documents[index])) for index in chosen]
        units = [Unit(tuple(spans[:2])), Unit((spans[2],)), Unit(tuple(spans[3:]))]
        padded, free = (
            token_batch(units, tokens, layout=layout, isolate=isolate) for layout in ("padded", "padding_free")
        )
        assert padded.num_tokens == free.num_tokens == sum(span.end - span.start for span in spans)
        assert padded.targets[padded.targets != N].tolist() == free.targets[free.targets != N].tolist()
        counted = padded.targets != N
        assert torch.equal(padded.input_ids[counted], free.input_ids[free.targets != N])
        assert (
            sum(document.num_tokens for document in free.documents or ()) == free.input_ids.shape[1] == free.num_tokens
        )


def prompt(text: str, ids: list[int]) -> Prompt:
    return Prompt(text, tuple(ids), reference=f"to {text}", source="s", row=1)


def test_prompts_are_padded_on_the_left() -> None:
    batch = prompt_batch([prompt("a", [5]), prompt("b", [6, 7, 8])], [4, 2], pad_id=9)
    assert batch.input_ids.tolist() == [[9, 9, 5], [6, 7, 8]]
    assert batch.mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert (batch.rows, batch.prompts, batch.references) == ((4, 2), ("a", "b"), ("to a", "to b"))


def test_the_pad_token_inside_a_prompt_is_not_masked() -> None:
    batch = prompt_batch([prompt("a", [9, 5, 9]), prompt("b", [6])], [0, 1], pad_id=9)
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
