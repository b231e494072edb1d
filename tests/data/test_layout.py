"""How units lie on ranks and micro-batches: worked out by hand, and held for random steps."""

from __future__ import annotations

import random

import pytest

from lf_lightning.data.layout import MicroBatchRule, Plan, micro_batch_plan, plan_lines
from lf_lightning.types import Layout


def by_size(size: int) -> MicroBatchRule:
    return MicroBatchRule(size=size, tokens=None)


def by_tokens(tokens: int) -> MicroBatchRule:
    return MicroBatchRule(size=None, tokens=tokens)


def test_one_rank_takes_the_longest_units_first() -> None:
    assert micro_batch_plan([3, 9, 5, 7], num_ranks=1, rule=by_size(2), layout="padded") == [[[1, 3], [2, 0]]]


def test_equal_lengths_keep_their_order() -> None:
    assert micro_batch_plan([4, 4, 4, 4], num_ranks=1, rule=by_size(3), layout="padded") == [[[0, 1, 2], [3]]]


def test_each_unit_goes_to_the_rank_with_the_fewest_tokens() -> None:
    # longest first 9, 7, 5, 3: rank 0 takes 9, rank 1 takes 7 and 5, rank 0 (9 < 12) takes 3
    assert micro_batch_plan([3, 9, 5, 7], num_ranks=2, rule=by_size(1), layout="padded") == [[[1], [0]], [[3], [2]]]


def test_by_size_no_rank_holds_more_units_than_its_share() -> None:
    # by tokens alone rank 1 would take all of 1, 1, 1; by size each rank takes two
    assert micro_batch_plan([9, 1, 1, 1], num_ranks=2, rule=by_size(2), layout="padded") == [[[0, 3]], [[1, 2]]]
    plan = micro_batch_plan([9, 1, 1, 1], num_ranks=2, rule=by_tokens(9), layout="padded")
    assert plan == [[[0]], [[1, 2, 3]]]


def test_a_rank_that_is_short_asks_for_fillers() -> None:
    plan = micro_batch_plan([5, 4, 3, 2, 1], num_ranks=3, rule=by_size(1), layout="padded")
    assert plan == [[[0], []], [[1], [4]], [[2], [3]]]
    assert micro_batch_plan([6], num_ranks=3, rule=by_size(4), layout="padding_free") == [[[0]], [[]], [[]]]


def test_a_step_of_nothing_is_one_filler_on_each_rank() -> None:
    assert micro_batch_plan([], num_ranks=2, rule=by_size(4), layout="padded") == [[[]], [[]]]


def test_a_padded_budget_counts_the_longest_unit_for_each() -> None:
    # 2 x 6 = 12 fits, 3 x 6 does not; 3 x 3 = 9 fits
    plan = micro_batch_plan([6, 5, 3, 3, 2], num_ranks=1, rule=by_tokens(12), layout="padded")
    assert plan == [[[0, 1], [2, 3, 4]]]


def test_a_padding_free_budget_counts_the_tokens() -> None:
    # 6 + 5 = 11, and nothing fits beside it; 3 + 3 + 2 = 8
    plan = micro_batch_plan([6, 5, 3, 3, 2], num_ranks=1, rule=by_tokens(12), layout="padding_free")
    assert plan == [[[0, 1], [2, 3, 4]]]
    plan = micro_batch_plan([6, 5, 3, 3, 2], num_ranks=1, rule=by_tokens(10), layout="padding_free")
    assert plan == [[[0, 2], [1, 3, 4]]]


def test_a_unit_above_the_budget_is_a_micro_batch_of_its_own() -> None:
    for layout in ("padded", "padding_free"):
        plan = micro_batch_plan([50, 4, 3], num_ranks=1, rule=by_tokens(10), layout=layout)
        assert plan == [[[0], [1, 2]]]


def check(plan: Plan, lengths: list[int], num_ranks: int, rule: MicroBatchRule, layout: Layout) -> None:
    assert len(plan) == num_ranks
    positions = [position for rank in plan for micro_batch in rank for position in micro_batch]
    assert sorted(positions) == list(range(len(lengths))), "every unit exactly once"
    assert len({len(rank) for rank in plan}) == 1, "the same number of micro-batches on every rank"
    assert len(plan[0]) >= 1
    for micro_batch in (micro_batch for rank in plan for micro_batch in rank if micro_batch):
        held = [lengths[position] for position in micro_batch]
        if rule.size is not None:
            assert len(held) <= rule.size
        elif rule.tokens is not None and len(held) > 1:
            assert (max(held) * len(held) if layout == "padded" else sum(held)) <= rule.tokens


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_random_steps_keep_every_unit_the_budget_and_equal_numbers(num_ranks: int, layout: Layout) -> None:
    draw = random.Random(num_ranks)
    for _ in range(300):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(0, 40))]
        rule = by_size(draw.randint(1, 9)) if draw.random() < 0.5 else by_tokens(draw.randint(1, 200))
        plan = micro_batch_plan(lengths, num_ranks=num_ranks, rule=rule, layout=layout)
        check(plan, lengths, num_ranks, rule, layout)


@pytest.mark.parametrize("rule", [by_size(4), by_tokens(4096)])
def test_ranks_carry_about_the_same_number_of_tokens(rule: MicroBatchRule) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(1, 1000) for _ in range(256)]
    plan = micro_batch_plan(lengths, num_ranks=4, rule=rule, layout="padding_free")
    loads = [sum(lengths[position] for micro_batch in rank for position in micro_batch) for rank in plan]
    assert max(loads) - min(loads) < 0.01 * max(loads)


def test_by_size_a_rank_runs_no_more_micro_batches_than_its_share_needs() -> None:
    draw = random.Random(3)
    for _ in range(200):
        num_units, num_ranks, size = draw.randint(1, 40), draw.randint(1, 8), draw.randint(1, 9)
        lengths = [draw.randint(1, 60) for _ in range(num_units)]
        plan = micro_batch_plan(lengths, num_ranks=num_ranks, rule=by_size(size), layout="padded")
        share = -(-num_units // num_ranks)
        assert len(plan[0]) <= max(1, -(-share // size))


def test_an_epoch_is_announced_with_its_units_and_steps_and_units_above_the_budget_are_named_once():
    rule = MicroBatchRule(size=None, tokens=10)
    assert plan_lines([4, 12, 30, 5, 6], 2, rule) == [
        "train: 5 units of 57 tokens, 3 steps an epoch",
        "data.micro_batch_tokens: 2 units are longer than 10 tokens (longest 30); "
        "each of them is a micro-batch of its own",
    ]
    assert plan_lines([4, 12], 2, MicroBatchRule(size=1, tokens=None)) == [
        "train: 2 units of 16 tokens, 1 steps an epoch"
    ]
