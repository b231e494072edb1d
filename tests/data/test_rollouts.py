"""Rollouts from prompts: which responses make which optimizer step, on any ranks, and from any cursor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lf_lightning import BackboneSpec, DataModule, InputError
from lf_lightning.data.batches import Batches
from lf_lightning.data.collate_rollouts import Exchange, exchanges_of, rollout_batch
from lf_lightning.data.layout import MicroBatchRule
from lf_lightning.data.prompts import Prompt
from lf_lightning.data.rollouts import RolloutLoader, RolloutPlan
from lf_lightning.types import IGNORE, PromptBatch, Response, RolloutBatch, StepBatch

TWO = MicroBatchRule(2, None)
BACKBONE = BackboneSpec(architecture={"model_type": "llama", "hidden_size": 8}, tokenizer="bytes")


class Stage:
    """Answers prompt p of length n by n % 4 + 1 tokens 100 + n; a rollout that it has made is not made again."""

    def __init__(self, *others: Stage) -> None:
        self.others = others  # ranks that run beside this one
        self.asked: list[tuple[int, list[PromptBatch]]] = []
        self.seen: list[list[StepBatch]] = []
        self.made: dict[int, list[Response]] = {}

    def rollout(self, number: int, prompts: Sequence[PromptBatch]) -> list[Response]:
        self.asked.append((number, list(prompts)))
        if number not in self.made:
            found = [
                Response(row, (100 + int(length),) * (int(length) % 4 + 1), False)
                for batch in prompts
                for row, length in zip(batch.rows, batch.mask.sum(1), strict=True)
                if row >= 0
            ]
            self.made[number] = sorted(found)
        return self.made[number]

    def make_experience(self, steps: Sequence[StepBatch]) -> None:
        self.seen.append(list(steps))


def prompts_of(number: int) -> list[Prompt]:
    return [Prompt(f"p{i}", tuple(range(3, 5 + i)), f"r{i}", "set", i + 1) for i in range(number)]


def plan_of(**changes: Any) -> RolloutPlan:
    sizes: dict[str, Any] = {"rollout_size": 6, "group_size": 1, "num_epochs": 2, "global_batch_size": 4}
    return RolloutPlan(**{**sizes, "seed": 5, "shuffle": True, **changes})


def loader_of(
    stage: Any,
    number: int = 14,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    rule: MicroBatchRule = TWO,
    layout: Any = "padded",
    **changes: Any,
) -> RolloutLoader:
    batches = Batches("ppo", layout, share_prompt=False, isolate=False, max_length=64, rank=rank, num_ranks=num_ranks)
    return RolloutLoader(
        prompts_of(number),
        plan_of(**changes),
        rule=rule,
        batches=lambda: batches,
        stage=lambda: stage,
        batch_size=3,
        pad_id=3,
    )


def rows(step: StepBatch) -> list[int]:
    return sorted(int(row) for micro_batch in step.micro_batches for row in micro_batch.rows)


def told(step: StepBatch) -> list[Any]:
    return [
        each.tolist() for micro in step.micro_batches for each in (micro.rows, micro.tokens.input_ids, micro.places)
    ]


# ---------------------------------------------------------------------- a micro-batch


def test_two_responses_as_padded_rows_by_hand():
    first, second = exchanges_of([(5, 6), (7,)], [(8, 9, 2), (4,)])
    assert second == Exchange((7,), (4,), row=1, first=3)
    batch = rollout_batch([second, first], layout="padded")
    assert batch.tokens.input_ids.tolist() == [[7, 4, 0, 0, 0], [5, 6, 8, 9, 2]]
    x = IGNORE
    assert batch.tokens.targets.tolist() == [[4, x, x, x, x], [x, 8, 9, 2, x]]
    assert batch.tokens.sequences is not None
    assert batch.tokens.sequences.tolist() == [[0, 2, 2, 2, 2], [2, 1, 1, 1, 2]]
    assert batch.places.tolist() == [[3, -1, -1, -1, -1], [-1, 0, 1, 2, -1]]
    assert batch.rows.tolist() == [1, 0]
    assert (batch.num_units, batch.num_tokens) == (2, 7)


def test_two_responses_in_one_row_by_hand():
    batch = rollout_batch(exchanges_of([(5, 6), (7,)], [(8, 9, 2), (4,)]), layout="padding_free")
    assert batch.tokens.input_ids.tolist() == [[5, 6, 8, 9, 2, 7, 4]]
    assert batch.tokens.targets.tolist() == [[IGNORE, 8, 9, 2, IGNORE, 4, IGNORE]]
    assert batch.tokens.positions is not None
    assert batch.tokens.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert batch.places.tolist() == [[-1, 0, 1, 2, -1, 3, -1]]


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_a_filler_has_tokens_of_which_nothing_counts(layout: Any):
    batch = rollout_batch([], layout=layout)
    assert batch.tokens.input_ids.shape == (1, 2)
    assert batch.rows.tolist() == []
    assert batch.places.tolist() == [[-1, -1]]
    assert (batch.num_units, batch.num_tokens) == (0, 0)


# ---------------------------------------------------------------------- an epoch


@pytest.mark.parametrize("number", [1, 3, 6, 13, 14])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_epochs": 1},
        {"rollout_size": 12, "group_size": 3},
        {"rollout_size": 24, "global_batch_size": 5},
        {"shuffle": False},
    ],
)
def test_every_prompt_is_answered_once_an_epoch_and_learned_in_every_pass(number: int, changes: dict[str, Any]):
    stage = Stage()
    loader, plan = loader_of(stage, number, **changes), plan_of(**changes)
    steps = list(loader)
    assert len(steps) == len(loader)
    asked = Counter(text for _, batches in stage.asked for batch in batches for text in batch.prompts)
    assert asked == {f"p{i}": plan.group_size for i in range(number)}
    learned = Counter(int(ids) for step in steps for micro in step.micro_batches for ids in micro.rows)
    assert sum(learned.values()) == number * plan.group_size * plan.num_epochs
    assert [number for number, _ in stage.asked] == list(range(len(stage.asked)))
    assert all(len(rows(step)) <= plan.global_batch_size for step in steps)


def test_the_responses_to_a_prompt_lie_side_by_side():
    stage = Stage()
    next(iter(loader_of(stage, rollout_size=12, group_size=3, shuffle=False)))
    (_, batches), *_ = stage.asked
    by_row = {row: text for batch in batches for row, text in zip(batch.rows, batch.prompts, strict=True)}
    assert [by_row[row] for row in range(12)] == [f"p{i}" for i in range(4) for _ in range(3)]


def test_a_pass_holds_every_response_once_and_no_two_passes_have_the_same_order():
    stage = Stage()
    steps = list(loader_of(stage, 6, num_epochs=3))
    passes = [steps[start : start + 2] for start in (0, 2, 4)]
    for each in passes:
        assert sorted(rows(each[0]) + rows(each[1])) == list(range(6))
        assert [len(rows(step)) for step in each] == [4, 2]
    assert len({tuple(rows(each[0])) for each in passes}) > 1


def test_the_very_batches_of_the_first_pass_are_handed_out():
    stage = Stage()
    steps = list(loader_of(stage, 6))
    assert [id(step) for step in stage.seen[0]] == [id(step) for step in steps[:2]]


def test_rollouts_are_counted_over_epochs_and_each_epoch_has_its_own_order():
    stage = Stage()
    loader = loader_of(stage)
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        list(loader)
        orders.append([text for _, batches in stage.asked[3 * epoch :] for text in batches[0].prompts])
    assert [number for number, _ in stage.asked] == [0, 1, 2, 3, 4, 5]
    assert orders[0] != orders[1]


def test_the_places_of_a_step_name_each_counted_token_once():
    stage = Stage()
    for step in loader_of(stage, 6):
        places = [int(place) for micro in step.micro_batches for place in micro.places.flatten() if place >= 0]
        counted = sum(int((micro.tokens.targets != IGNORE).sum()) for micro in step.micro_batches)
        assert len(set(places)) == len(places) == counted


# ---------------------------------------------------------------------- ranks and micro-batches


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("rule", [MicroBatchRule(1, None), MicroBatchRule(3, None), MicroBatchRule(None, 40)])
@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_ranks_and_micro_batches_never_change_the_responses_of_a_step(num_ranks: int, rule: Any, layout: Any):
    want = [rows(step) for step in loader_of(Stage(), 5, rollout_size=5, global_batch_size=5)]
    whole = Stage()
    list(loader_of(whole, 5, rollout_size=5, global_batch_size=5))
    stages = [Stage() for _ in range(num_ranks)]
    for stage in stages:
        stage.made = whole.made  # what the ranks give each other
    per_rank = [
        list(
            loader_of(
                stage, 5, rank=rank, num_ranks=num_ranks, rule=rule, layout=layout, rollout_size=5, global_batch_size=5
            )
        )
        for rank, stage in enumerate(stages)
    ]
    found = [sorted(row for step in steps for row in rows(step)) for steps in zip(*per_rank, strict=True)]
    assert found == want
    for steps in zip(*per_rank, strict=True):
        assert len({len(step.micro_batches) for step in steps}) == 1
    assert len({len(batches) for stage in stages for _, batches in stage.asked}) == 1
    asked = [row for stage in stages for batch in stage.asked[0][1] for row in batch.rows if row >= 0]
    assert sorted(asked) == list(range(5))


# ---------------------------------------------------------------------- the cursor


@pytest.mark.parametrize("changes", [{}, {"rollout_size": 12, "group_size": 3}, {"global_batch_size": 6}])
def test_from_every_cursor_the_rest_is_that_of_the_straight_run(changes: dict[str, Any]):
    stage, states = Stage(), []
    straight, expected = loader_of(stage, **changes), []
    for epoch in range(2):
        straight.set_epoch(epoch)
        for step in straight:
            expected.append(told(step))
            states.append((epoch, straight.state_dict(), straight.in_rollout))
    per_epoch = len(straight)
    for position, (epoch, state, in_rollout) in enumerate(states):
        resumed = loader_of(stage, **changes)
        resumed.load_state_dict(state)
        assert resumed.in_rollout == in_rollout
        found = []
        for later in range(epoch, 2):
            resumed.set_epoch(later)
            if (position + 1) % per_epoch or later > epoch:  # at the end of an epoch Lightning begins the next
                found += [told(step) for step in resumed]
        assert found == expected[position + 1 :]


def test_it_is_in_a_rollout_from_its_first_step_to_the_one_before_its_last():
    loader = loader_of(Stage(), 12)
    assert not loader.in_rollout
    assert [loader.in_rollout for _ in loader] == [True, True, True, False] * 2


# ---------------------------------------------------------------------- the DataModule


def data_of(folder: Path, task: Any = "ppo", **options: Any) -> DataModule:
    records = [{"instruction": f"Say {'a' * i}", "output": f"r{i}"} for i in range(1, 13)]
    given = {"datasets": [{"records": records}], "max_length": 96, "seed": 5, "global_batch_size": 4}
    return DataModule(BACKBONE, task, **{**given, "cache_dir": str(folder / "cache"), **options})


def attached(data: DataModule, stage: Stage | None = None) -> DataModule:
    trainer: Any = SimpleNamespace(lightning_module=stage or Stage(), strategy=None, state=SimpleNamespace(fn="fit"))
    data.trainer = trainer
    return data


def test_the_data_module_rolls_out_with_the_stage_of_its_trainer(tmp_path: Path):
    stage = Stage()
    data = attached(data_of(tmp_path, rollout_size=6, micro_batch_size=2), stage)
    data.group_size, data.rollout_epochs = 3, 2
    loader = data.train_dataloader()
    assert not data.rollout_in_progress
    steps = list(loader)
    assert len(steps) == len(loader) == 6 * 2 * 2
    assert all(isinstance(micro, RolloutBatch) for step in steps for micro in step.micro_batches)
    assert not (tmp_path / "cache").exists()


def test_a_rollout_in_progress_is_said(tmp_path: Path):
    data = attached(data_of(tmp_path, rollout_size=8))
    iterator = iter(data.train_dataloader())
    next(iterator)
    assert data.rollout_in_progress
    next(iterator)
    assert not data.rollout_in_progress


@pytest.mark.parametrize(
    ("options", "attributes", "where"),
    [
        ({"rollout_size": 8}, {}, r"data\.rollout_size: must be the same as in the checkpoint, 6, got 8\."),
        ({}, {"group_size": 3}, r"model\.init_args\.constants\.group_size: must be the same"),
        ({}, {"rollout_epochs": 3}, r"model\.init_args\.constants\.num_epochs: must be the same"),
        ({"global_batch_size": 3}, {}, r"data\.global_batch_size: must be the same"),
        ({"seed": 6}, {}, r"data\.seed: must be the same"),
        ({"max_samples": 9}, {}, r"data\.max_samples: must be the same as in the checkpoint, null, got 9"),
    ],
)
def test_a_cursor_of_another_order_is_refused(
    options: dict[str, Any], attributes: dict[str, Any], where: str, tmp_path: Path
):
    before = attached(data_of(tmp_path, rollout_size=6))
    before.train_dataloader()
    after = attached(data_of(tmp_path, **{"rollout_size": 6, **options}))
    for name, value in attributes.items():
        setattr(after, name, value)
    after.load_state_dict(before.state_dict())
    with pytest.raises(InputError, match=where):
        after.train_dataloader()


def test_responses_of_a_prompt_batch_become_one_micro_batch_in_its_order(tmp_path: Path):
    data = data_of(tmp_path)
    batch = PromptBatch(
        input_ids=torch.tensor([[9, 9, 5], [9, 6, 9]]),  # 9 pads, and is a word of the second prompt
        mask=torch.tensor([[0, 0, 1], [0, 1, 1]]),
        rows=(4, -1),
        prompts=("a", "b"),
        references=("", ""),
    )
    found = data.answered(batch, [Response(4, (7, 2), True), Response(-1, (8,), False)])
    assert found.tokens.input_ids.tolist() == [[5, 7, 2], [6, 9, 8]]
    assert found.places.tolist() == [[0, 1, -1], [-1, 2, -1]]
    assert found.rows.tolist() == [0, 1]


@pytest.mark.parametrize("size", [7, 8])
def test_a_rollout_holds_whole_groups(size: int, tmp_path: Path):
    data = attached(data_of(tmp_path, "grpo", rollout_size=size))
    data.group_size = 3
    with pytest.raises(InputError, match=rf"data\.rollout_size: must be a multiple of .*group_size, 3, got {size}\."):
        data.train_dataloader()
