"""Draws that depend on their own row alone: distributed as they must be, and the same in any company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lf_lightning.models.sampling import RowLimits, RowSampler
from lf_lightning.types import TrainingStopped

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
NUM_DRAWS = 4000


def draws(
    logits: Tensor, seeds: list[int], *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> list[int]:
    """One draw of each row; (B,)."""
    sampler = RowSampler(temperature, top_p, top_k, seeds)
    return sampler(torch.zeros(len(seeds), 1, dtype=torch.int64), logits.expand(len(seeds), -1)).argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_words_are_drawn_as_often_as_their_probability_says(temperature: float):
    found = torch.bincount(torch.tensor(draws(LOGITS, list(range(NUM_DRAWS)), temperature=temperature)), minlength=5)
    expected = NUM_DRAWS * (LOGITS / temperature).softmax(-1)
    chi_square = float(((found - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # four degrees of freedom, one in a thousand; the seeds are fixed


def test_top_k_and_top_p_leave_what_they_must():
    # probabilities 0.57, 0.21, 0.08, 0.03, 0.13: the likeliest are 0, 1, 4, 2, 3
    seeds = list(range(NUM_DRAWS))
    assert set(draws(LOGITS, seeds, top_k=2)) == {0, 1}
    assert set(draws(LOGITS, seeds, top_p=0.5)) == {0}
    assert set(draws(LOGITS, seeds, top_p=0.8)) == {0, 1, 4}
    assert set(draws(LOGITS, seeds)) == {0, 1, 2, 3, 4}


def chi_square(words: list[int], probabilities: Tensor) -> float:
    """Of how often words were drawn; every word must have a probability that is not zero."""
    expected = len(words) * probabilities.double()
    return float(((torch.bincount(torch.tensor(words), minlength=len(expected)) - expected) ** 2 / expected).sum())


def test_what_a_cut_leaves_is_drawn_in_its_old_proportions():
    seeds = list(range(NUM_DRAWS))
    kept = LOGITS.softmax(-1)[:2] / LOGITS.softmax(-1)[:2].sum()
    assert chi_square(draws(LOGITS, seeds, top_k=2), kept) < 10.9  # one degree of freedom, one in a thousand
    both = draws(LOGITS, seeds, top_k=4, top_p=0.97)  # of the four likeliest, 0.58, 0.22, 0.13 and 0.08
    assert set(both) == {0, 1, 2, 4}
    assert set(draws(LOGITS, seeds, top_k=4, top_p=0.9)) == {0, 1, 4}


def test_the_words_of_one_answer_are_drawn_as_their_probability_says_and_without_memory():
    sampler, ids = RowSampler(1.0, 1.0, 0, [5]), torch.zeros(1, 1, dtype=torch.int64)
    words = [int(sampler(ids, LOGITS[None]).argmax()) for _ in range(NUM_DRAWS)]
    probabilities = LOGITS.softmax(-1)
    assert chi_square(words, probabilities) < 18.5
    pairs = [5 * first + second for first, second in zip(words[::2], words[1::2], strict=True)]
    assert chi_square(pairs, torch.outer(probabilities, probabilities).flatten()) < 51.2  # 24 degrees of freedom


@pytest.mark.parametrize("size", [15, 16, 17, 1000])
def test_many_words_are_drawn_as_often_as_each_other_whatever_their_number(size: int):
    sampler, ids = RowSampler(1.0, 1.0, 0, list(range(200))), torch.zeros(200, 1, dtype=torch.int64)
    words = [word for _ in range(20) for word in sampler(ids, torch.zeros(200, size)).argmax(-1).tolist()]
    parts = 5  # each holds as many words, give or take one
    share = torch.bincount(torch.arange(size) * parts // size, minlength=parts) / size
    assert chi_square([word * parts // size for word in words], share) < 18.5


def test_an_impossible_word_is_never_drawn():
    logits = LOGITS.clone()
    logits[0] = -torch.inf
    assert set(draws(logits, list(range(NUM_DRAWS)))) == {1, 2, 3, 4}


def test_a_row_is_drawn_alike_alone_in_company_and_in_another_order():
    flat = torch.zeros(50)
    seeds = [11, 22, 33, 44, 55]
    alone = [draws(flat, [seed])[0] for seed in seeds]
    assert draws(flat, seeds) == alone
    assert draws(flat, seeds[::-1]) == alone[::-1]
    assert len(set(alone)) > 2


def test_a_row_is_drawn_alike_beside_rows_with_other_logits_and_whatever_their_place_in_memory():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    seeds = [11, 22, 33, 44, 55]
    ids = torch.zeros(5, 1, dtype=torch.int64)
    alone = [RowSampler(0.9, 0.8, 20, [seed])(ids[:1], row[None])[0] for row, seed in zip(logits, seeds, strict=True)]
    want = torch.stack(alone)
    assert torch.equal(RowSampler(0.9, 0.8, 20, seeds)(ids, logits), want)
    turned = RowSampler(0.9, 0.8, 20, seeds[::-1])(ids, logits.flip(0))
    assert torch.equal(turned, want.flip(0))
    by_columns = logits.T.contiguous().T
    assert not by_columns.is_contiguous()
    assert torch.equal(RowSampler(0.9, 0.8, 20, seeds)(ids, by_columns), want)


def test_the_global_random_state_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = draws(torch.zeros(50), [7, 8])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert draws(torch.zeros(50), [7, 8]) == first


def test_the_logits_that_are_handed_in_stay_as_they_are():
    logits = LOGITS[None].clone()
    RowSampler(0.5, 0.5, 2, [1])(torch.zeros(1, 1, dtype=torch.int64), logits)
    assert torch.equal(logits[0], LOGITS)


def test_each_further_word_is_a_new_draw():
    sampler, ids = RowSampler(1.0, 1.0, 0, [1]), torch.zeros(1, 1, dtype=torch.int64)
    words = [int(sampler(ids, torch.zeros(1, 100)).argmax()) for _ in range(8)]
    assert len(set(words)) > 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_stop_in_one_line(bad: float):
    logits = LOGITS.clone()
    logits[2] = bad
    with pytest.raises(
        TrainingStopped, match=r"^generation: the policy's logits must be finite, got NaN or infinity"
    ) as caught:
        draws(logits, [1, 2])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [torch.full((5,), torch.nan), torch.full((5,), -torch.inf)], ids=["nan", "nothing"])
def test_one_row_that_cannot_be_drawn_stops_all(bad: Tensor):
    sampler = RowSampler(1.0, 1.0, 0, [1, 2, 3])
    with pytest.raises(TrainingStopped, match=r"^generation: the policy's logits must be finite"):
        sampler(torch.zeros(3, 1, dtype=torch.int64), torch.stack([LOGITS, bad, LOGITS]))


def test_a_row_ends_at_its_own_limit():
    limits = RowLimits(3, [1, 4])
    assert limits(torch.zeros(2, 4), None).tolist() == [True, False]
    assert limits(torch.zeros(2, 6), None).tolist() == [True, False]
    assert limits(torch.zeros(2, 7), None).tolist() == [True, True]
