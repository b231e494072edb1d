"""The order is a function of (seed, epoch) alone."""

from __future__ import annotations

import numpy as np
import pytest

from lf_lightning.data.order import epoch_order, split_rows, steps_per_epoch


def test_without_shuffling_the_order_is_that_of_the_files() -> None:
    assert epoch_order(5, seed=7, epoch=3, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_the_shuffled_order_is_pinned_so_that_a_checkpoint_resumes_in_the_same_order_years_later() -> None:
    assert epoch_order(8, seed=0, epoch=0, shuffle=True).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]
    assert epoch_order(8, seed=0, epoch=1, shuffle=True).tolist() == [1, 3, 7, 6, 0, 4, 2, 5]
    assert epoch_order(8, seed=1, epoch=0, shuffle=True).tolist() == [5, 0, 1, 4, 2, 6, 3, 7]


@pytest.mark.parametrize("num_units", [0, 1, 2, 17, 1000])
def test_an_epoch_visits_every_unit_once(num_units: int) -> None:
    for epoch in range(3):
        order = epoch_order(num_units, seed=5, epoch=epoch, shuffle=True)
        assert sorted(order.tolist()) == list(range(num_units))


def test_neither_the_global_random_state_nor_an_earlier_call_changes_the_order() -> None:
    np.random.seed(1)
    first = epoch_order(50, seed=2, epoch=9, shuffle=True).tolist()
    np.random.seed(2)
    epoch_order(50, seed=2, epoch=8, shuffle=True)
    assert epoch_order(50, seed=2, epoch=9, shuffle=True).tolist() == first


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(20, seed=s, epoch=e, shuffle=True).tolist()) for s in range(10) for e in range(10)}
    assert len(orders) == 100


@pytest.mark.parametrize(
    ("num_units", "global_batch_size", "steps"), [(10, 4, 3), (8, 4, 2), (1, 4, 1), (0, 4, 0), (9, 1, 9)]
)
def test_the_last_step_of_an_epoch_may_be_short(num_units: int, global_batch_size: int, steps: int) -> None:
    assert steps_per_epoch(num_units, global_batch_size) == steps


@pytest.mark.parametrize(
    ("num_rows", "val_size", "num_val"),
    [(10, 3, 3), (10, 1, 1), (10, 0, 0), (10, 0.2, 2), (10, 0.05, 0), (9, 0.5, 4), (1000, 0.001, 1), (3, 5, 3)],
)
def test_val_size_is_a_count_from_1_on_and_a_share_below(num_rows: int, val_size: float, num_val: int) -> None:
    train, val = split_rows(num_rows, val_size, seed=0)
    assert len(val) == num_val
    assert len(train) == num_rows - num_val


def test_a_split_keeps_the_order_of_the_files_and_every_row_on_one_side() -> None:
    for seed in range(20):
        train, val = split_rows(101, 0.3, seed=seed)
        assert train.tolist() == sorted(train.tolist())
        assert val.tolist() == sorted(val.tolist())
        assert sorted([*train.tolist(), *val.tolist()]) == list(range(101))


def test_the_seed_chooses_the_rows_that_validate() -> None:
    chosen = {tuple(split_rows(100, 5, seed=seed)[1].tolist()) for seed in range(20)}
    assert len(chosen) == 20
    assert split_rows(100, 5, seed=3)[1].tolist() == split_rows(100, 5, seed=3)[1].tolist()
