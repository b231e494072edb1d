"""What Lightning iterates: steps, their number, and the cursor of consumed units."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lf_lightning.data.loader import EvalLoader, StepLoader
from lf_lightning.types import Span, StepBatch, Unit


def units_of_epoch(epoch: int) -> list[Unit]:
    """Ten units; epoch 0 has documents 0-9, epoch 1 has 10-19, and so on."""
    return [Unit((Span(10 * epoch + index, 0, 1),)) for index in range(10)]


def loader(global_batch_size: int = 4) -> StepLoader:
    def documents(units: Sequence[Unit], epoch: int) -> StepBatch:
        assert all(unit.spans[0].document // 10 == epoch for unit in units)
        return [unit.spans[0].document for unit in units]  # type: ignore[return-value]  # lists are easier to compare

    return StepLoader(
        units_of_epoch=units_of_epoch, num_units=10, global_batch_size=global_batch_size, arrange=documents
    )


def test_an_epoch_is_its_units_in_order_and_the_last_step_may_be_short() -> None:
    assert list(loader()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(loader(5)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert list(loader(99)) == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize(("global_batch_size", "steps"), [(4, 3), (5, 2), (99, 1), (1, 10)])
def test_the_length_counts_the_steps_of_a_whole_epoch(global_batch_size: int, steps: int) -> None:
    assert len(loader(global_batch_size)) == steps


def test_each_epoch_has_its_own_units() -> None:
    steps = loader()
    assert next(iter(steps)) == [0, 1, 2, 3]
    steps.sampler.set_epoch(1)
    assert list(steps) == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    steps.set_epoch(2)
    assert next(iter(steps)) == [20, 21, 22, 23]


def test_the_epoch_may_be_set_after_the_iterator_is_made() -> None:
    steps = loader()
    iterator = iter(steps)
    steps.set_epoch(3)
    assert next(iterator) == [30, 31, 32, 33]


def test_the_cursor_counts_the_units_that_were_handed_out() -> None:
    steps = loader()
    iterator = iter(steps)
    assert steps.state_dict() == {"epoch": 0, "consumed_units": 0}
    next(iterator)
    assert steps.state_dict() == {"epoch": 0, "consumed_units": 4}
    next(iterator)
    next(iterator)
    assert steps.state_dict() == {"epoch": 0, "consumed_units": 10}
    assert list(iterator) == []
    assert steps.state_dict() == {"epoch": 0, "consumed_units": 0}


def test_a_resumed_loader_goes_on_with_the_next_unit() -> None:
    steps = loader()
    steps.load_state_dict({"epoch": 1, "consumed_units": 4})
    steps.set_epoch(1)
    assert len(steps) == 3, "Lightning counts the steps of a whole epoch"
    assert list(steps) == [[14, 15, 16, 17], [18, 19]]
    steps.set_epoch(2)
    assert list(steps) == [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29]]


def test_a_resume_with_another_batch_size_is_exact_to_the_unit() -> None:
    steps = loader(global_batch_size=3)
    steps.load_state_dict({"epoch": 0, "consumed_units": 4})
    assert list(steps) == [[4, 5, 6], [7, 8, 9]]


def test_a_resume_at_the_end_of_an_epoch_begins_the_next_one() -> None:
    steps = loader()
    steps.load_state_dict({"epoch": 0, "consumed_units": 10})
    assert list(steps) == []
    steps.set_epoch(1)
    assert list(steps) == [[10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]


def test_setting_the_epoch_that_was_begun_does_not_go_back() -> None:
    steps = loader()
    next(iter(steps))
    steps.set_epoch(0)
    assert next(iter(steps)) == [4, 5, 6, 7]


def test_an_eval_loader_lays_out_once_and_gives_the_same_batches_each_time() -> None:
    calls = []

    def make_batches() -> list:
        calls.append("laid out")
        return [lambda: "first", lambda: "second"]

    batches = EvalLoader(make_batches)
    assert calls == []
    assert len(batches) == 2
    assert list(batches) == ["first", "second"]
    assert list(batches) == ["first", "second"]
    assert calls == ["laid out"]
