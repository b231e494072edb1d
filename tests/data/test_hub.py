"""Datasets of the hub as a stream, by the datasets library; a local folder stands for the hub."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lf_lightning.data import hub
from lf_lightning.data.hub import hub_digest
from lf_lightning.data.shards import shards_of
from lf_lightning.data.sources import HubSource, resolve_sources
from lf_lightning.data.stream import Stream
from lf_lightning.types import InputError, TrainingStopped
from tests.data.streams import data_module, loader, pass_of, plan, texts, write_rows
from tests.data.test_streaming import started


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library asks no network."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def repo(tmp_path: Path, offline: None) -> Path:
    """Thirty rows in three files."""
    (tmp_path / "repo").mkdir()
    for number in range(3):
        write_rows(tmp_path / "repo" / f"train-{number}.jsonl", texts(10 * number, 10 * number + 10))
    write_rows(tmp_path / "repo" / "test-0.jsonl", texts(30, 34))
    return tmp_path / "repo"


def source(repo: Path, **options: Any) -> HubSource:
    return HubSource("mine", None, "text", repo=str(repo), **options)


def test_a_dataset_of_the_hub_is_a_stream_that_goes_on_after_any_step(repo: Path):
    steps = loader([source(repo)], steps=12, size=4, order=plan(buffer_size=7))
    straight, states = [], []
    for step in steps:
        straight.append(step)
        states.append(copy.deepcopy(steps.state_dict()))
    assert sorted(text for step in straight[:8] for text in step) == sorted(f"row {number}|" for number in range(30))
    for at in (0, 5, 7, 9):
        resumed = loader([source(repo)], steps=12, size=4, order=plan(buffer_size=7))
        resumed.load_state_dict(states[at])
        assert list(resumed) == straight[at + 1 :]


def test_a_split_is_read_alone_and_what_cannot_seek_is_announced(repo: Path, capsys: pytest.CaptureFixture[str]):
    stream = Stream(shards_of([source(repo, split="test")]), plan(buffer_size=2))
    assert sorted(pass_of(stream)) == [f"row {number}" for number in range(30, 34)]
    first, second = (buffer for _, buffer in zip(range(2), stream.buffers(), strict=False))
    assert first.end == second.start
    assert capsys.readouterr().err == ""
    assert next(stream.buffers(0, 1, second.start)) == second
    line = "streaming: mine is read by the datasets library, which may not seek: reading up to its row 2 again\n"
    assert capsys.readouterr().err == line


def test_an_entry_names_repository_subset_split_and_folder(tmp_path: Path):
    entry = {"hf_hub_url": "org/set", "subset": "en", "split": "test", "folder": "data", "formatting": "sharegpt"}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"named": entry}))
    named, inline = resolve_sources(["named", {**entry, "name": "own"}], str(tmp_path), streaming=True)
    expected = HubSource("named", None, "sharegpt", repo="org/set", subset="en", split="test", folder="data")
    assert named == expected
    assert inline == HubSource(**{**vars(expected), "name": "own"})
    with pytest.raises(
        InputError, match=r"hf_hub_url is not supported yet but in data\.datasets with data\.streaming: true"
    ):
        resolve_sources(["named"], str(tmp_path))


def test_rows_that_validate_are_the_first_of_the_hub_too(repo: Path):
    data = started([{"hf_hub_url": str(repo), "name": "mine", "formatting": "text"}], task="pt", val_size=13)
    assert [prompt.text for prompt in data.prompts("val")] == [f"row {number}" for number in range(13)]
    seen = sorted({tuple(row) for step in data.train_dataloader() for row in step.rows()})
    assert seen == [*(("mine/2", row) for row in range(4, 11)), *(("mine/3", row) for row in range(1, 11))]


def test_another_version_of_the_files_has_another_digest(repo: Path):
    before = hub_digest(source(repo))
    assert hub_digest(source(repo)) == before
    write_rows(repo / "train-3.jsonl", texts(40, 50))
    assert hub_digest(source(repo)) != before


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"hf_hub_url": "no/such"}, "no/such cannot be read: "),
        ({"split": "tets"}, "cannot be read: Bad split: tets"),
        ({"subset": "en"}, "cannot be read: BuilderConfig 'en' not found"),
    ],
)
def test_what_cannot_be_read_is_one_line(repo: Path, entry: dict[str, Any], message: str):
    data = data_module([{"hf_hub_url": str(repo), "name": "mine", "formatting": "text", **entry}], task="pt")
    with pytest.raises(InputError) as error:
        data.open_sets("fit")
    assert str(error.value).startswith("mine: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_that_falls_silent_stops_the_run_with_a_line(repo: Path, monkeypatch: pytest.MonkeyPatch):
    class Silent:
        num_shards = 1

        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield {"text": "one"}
            raise ConnectionError("the line is dead")

        def state_dict(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(hub, "_opened", lambda source: Silent())
    with pytest.raises(TrainingStopped, match=r"gave no row after row 1 of shard 1: the line is dead\. Continue with"):
        pass_of(Stream(shards_of([source(repo)]), plan()))
