"""Steps from a stream: the same after any resume and on any number of ranks; rows that fail are refused or counted."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lf_lightning.data import files as files_module
from lf_lightning.data.batches import Batches
from lf_lightning.data.layout import MicroBatchRule
from lf_lightning.data.places import Place
from lf_lightning.data.shards import shards_of
from lf_lightning.data.source import Source
from lf_lightning.data.stream import Stream
from lf_lightning.data.stream_loader import StreamLoader
from lf_lightning.types import IGNORE, InputError, StepBatch, Unit
from tests.data.streams import files, loader, plan, text_source, texts, write_rows


def test_a_loader_has_as_many_steps_as_it_is_told_over_as_many_passes_as_that_takes(tmp_path: Path):
    source = files(tmp_path, (4, 6))
    steps = loader([source], steps=7, size=4)
    found = list(steps)
    assert len(steps) == len(found) == 7
    assert [len(step) for step in found] == [4, 4, 2, 4, 4, 2, 4]
    passes = [[text for step in found[start : start + 3] for text in step] for start in (0, 3)]
    assert passes[0] != passes[1]
    assert [sorted(each) for each in passes] == [sorted(f"row {number}|" for number in range(10))] * 2
    assert list(steps) == []


OPTIONS: list[dict[str, Any]] = [
    {},
    {"packing": "blocks", "max_length": 16},
    {"order": plan(buffer_size=1)},
    {"order": plan(mix_strategy="interleave_over", probs=(1.0, 2.0))},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["rows", "blocks", "no buffer", "interleaved"])
def test_a_loader_goes_on_after_any_step_as_if_it_had_not_stopped(tmp_path: Path, options: dict[str, Any]):
    sources = [files(tmp_path, (4, 7), name="a"), files(tmp_path, (6, 5, 2), name="b")]
    steps = loader(sources, steps=30, size=3, **options)
    states, straight = [copy.deepcopy(steps.state_dict())], []
    for step in steps:
        straight.append(step)
        states.append(copy.deepcopy(steps.state_dict()))
    assert len({tuple(step) for step in straight}) > 15
    for done, state in enumerate(states):
        resumed = loader(sources, steps=30, size=3, **options)
        resumed.load_state_dict(copy.deepcopy(state))
        for step, later in zip(resumed, states[done + 1 :], strict=True):
            assert step == straight[done]
            assert resumed.state_dict() == later
            done += 1
        assert done == 30


REWRITING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if loop.last or message.role == 'user' else message.content[:3] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template that shortens earlier answers: each answer is then a document of its own."""


def test_a_row_of_several_documents_is_cut_by_a_step_and_by_a_resume(tmp_path: Path):
    chat = {"conversations": [{"from": who, "value": f"{who} {turn}"} for turn in range(3) for who in ("human", "gpt")]}
    write_rows(tmp_path / "chats.jsonl", [chat] * 4)
    source = Source("chats", tmp_path / "chats.jsonl", "sharegpt")

    def made() -> StreamLoader:
        built = loader([source], task="sft", steps=9, size=5, max_length=256)
        encoder = built._encoder._replace(template=dataclasses.replace(built._encoder.template, jinja=REWRITING))
        built._encoder = built._documents._encoder = encoder
        return built

    steps = made()
    straight, states = [], []
    for step in steps:
        straight.append(step)
        states.append(copy.deepcopy(steps.state_dict()))
    assert [len(step) for step in straight] == [5, 5, 2] * 3
    assert {state["stream"]["documents"] for state in states} == {0, 1, 2}
    for done, state in enumerate(states, start=1):
        resumed = made()
        resumed.load_state_dict(state)
        assert list(resumed) == straight[done:]


def test_blocks_lose_no_token_and_only_the_last_of_a_pass_is_short(tmp_path: Path):
    source = files(tmp_path, (11,))
    order = plan(shuffle=False, buffer_size=1)
    found = list(loader([source], steps=4, size=2, packing="blocks", max_length=24, order=order))
    text = "".join(f"row {number}|" for number in range(11))
    blocks = [text[start : start + 24] for start in range(0, len(text), 24)]
    assert [block for step in found[:2] for block in step] == blocks
    assert found[2:] == found[:2]


# ---------------------------------------------------------------------- ranks


def batches_of(rank: int, num_ranks: int, *, layout: Any = "padding_free") -> Any:
    batches = Batches("pt", layout, share_prompt=False, isolate=False, max_length=64, rank=rank, num_ranks=num_ranks)

    def arrange(units: Sequence[Unit], store: Any) -> StepBatch:
        return batches.step(units, store, MicroBatchRule(2, None))

    return arrange


