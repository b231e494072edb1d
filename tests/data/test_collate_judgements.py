"""Judged answers become tensors: every row is written out, and the three arrangements hold the same sequences."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from lf_lightning.data.collate_judgements import feedback_batch, feedback_costs, preference_batch, preference_costs
from lf_lightning.data.store import TokenStore
from lf_lightning.types import IGNORE, Document, FeedbackBatch, Layout, Span, TokenBatch, Unit

N = IGNORE
PADDED: dict[str, Any] = {"layout": "padded", "share_prompt": False}
FREE: dict[str, Any] = {"layout": "padding_free", "share_prompt": False}
SHARED: dict[str, Any] = {"layout": "padding_free", "share_prompt": True}


def store_of(documents: list[list[list[int]]], facts: dict[str, Any]) -> TokenStore:
    """Documents given as their parts, the prompt first."""
    flat = [[token for part in document for token in part] for document in documents]
    labels = [[N] * len(parts[0]) + ids[len(parts[0]) :] for parts, ids in zip(documents, flat, strict=True)]
    return TokenStore(
        input_ids=np.array([token for ids in flat for token in ids], np.int32),
        labels=np.array([label for row in labels for label in row], np.int32),
        offsets=np.cumsum([0, *map(len, flat)]),
        source_index=np.zeros(len(flat), np.int32),
        row=np.arange(1, len(flat) + 1),
        names=("s",),
        summaries=(),
        facts={"prompt_length": np.array([len(parts[0]) for parts in documents]), **facts},
    )


def pair_store(*documents: list[list[int]], margins: list[float]) -> TokenStore:
    chosen = np.array([len(parts[1]) for parts in documents])
    return store_of(list(documents), {"chosen_length": chosen, "margin": np.array(margins)})


def feedback_store(*documents: list[list[int]], desirable: list[bool]) -> TokenStore:
    full = {
        f"full_{name}_length": np.array([len(parts[at]) for parts in documents])
        for at, name in enumerate(("prompt", "response"))
    }
    return store_of(list(documents), {**full, "is_desirable": np.array(desirable)})


PAIRS = pair_store([[11, 12, 13], [21, 22], [31]], [[41], [51], [61, 62]], margins=[0.5, -2.0])
FEEDBACK = feedback_store([[11, 12, 13, 14], [21, 22]], [[15, 16], [31, 32, 33, 34, 35]], desirable=[True, False])


def unit(document: int, partner: int | None = None) -> Unit:
    return Unit((Span(document, 0, 1),), partner)  # documents are taken whole


BOTH = [unit(0), unit(1)]


def lists(batch: TokenBatch) -> tuple[Any, ...]:
    assert batch.sequences is not None
    positions = None if batch.positions is None else batch.positions.tolist()
    return batch.input_ids.tolist(), batch.targets.tolist(), positions, batch.sequences.tolist()


def test_a_padded_pair_is_two_rows() -> None:
    batch = preference_batch(BOTH, PAIRS, **PADDED)
    assert lists(batch.tokens) == (
        [[11, 12, 13, 21, 22], [11, 12, 13, 31, 0], [41, 51, 0, 0, 0], [41, 61, 62, 0, 0]],
        [[N, N, 21, 22, N], [N, N, 31, N, N], [51, N, N, N, N], [61, 62, N, N, N]],
        None,
        [[4, 4, 0, 0, 4], [4, 4, 1, 4, 4], [2, 4, 4, 4, 4], [3, 3, 4, 4, 4]],
    )
    assert batch.tokens.documents is None
    assert (batch.num_units, batch.num_tokens, batch.tokens.num_sequences) == (2, 14, 4)
    assert (batch.rows.tolist(), batch.margins.tolist(), batch.reference) == ([0, 1], [0.5, -2.0], None)
    assert (batch.rows.dtype, batch.margins.dtype) == (torch.int64, torch.float64)


def test_without_padding_a_pair_is_two_documents_of_one_row() -> None:
    batch = preference_batch(BOTH, PAIRS, **FREE)
    assert lists(batch.tokens) == (
        [[11, 12, 13, 21, 22, 11, 12, 13, 31, 41, 51, 41, 61, 62]],
        [[N, N, 21, 22, N, N, N, 31, N, 51, N, 61, 62, N]],
        [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2]],
        [[4, 4, 0, 0, 4, 4, 4, 1, 4, 2, 4, 3, 3, 4]],
    )
    assert batch.tokens.documents == (Document(5), Document(4), Document(2), Document(3))
    assert (batch.num_units, batch.num_tokens) == (2, 14)


def test_a_shared_prompt_is_a_trunk_whose_last_token_opens_each_branch() -> None:
    batch = preference_batch(BOTH, PAIRS, **SHARED)
    assert lists(batch.tokens) == (
        [[11, 12, 13, 21, 22, 13, 31, 41, 51, 41, 61, 62]],
        [[N, N, 21, 22, N, 31, N, 51, N, 61, 62, N]],
        [[0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 1, 2]],
        [[4, 4, 0, 0, 4, 1, 4, 2, 4, 3, 3, 4]],
    )
    # a prompt of one token leaves no trunk
    assert batch.tokens.documents == (Document(2, (3, 2)), Document(2), Document(3))
    assert (batch.num_units, batch.num_tokens) == (2, 12)


def test_padded_rows_share_nothing_whatever_is_asked() -> None:
    asked = preference_batch(BOTH, PAIRS, layout="padded", share_prompt=True)
    assert lists(asked.tokens) == lists(preference_batch(BOTH, PAIRS, **PADDED).tokens)


def test_stored_reference_log_probs_travel_with_their_rows() -> None:
    table = np.arange(8.0).reshape(2, 2, 2)
    batch = preference_batch([unit(1)], PAIRS, **PADDED, reference=table)
    assert batch.reference is not None
    assert (batch.reference.tolist(), batch.reference.dtype) == ([[[4, 5], [6, 7]]], torch.float64)
    feedback = feedback_batch([unit(1, 0)], FEEDBACK, **PADDED, max_length=6, reference=np.array([[1.0, 2], [3, 4]]))
    assert feedback.reference is not None
    assert feedback.reference.tolist() == [[3, 4]]


JUDGED = [unit(0, 1), unit(1, 0)]


def feedback(units: list[Unit], options: dict[str, Any], max_length: int = 6) -> FeedbackBatch:
    return feedback_batch(units, FEEDBACK, **options, max_length=max_length)


def test_each_pairing_of_prompt_and_response_is_cut_by_its_own_lengths() -> None:
    # C = 6. Prompt 4: with its own 2 all stay; with the partner's 5 it is 6 x 5 // 9 = 3 and 3.
    # Prompt 2: with its own 5 the answer keeps 4; with the partner's 2 all stay.
    batch = feedback(JUDGED, PADDED)
    assert lists(batch.responses) == (
        [[11, 12, 13, 14, 21, 22], [15, 16, 31, 32, 33, 34]],
        [[N, N, N, 21, 22, N], [N, 31, 32, 33, 34, N]],
        None,
        [[2, 2, 2, 0, 0, 2], [2, 1, 1, 1, 1, 2]],
    )
    assert lists(batch.mismatched) == (
        [[11, 12, 13, 31, 32, 33], [15, 16, 21, 22, 0, 0]],
        [[N, N, 31, 32, 33, N], [N, 21, 22, N, N, N]],
        None,
        [[2, 2, 0, 0, 0, 2], [2, 1, 1, 2, 2, 2]],
    )
    assert lists(batch.both) == (
        [[11, 12, 13, 14, 21, 22], [11, 12, 13, 31, 32, 33], [15, 16, 31, 32, 33, 34], [15, 16, 21, 22, 0, 0]],
        [[N, N, N, 21, 22, N], [N, N, 31, 32, 33, N], [N, 31, 32, 33, 34, N], [N, 21, 22, N, N, N]],
        None,
        [[4, 4, 4, 0, 0, 4], [4, 4, 1, 1, 1, 4], [4, 2, 2, 2, 2, 4], [4, 3, 3, 4, 4, 4]],
    )
    assert (batch.responses.num_tokens, batch.mismatched.num_tokens, batch.both.num_tokens) == (12, 10, 22)
    assert (batch.num_units, batch.num_tokens) == (2, 12)
    assert (batch.rows.tolist(), batch.is_desirable.tolist(), batch.has_partner.tolist()) == (
        [0, 1],
        [True, False],
        [True, True],
    )


def test_a_prompt_is_shared_only_where_both_cuts_leave_it_equally_long() -> None:
    batch = feedback(JUDGED, SHARED)
    assert lists(batch.both) == (
        [[11, 12, 13, 14, 21, 22, 11, 12, 13, 31, 32, 33, 15, 16, 31, 32, 33, 34, 16, 21, 22]],
        [[N, N, N, 21, 22, N, N, N, 31, 32, 33, N, N, 31, 32, 33, 34, N, 21, 22, N]],
        [[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 1, 2, 3]],
        [[4, 4, 4, 0, 0, 4, 4, 4, 1, 1, 1, 4, 4, 2, 2, 2, 2, 4, 3, 3, 4]],
    )
    assert batch.both.documents == (Document(6), Document(6), Document(1, (5, 3)))
    assert batch.responses.documents == (Document(6), Document(6))
    assert batch.mismatched.documents == (Document(6), Document(4))


def test_a_unit_without_a_partner_leaves_its_mismatched_sequence_empty() -> None:
    batch = feedback([unit(0), unit(1, 0)], FREE)
    assert batch.has_partner.tolist() == [False, True]
    assert lists(batch.mismatched)[0] == [[15, 16, 21, 22]]
    assert lists(batch.mismatched)[3] == [[2, 1, 1, 2]]
    assert lists(batch.both)[3] == [[4, 4, 4, 0, 0, 4, 4, 2, 2, 2, 2, 4, 4, 3, 3, 4]]
    assert (batch.mismatched.num_sequences, batch.both.num_sequences) == (2, 4)


@pytest.mark.parametrize("options", [PADDED, FREE, SHARED])
def test_where_no_unit_has_a_partner_the_mismatched_batch_is_a_filler(options: dict[str, Any]) -> None:
    batch = feedback([unit(0)], options)
    assert lists(batch.mismatched)[0] == [[0, 0]]
    assert lists(batch.mismatched)[1] == [[N, N]]
    assert lists(batch.mismatched)[3] == [[1, 1]]
    assert (batch.mismatched.num_sequences, batch.mismatched.num_tokens, batch.mismatched.num_units) == (1, 0, 0)
    assert lists(batch.both)[0] == lists(batch.responses)[0] == [[11, 12, 13, 14, 21, 22]]
    assert lists(batch.both)[3] == [[2, 2, 2, 0, 0, 2]]


def check_filler(tokens: TokenBatch, options: dict[str, Any]) -> None:
    assert (tokens.input_ids.tolist(), tokens.targets.tolist()) == ([[0, 0]], [[N, N]])
    assert lists(tokens)[3] == [[0, 0]]
    assert (tokens.num_sequences, tokens.num_units, tokens.num_tokens) == (0, 0, 0)
    assert tokens.documents == (None if options["layout"] == "padded" else (Document(2),))


@pytest.mark.parametrize("options", [PADDED, FREE, SHARED])
def test_fillers_are_real_inputs_of_which_nothing_counts(options: dict[str, Any]) -> None:
    pairs = preference_batch([], PAIRS, **options, reference=np.zeros((2, 2, 2)))
    check_filler(pairs.tokens, options)
    assert pairs.reference is not None
    assert (pairs.rows.shape, pairs.margins.shape, pairs.reference.shape) == ((0,), (0,), (0, 2, 2))
    judged = feedback([], options)
    for tokens in (judged.responses, judged.mismatched, judged.both):
        check_filler(tokens, options)
    assert judged.rows.shape == judged.is_desirable.shape == judged.has_partner.shape == (0,)
    assert judged.is_desirable.dtype == judged.has_partner.dtype == torch.bool


def seen(batch: TokenBatch) -> dict[int, list[tuple[list[int], int, int]]]:
    """For each sequence, what each of its predictions sees, the position of the last token of it, and the target."""
    assert batch.sequences is not None
    found: dict[int, list[tuple[list[int], int, int]]] = {}
    for row in range(batch.input_ids.shape[0]):
        ids, start = batch.input_ids[row].tolist(), 0
        for document in batch.documents or (Document(len(ids)),):
            trunk = ids[start : start + document.trunk]
            pieces = [(0, start, document.trunk)] if not document.branches else []
            begin = start + document.trunk
            for length in document.branches:
                pieces.append((document.trunk, begin, length))
                begin += length
            for before, first, length in pieces:
                for index in range(first, first + length):
                    if batch.targets[row, index] != N:
                        context = trunk[:before] + ids[first : index + 1]
                        position = index if batch.positions is None else int(batch.positions[row, index])
                        prediction = (context, position, int(batch.targets[row, index]))
                        found.setdefault(int(batch.sequences[row, index]), []).append(prediction)
            start += document.num_tokens
    return found


def drawn(draw: random.Random, most: int) -> list[int]:
    return [draw.randint(1, 99) for _ in range(draw.randint(1, most))]


def test_random_pairs_are_the_same_sequences_in_every_arrangement_and_cost_what_was_planned() -> None:
    draw = random.Random(0)
    for _ in range(40):
        documents = [[drawn(draw, 6), drawn(draw, 5), drawn(draw, 5)] for _ in range(5)]
        store = pair_store(*documents, margins=[0.0] * 5)
        units = [unit(document) for document in draw.sample(range(5), 4)]
        padded, free, shared = (preference_batch(units, store, **options) for options in (PADDED, FREE, SHARED))
        assert seen(padded.tokens) == seen(free.tokens) == seen(shared.tokens)
        for index, chosen in enumerate(units):
            prompt, *answers = documents[chosen.spans[0].document]
            for side, answer in enumerate(answers):
                predictions = seen(padded.tokens)[2 * index + side]
                assert [target for _, _, target in predictions] == answer
                assert predictions[-1][0] == prompt + answer[:-1]
                assert predictions[-1][1] == len(prompt) + len(answer) - 2
        assert sum(preference_costs(units, store, **FREE)) == free.num_tokens
        assert sum(preference_costs(units, store, **SHARED)) == shared.num_tokens
        assert preference_costs(units[:1], store, **PADDED) == [
            preference_batch(units[:1], store, **PADDED).tokens.input_ids.numel()
        ]


def test_random_feedback_is_the_same_sequences_in_every_arrangement_and_costs_what_was_planned() -> None:
    draw = random.Random(1)
    for _ in range(60):
        store = feedback_store(*([drawn(draw, 9), drawn(draw, 9)] for _ in range(5)), desirable=[True] * 5)
        chosen = draw.sample(range(5), 4)
        units = [unit(document, draw.choice([None, chosen[index - 1]])) for index, document in enumerate(chosen)]
        options: dict[str, Any] = {"max_length": draw.randint(6, 20)}
        padded, free, shared = (feedback_batch(units, store, **lay, **options) for lay in (PADDED, FREE, SHARED))
        for name in ("responses", "mismatched", "both"):
            assert seen(getattr(padded, name)) == seen(getattr(free, name)) == seen(getattr(shared, name))
        both = seen(free.both)
        assert {index // 2: both[index] for index in both if index % 2 == 0} == seen(free.responses)
        assert {index // 2: both[index] for index in both if index % 2} == seen(free.mismatched)
        assert sum(feedback_costs(units, store, **FREE, **options)) == free.both.num_tokens
        assert sum(feedback_costs(units, store, **SHARED, **options)) == shared.both.num_tokens
        cost = feedback_batch(units[:1], store, **PADDED, **options).both.input_ids.numel()
        assert feedback_costs(units[:1], store, **PADDED, **options) == [cost]


@pytest.mark.parametrize(
    ("layout", "share", "costs"),
    [("padded", False, [10, 6]), ("padding_free", False, [9, 5]), ("padding_free", True, [7, 5])],
)
def test_the_cost_of_a_pair_is_what_it_takes_in_memory(layout: Layout, share: bool, costs: list[int]) -> None:
    assert preference_costs(BOTH, PAIRS, layout=layout, share_prompt=share) == costs


@pytest.mark.parametrize(
    ("layout", "share", "costs"),
    [("padded", False, [12, 12, 6]), ("padding_free", False, [12, 10, 6]), ("padding_free", True, [12, 9, 6])],
)
def test_the_cost_of_feedback_counts_its_partner(layout: Layout, share: bool, costs: list[int]) -> None:
    units = [*JUDGED, unit(0)]
    assert feedback_costs(units, FEEDBACK, layout=layout, share_prompt=share, max_length=6) == costs
