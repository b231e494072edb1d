"""The DataModule with `streaming: true`: what validates never trains, what makes no sense is refused in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lf_lightning.data.stream_checks import check_stream_run
from lf_lightning.types import InputError
from tests.data.streams import FakeTrainer, data_module, texts, write_rows
from tests.stages.judgement_runs import dataset

QUESTIONS = [{"instruction": f"Say {number}.", "output": f"{number}!"} for number in range(40)]


def shard_files(folder: Path, sizes: Sequence[int] = (7, 9, 24)) -> list[dict[str, Any]]:
    """Forty questions in three files of one dataset."""
    (folder / "asked").mkdir(exist_ok=True)
    start = 0
    for number, size in enumerate(sizes):
        write_rows(folder / "asked" / f"{number}.jsonl", QUESTIONS[start : start + size])
        start += size
    return [{"path": str(folder / "asked"), "name": "asked"}]


def started(datasets: list[Any], *, max_steps: int = 12, **options: Any) -> Any:
    data = data_module(datasets, **options)
    data.trainer = FakeTrainer(max_steps)  # type: ignore[assignment]
    data.open_sets("fit")
    return data


def ids_of(loader: Any) -> list[tuple[int, ...]]:
    """The sequences of all steps."""
    found = []
    for step in loader:
        for batch in step.micro_batches:
            lengths = (batch.input_ids != 0).sum(-1).tolist()
            found += [tuple(row[:length]) for row, length in zip(batch.input_ids.tolist(), lengths, strict=True)]
    return found


@pytest.mark.parametrize("val_size", [1, 7, 12])
def test_a_row_that_validates_trains_in_no_pass_and_after_no_resume(tmp_path: Path, val_size: int):
    datasets = shard_files(tmp_path)
    data = started(datasets, val_size=val_size, buffer_size=16, max_steps=40)
    validating = set(ids_of(data.val_dataloader()))
    assert len(validating) == val_size
    loader = data.train_dataloader()
    training, states = [], []
    for step in loader:
        training.append(step)
        states.append(copy.deepcopy(data.state_dict()))
    assert states[-1]["stream"]["epoch"] >= 3
    seen = set(ids_of(training))
    assert len(seen) == 40 - val_size
    assert not seen & validating
    for at in (2, 11, 29):
        resumed = started(datasets, val_size=val_size, buffer_size=16, max_steps=40)
        resumed.load_state_dict(states[at])
        assert ids_of(resumed.train_dataloader()) == ids_of(training[at + 1 :])
        assert set(ids_of(resumed.val_dataloader())) == validating


def test_the_rows_that_validate_come_from_the_start_of_each_dataset(tmp_path: Path):
    write_rows(tmp_path / "more.jsonl", [{"instruction": "More?", "output": f"more {number}"} for number in range(9)])
    data = started([*shard_files(tmp_path), {"path": str(tmp_path / "more.jsonl")}], val_size=5)
    asked = [(prompt.source, prompt.row, prompt.reference) for prompt in data.prompts("val")]
    assert asked == [
        ("asked", 1, "0!"),
        ("asked", 2, "1!"),
        ("asked", 3, "2!"),
        ("more", 1, "more 0"),
        ("more", 2, "more 1"),
    ]
    assert len(data.sets["val"].documents) == 5


def test_a_split_that_leaves_nothing_is_one_line(tmp_path: Path):
    for val_size in (40, 41):
        with pytest.raises(
            InputError, match=r"data.val_size: must leave rows to train on, got 4[01] rows of asked, which has 40"
        ):
            started(shard_files(tmp_path), val_size=val_size)


def test_eval_datasets_validate_instead(tmp_path: Path):
    held_out = write_rows(tmp_path / "held.jsonl", QUESTIONS[:3])
    data = started(shard_files(tmp_path), eval_datasets=[{"path": str(held_out)}], cache_dir=str(tmp_path / "cache"))
    assert len(ids_of(data.val_dataloader())) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the set that validates alone"


# ---------------------------------------------------------------------- every option counts


def steps_of(datasets: list[Any], **options: Any) -> list[tuple[int, ...]]:
    return ids_of(started(datasets, max_steps=12, **options).train_dataloader())


@pytest.mark.parametrize(
    "changes",
    [
        {"buffer_size": 8},
        {"shuffle": False, "buffer_size": None},
        {"seed": 4},
        {"val_size": 3},
        {"global_batch_size": 3},
        {"mix_strategy": "interleave_under"},
        {"mix_strategy": "interleave_under", "interleave_probs": [5.0, 1.0]},
    ],
)
def test_changing_an_option_changes_what_trains(tmp_path: Path, changes: dict[str, Any]):
    write_rows(tmp_path / "more.jsonl", [{"instruction": "More?", "output": f"more {number}"} for number in range(9)])
    datasets = [*shard_files(tmp_path), {"path": str(tmp_path / "more.jsonl")}]
    given = {"buffer_size": 16}
    assert steps_of(datasets, **given) == steps_of(datasets, **given)
    assert steps_of(datasets, **{**given, **changes}) != steps_of(datasets, **given)


def test_rows_that_cannot_be_used_are_refused_or_skipped(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [*QUESTIONS[:3], {"instruction": "?"}, *QUESTIONS[3:5]])
    options: dict[str, Any] = {"shuffle": False, "global_batch_size": 1, "max_steps": 5}
    assert len(ids_of(started([{"path": str(rows)}], invalid_rows="skip", **options).train_dataloader())) == 5
    with pytest.raises(InputError, match=r"rows, row 4: .* Fix the row, or set data\.invalid_rows: skip"):
        list(started([{"path": str(rows)}], **options).train_dataloader())


# ---------------------------------------------------------------------- other stages


def test_kto_takes_its_partner_from_the_step(tmp_path: Path):
    data = started(dataset(tmp_path, "KTO"), task="kto", max_steps=3)
    for step in data.train_dataloader():
        (batch,) = step.micro_batches
        assert batch.has_partner.tolist() == [True] * 4
    data.wants_partners = False
    (batch,) = next(iter(data.train_dataloader())).micro_batches
    assert batch.has_partner.tolist() == [False] * 4
    assert data.num_desirable("train") is None


def test_pairs_carry_their_margins(tmp_path: Path):
    data = started(dataset(tmp_path, "RM", margin=True), task="rm", max_steps=3)
    margins = [batch.margins for step in data.train_dataloader() for batch in step.micro_batches]
    assert sorted({float(value) for each in margins for value in each}) == [0.0, 0.5, 1.0]


def test_texts_in_blocks(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", texts(0, 30))
    datasets = [{"path": str(rows), "formatting": "text"}]
    data = started(datasets, task="pt", packing="blocks", max_length=24, layout="padded", max_steps=3)
    sizes = [batch.num_tokens for step in data.train_dataloader() for batch in step.micro_batches]
    assert sizes == [96, 96, 8]


# ---------------------------------------------------------------------- what is refused

STREAM = {"streaming": True}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a buffer without a stream": (
        {"streaming": False, "buffer_size": 9},
        "data.buffer_size: is read with data.streaming: true alone, got 9. Remove it, or set that.",
    ),
    "mixing without a stream": (
        {"streaming": False, "mix_strategy": "interleave_over"},
        "data.mix_strategy: is read with data.streaming: true alone, got interleave_over.",
    ),
    "shares without a stream": (
        {"streaming": False, "interleave_probs": [1.0]},
        "data.interleave_probs: is read with data.streaming: true alone, got [1.0].",
    ),
    "a negative buffer": ({"buffer_size": -1}, "data.buffer_size: must be at least 0, got -1."),
    "a buffer that mixes nothing": (
        {"shuffle": False, "buffer_size": 9},
        "data.buffer_size: excludes data.shuffle: false, got 9. Remove one.",
    ),
    "a share that validates": (
        {"val_size": 0.1},
        "data.val_size: must be a whole number of rows with data.streaming: true, whose end nobody knows, got 0.1.",
    ),
    "the first rows": ({"max_samples": 9}, "data.max_samples: excludes data.streaming: true, got 9."),
    "packs": ({"packing": "knapsack"}, "data.packing: knapsack wants the lengths of all rows"),
    "processes": ({"num_workers": 2}, "data.num_workers: a stream is encoded in the training process, got 2."),
    "pairs of the files": (
        {"task": "kto", "kl_pairs": "dataset"},
        "data.kl_pairs: must be step with data.streaming: true, which does not know the row before, got dataset.",
    ),
    "rollouts": ({"task": "ppo"}, "data.streaming: must be false for ppo, whose prompts are read before training"),
    "mixing one dataset": (
        {"mix_strategy": "interleave_over"},
        "data.mix_strategy: interleave_over wants at least two data.datasets, got 1. Remove it.",
    ),
    "shares of what is not mixed": (
        {"interleave_probs": [1.0]},
        "data.interleave_probs: wants a data.mix_strategy that interleaves, got [1.0] with concat.",
    ),
    "a share too few": (
        {"datasets": ["a", "b"], "mix_strategy": "interleave_once", "interleave_probs": [1.0]},
        "data.interleave_probs: must be 2 positive numbers, one for each of data.datasets, got [1.0].",
    ),
    "a share of nothing": (
        {"datasets": ["a", "b"], "mix_strategy": "interleave_once", "interleave_probs": [1.0, 0.0]},
        "data.interleave_probs: must be 2 positive numbers, one for each of data.datasets, got [1.0, 0.0].",
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_stream_cannot_do_is_one_line(options: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        data_module(options.pop("datasets", ["a"]), **options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"max_steps": -1}, "trainer.max_steps: must say how long to train with data.streaming: true"),
        (
            {"max_epochs": 3},
            "trainer.max_epochs: must be empty with data.streaming: true, which counts steps alone, got 3",
        ),
        ({"every_n_epochs": 1}, "checkpoint.every_n_epochs: must be empty with data.streaming: true"),
        ({"precompute": True}, "model.init_args.reference.precompute: must be false with data.streaming: true"),
    ],
)
def test_a_run_that_a_stream_cannot_have_is_one_line(run: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        check_stream_run(**{"max_steps": 5, "max_epochs": -1, **run})
    assert str(error.value).startswith(message)


def test_what_looks_at_all_rows_is_refused_from_python_too(tmp_path: Path):
    data = data_module(shard_files(tmp_path))
    with pytest.raises(InputError, match=r"trainer\.max_steps: must say how long"):
        data.train_dataloader()
    with pytest.raises(InputError, match=r"data\.streaming: must be false for what looks at the training rows"):
        data.units("train")


# ---------------------------------------------------------------------- another stream than the checkpoint's


def test_another_stream_is_not_continued_unless_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    datasets = shard_files(tmp_path)
    data = started(datasets, buffer_size=8)
    iterator = iter(data.train_dataloader())
    next(iterator)
    state = copy.deepcopy(data.state_dict())
    assert state["order"]["num_units"] is None
    assert "asked" not in json.dumps(state), "a checkpoint names no dataset"

    def resumed(**options: Any) -> Any:
        again = started(datasets, **{"buffer_size": 8, **options})
        again.load_state_dict(state)
        return again.train_dataloader()

    resumed()
    with pytest.raises(
        InputError, match=r"^data\.buffer_size: must be the same as in the checkpoint, 8, got 9\. Change"
    ):
        resumed(buffer_size=9)
    with pytest.raises(InputError, match=r"^data\.streaming: must be the same as in the checkpoint, true, got false"):
        resumed(streaming=False, buffer_size=None, accept_changes=True)
    with pytest.raises(InputError, match=r"^data\.template: must be the same as in the checkpoint"):
        resumed(template="default")
    capsys.readouterr()
    resumed(template="default", accept_changes=True)
    assert "the place in the stream means nothing" not in capsys.readouterr().err
    loader = resumed(buffer_size=9, accept_changes=True)
    assert "accepted: the place in the stream means nothing any more, the next pass over it begins" in (
        capsys.readouterr().err
    )
    assert loader.state_dict()["stream"]["epoch"] == 1
    assert len(list(loader)) == 11
    shard_files(tmp_path, (7, 9, 23))
    with pytest.raises(InputError, match=r"data\.datasets: give|data\.datasets: must give the rows of the checkpoint"):
        resumed()
