"""A resume costs what a start costs, however far the run was: counted in reads, not in seconds."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from lf_lightning import BackboneSpec, DataModule
from lf_lightning.data import order, rollouts, sets
from lf_lightning.data.batches import Batches
from lf_lightning.data.collate_rollouts import Exchange
from lf_lightning.data.layout import MicroBatchRule
from lf_lightning.data.loader import StepLoader
from lf_lightning.data.prompts import Prompt
from lf_lightning.data.rollouts import RolloutLoader, RolloutPlan
from lf_lightning.data.sets import EncodedSet
from lf_lightning.data.store import TokenStore
from lf_lightning.types import PromptBatch, Response, StepBatch, Unit
from tests.cli.runs import LLAMA, ROWS

NUM_UNITS, STEP_SIZE, LENGTH = 1_000_000, 8, 4
AT = 100_000
"""The optimizer step of the resume; an epoch has 125,000."""


class Counted(np.ndarray):
    """An array that counts how often it is read."""

    reads: ClassVar[Counter[str]] = Counter()
    name = ""

    def __getitem__(self, key: Any) -> Any:
        Counted.reads[self.name] += 1
        return super().__getitem__(key)


def counted(array: np.ndarray, name: str) -> np.ndarray:
    view = array.view(Counted)
    view.name = name  # views of it have no name, and are counted under the empty one
    return view


@pytest.fixture(scope="module")
def store() -> TokenStore:
    """A million documents of four tokens."""
    ids = np.arange(NUM_UNITS * LENGTH, dtype=np.int32)
    return TokenStore(
        input_ids=counted(ids, "input_ids"),
        labels=counted(ids, "labels"),
        offsets=counted(np.arange(NUM_UNITS + 1) * LENGTH, "offsets"),
        source_index=counted(np.zeros(NUM_UNITS, np.int32), "source_index"),
        row=counted(np.arange(NUM_UNITS), "row"),
        names=("made",),
        summaries=(),
    )


@pytest.fixture
def no_collector() -> Iterator[None]:
    """A million units are two million tuples, which the garbage collector would visit again and again."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_map_dataset_reads_for_a_resume_at_step_100_000_what_it_reads_at_step_0(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch
):
    chosen = EncodedSet(store, np.arange(NUM_UNITS))
    batches = Batches("sft", "padding_free", share_prompt=False, isolate=False, max_length=64)
    calls: Counter[str] = Counter()
    ordered = order.epoch_order

    def epoch_order(*arguments: Any, **options: Any) -> Any:
        calls["epoch_order"] += 1
        return ordered(*arguments, **options)

    def units_of_epoch(epoch: int) -> list[Unit]:
        return chosen.units(packing="none", max_length=64, seed=3, epoch=epoch, shuffle=True)

    def arrange(units: Sequence[Unit], epoch: int) -> StepBatch:
        calls["arrange"] += 1
        calls["units"] += len(units)
        return batches.step(units, store, MicroBatchRule(None, 8192))

    monkeypatch.setattr(sets, "epoch_order", epoch_order)
    costs, firsts = [], []
    for step in (0, AT):
        loader = StepLoader(
            units_of_epoch=units_of_epoch, num_units=NUM_UNITS, global_batch_size=STEP_SIZE, arrange=arrange
        )
        loader.load_state_dict({"epoch": 0, "consumed_units": step * STEP_SIZE})
        loader.sampler.set_epoch(0)
        calls.clear()
        Counted.reads.clear()
        (micro_batch,) = next(iter(loader)).micro_batches
        assert loader.state_dict()["consumed_units"] == (step + 1) * STEP_SIZE
        costs.append((dict(calls), dict(Counted.reads)))
        firsts.append(micro_batch)
    assert costs[0] == costs[1]
    assert costs[0][0] == {"epoch_order": 1, "arrange": 1, "units": STEP_SIZE}
    assert costs[0][1]["input_ids"] == STEP_SIZE
    assert costs[0][1]["offsets"] <= 4 * STEP_SIZE
    expected = ordered(NUM_UNITS, seed=3, epoch=0, shuffle=True)[AT * STEP_SIZE : (AT + 1) * STEP_SIZE]
    assert set((firsts[1].input_ids.flatten() // LENGTH).tolist()) == set(expected.tolist())


class Prompts(Sequence[Prompt]):
    """A million prompts that count how often they are read."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return NUM_UNITS

    def __getitem__(self, index: Any) -> Any:
        self.reads.append(int(index))
        return Prompt("p", (3, 4), "r", "made", int(index) + 1)


class Stage:
    """Answers every prompt by one token, and holds the rollout that a checkpoint brought back."""

    def __init__(self, held: int | None = None) -> None:
        self.held, self.made, self.asked = held, [], []

    def rollout(self, number: int, prompts: Sequence[PromptBatch]) -> list[Response]:
        self.asked.append(number)
        if number != self.held:
            self.made.append(number)
        rows = [row for batch in prompts for row in batch.rows if row >= 0]
        return [Response(row, (5,), False) for row in sorted(rows)]

    def make_experience(self, steps: Sequence[StepBatch]) -> None: ...


@pytest.mark.parametrize(("in_rollout", "made"), [(0, [25_000]), (3, [])], ids=["between rollouts", "in a rollout"])
def test_a_rollout_is_not_made_again_and_no_prompt_is_read_for_those_behind(
    in_rollout: int, made: list[int], monkeypatch: pytest.MonkeyPatch
):
    plan = RolloutPlan(
        rollout_size=STEP_SIZE, group_size=1, num_epochs=4, global_batch_size=STEP_SIZE, seed=5, shuffle=True
    )
    arranged: list[int] = []
    real = rollouts.rollout_batch

    def rollout_batch(exchanges: Sequence[Exchange], **options: Any) -> Any:
        arranged.append(len(exchanges))
        return real(exchanges, **options)

    monkeypatch.setattr(rollouts, "rollout_batch", rollout_batch)
    batches = Batches("ppo", "padding_free", share_prompt=False, isolate=False, max_length=64)
    costs = []
    for finished, within in ((0, in_rollout), (AT // 4, in_rollout)):
        prompts, stage = Prompts(), Stage(held=finished if within else None)
        loader = RolloutLoader(
            prompts,
            plan,
            rule=MicroBatchRule(STEP_SIZE, None),
            batches=lambda: batches,
            stage=lambda stage=stage: stage,
            batch_size=STEP_SIZE,
            pad_id=0,
        )
        loader.load_state_dict({"epoch": 0, "consumed_units": finished * STEP_SIZE, "rollout_step": within})
        arranged.clear()
        next(iter(loader))
        assert stage.asked == [finished]
        costs.append((len(prompts.reads), list(arranged), len(stage.made)))
    assert stage.made == made
    assert costs[0] == costs[1]
    assert costs[0][0] == STEP_SIZE


def test_the_data_module_encodes_and_collates_no_more_for_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    backbone = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")
    options: dict[str, Any] = {"datasets": [{"records": ROWS * 25, "name": "rows"}], "cache_dir": str(tmp_path)}
    calls: Counter[str] = Counter()

    def note(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def noted(*arguments: Any, **given: Any) -> Any:
            calls[name] += 1
            return real(*arguments, **given)

        monkeypatch.setattr(owner, name, noted)

    costs = []
    for state in (None, 296):
        data = DataModule(backbone, global_batch_size=4, **options)
        data.open_sets("fit")
        if state is None:
            note(TokenStore, "document")
            note(Batches, "step")
            note(Batches, "micro_batch")
            order_of_run = data._order(300)
        else:
            data.load_state_dict({"epoch": 0, "consumed_units": state, "order": order_of_run})
        calls.clear()
        (_,) = next(iter(data.train_dataloader())).micro_batches
        costs.append(dict(calls))
    assert costs[0] == costs[1] == {"document": 4, "step": 1, "micro_batch": 1}