def sequences(step: StepBatch) -> list[tuple[int, ...]]:
    """The documents of a step's micro-batches, without fillers."""
    found = []
    for batch in step.micro_batches:
        ids, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
        start = 0
        for document in batch.documents:
            if any(target != IGNORE for target in targets[start : start + document.num_tokens]):
                found.append(tuple(ids[start : start + document.num_tokens]))
            start += document.num_tokens
    return found


def test_another_number_of_ranks_has_the_same_sequences_in_the_same_steps(tmp_path: Path):
    """2 ranks, then 1, then 3, each from the checkpoint of the one before; against a straight run on one."""
    source = files(tmp_path, (9, 14))

    def made(rank: int, num_ranks: int) -> StreamLoader:
        return loader([source], steps=12, size=5, arrange=batches_of(rank, num_ranks))

    straight = [sorted(sequences(step)) for step in made(0, 1)]
    state = None
    seen: list[list[tuple[int, ...]]] = []
    for num_ranks, num_steps in ((2, 4), (1, 3), (3, 5)):
        ranks = [made(rank, num_ranks) for rank in range(num_ranks)]
        iterators = [iter(rank) for rank in ranks]
        if state is not None:
            for rank in ranks:
                rank.load_state_dict(copy.deepcopy(state))
        for _ in range(num_steps):
            shares = [next(iterator) for iterator in iterators]
            assert len({len(share.micro_batches) for share in shares}) == 1
            seen.append(sorted(sequence for share in shares for sequence in sequences(share)))
        states = [rank.state_dict() for rank in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert seen == straight
    first_pass = Counter(sequence for step in seen[:5] for sequence in step)
    assert len(first_pass) == 23
    assert set(first_pass.values()) == {1}


# ---------------------------------------------------------------------- what a resume costs

NUM_ROWS, STEP_SIZE, AT, BUFFER = 1_000_000, 8, 100_000, 256
ROW = '{"text": "%07d"}\n'


@pytest.fixture(scope="module")
def million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("million") / "rows.jsonl"
    path.write_text("".join(ROW % number for number in range(NUM_ROWS)))
    return path


class CountedFile:
    """A file that counts the lines and bytes that are read of it."""

    reads: ClassVar[Counter[str]] = Counter()

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def seek(self, byte: int) -> None:
        self.reads["seeks"] += 1
        self._file.seek(byte)

    def __iter__(self) -> Any:
        for line in self._file:
            self.reads["lines"] += 1
            self.reads["bytes"] += len(line)
            yield line


def test_a_stream_reads_for_a_resume_at_step_100_000_what_it_reads_at_step_0(
    million: Path, monkeypatch: pytest.MonkeyPatch
):
    source = text_source(million)
    shards = shards_of([source])
    monkeypatch.setattr(files_module, "_opened", CountedFile)
    order = plan(buffer_size=BUFFER)
    consumed, length = AT * STEP_SIZE, len(ROW % 0)
    start = consumed // BUFFER * BUFFER
    lane = {"turn": 0, "shard": 0, "row": start, "at": (start * length, start)}
    at_100_000 = {
        "step": AT,
        "consumed_units": consumed,
        "stream": {
            "epoch": 0,
            "buffer": start // BUFFER,
            "start": {"draws": 0, "ended": [False], "lanes": [lane]},
            "row": consumed % BUFFER,
            "documents": 0,
            "tokens": 0,
            "counts": {},
        },
    }
    costs, firsts = [], []
    for state in (None, at_100_000):
        steps = loader([source], shards=shards, steps=2 * AT, size=STEP_SIZE, order=order)
        if state is not None:
            steps.load_state_dict(state)
        CountedFile.reads.clear()
        firsts.append(next(iter(steps)))
        costs.append(dict(CountedFile.reads))
    assert costs[0] == costs[1] == {"seeks": 1, "lines": BUFFER, "bytes": BUFFER * length}
    block = next(Stream(shards, order).buffers(0, start // BUFFER, at_100_000["stream"]["start"]))
    expected = [row.values["text"] + "|" for row in block.rows[consumed % BUFFER :][:STEP_SIZE]]
    assert firsts[1] == expected
    assert {int(text[:-1]) // BUFFER for text in firsts[1]} == {start // BUFFER}


def test_the_state_of_step_1000_is_made_as_the_one_above_was_and_is_no_larger_than_that_of_step_1(million: Path):
    source, order = text_source(million), plan(buffer_size=BUFFER)
    shards = shards_of([source])
    steps = loader([source], shards=shards, steps=1001, size=STEP_SIZE, order=order)
    sizes = []
    for number, _ in enumerate(steps, start=1):
        if number in (40, 1000):
            sizes.append(len(str(steps.state_dict())))
            state = copy.deepcopy(steps.state_dict())
    start = 8000 // BUFFER * BUFFER
    lane = {"turn": 0, "shard": 0, "row": start, "at": (start * len(ROW % 0), start)}
    place = state["stream"]
    assert place["start"] == {"draws": 0, "ended": [False], "lanes": [lane]}
    assert (place["buffer"], place["row"]) == (start // BUFFER, 8000 % BUFFER)
    assert sizes[1] - sizes[0] < 30


def test_thousand_resumes_read_a_thousand_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = files(tmp_path, (60, 60))
    order = plan(buffer_size=16)
    shards = shards_of([source])
    straight = list(loader([source], shards=shards, steps=1000, size=4, order=order))
    monkeypatch.setattr(files_module, "_opened", CountedFile)
    CountedFile.reads.clear()
    state: Any = None
    for step in straight:
        steps = loader([source], shards=shards, steps=1000, size=4, order=order)
        if state is not None:
            steps.load_state_dict(state)
        assert next(iter(steps)) == step
        state = steps.state_dict()
    assert CountedFile.reads["lines"] <= 1000 * 2 * 16


# ---------------------------------------------------------------------- rows that fail

MIXED = [{"text": "one"}, {"text": ""}, {"text": "two"}, {"other": 3}, {"text": ""}, {"text": "three"}]


def test_a_row_that_cannot_be_used_stops_the_run_with_its_number(tmp_path: Path):
    source = text_source(write_rows(tmp_path / "rows.jsonl", MIXED))
    steps = loader([source], order=plan(shuffle=False, buffer_size=1), size=1)
    iterator = iter(steps)
    assert next(iterator) == ["one|"]
    with pytest.raises(InputError, match=r"rows, row 2: .* Fix the row, or set data.invalid_rows: skip\.$"):
        next(iterator)


def test_rows_that_cannot_be_used_are_skipped_and_counted_once_across_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = text_source(write_rows(tmp_path / "rows.jsonl", MIXED))
    options: dict[str, Any] = {
        "order": plan(shuffle=False, buffer_size=1),
        "size": 1,
        "steps": 4,
        "invalid_rows": "skip",
    }
    assert list(loader([source], **options)) == [["one|"], ["two|"], ["three|"], ["one|"]]
    straight = capsys.readouterr().err
    assert "streaming: rows, row 2 dropped: " in straight
    assert straight.count("dropped: ") == 2, "once for each reason"
    over = "streaming: pass 1 is over. rows: 6 rows, 3 kept, 0 cut, 3 dropped\n"
    assert over in straight
    assert "streaming: 4 steps end in pass 2. rows: 1 rows, 1 kept, 0 cut, 0 dropped\n" in straight
    state: Any = None
    for _ in range(4):
        steps = loader([source], **options)
        if state is not None:
            steps.load_state_dict(state)
        next(iter(steps))
        state = copy.deepcopy(steps.state_dict())
    assert over in capsys.readouterr().err


def test_a_stream_without_any_usable_row_is_one_line(tmp_path: Path):
    source = text_source(write_rows(tmp_path / "rows.jsonl", [{"text": ""}] * 3))
    with pytest.raises(InputError, match=r"data.datasets: no row of rows can be used\. Check formatting"):
        next(iter(loader([source], invalid_rows="skip")))


def test_a_unit_knows_its_file_and_row(tmp_path: Path):
    source = files(tmp_path, (2, 3))
    order = plan(shuffle=False, buffer_size=1)
    step = next(iter(loader([source], size=4, order=order, arrange=batches_of(0, 1))))
    assert {tuple(row) for row in step.rows()} == {
        ("rows/0.jsonl", 1),
        ("rows/0.jsonl", 2),
        ("rows/1.jsonl", 1),
        ("rows/1.jsonl", 2),
    }
    alone = text_source(write_rows(tmp_path / "alone.jsonl", texts(0, 9)))
    step = next(iter(loader([alone], size=1, order=order, arrange=batches_of(0, 1))))
    assert [tuple(row) for row in step.rows()] == [("alone", 1)]


def test_the_state_is_tensors_and_plain_python(tmp_path: Path):
    steps = loader([files(tmp_path, (5, 5))])
    next(iter(steps))
    torch.save(steps.state_dict(), tmp_path / "state.ckpt")
    assert torch.load(tmp_path / "state.ckpt", weights_only=True) == steps.state_dict()
    assert not isinstance(steps.state_dict()["stream"]["start"], Place)
