"""Encoded data is made once, is the same for any number of workers, and says what became of the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lf_lightning.data import build
from lf_lightning.data import store as store_module
from lf_lightning.data.encode import EncodeOptions
from lf_lightning.data.prompts import Prompt, prompt_rows
from lf_lightning.data.source import Source
from lf_lightning.data.sources import resolve_sources
from lf_lightning.data.store import StoreSummary, TokenStore, build_store
from lf_lightning.data.templates import load_template
from lf_lightning.data.tokenizer import byte_tokenizer, fit_tokenizer, load_tokenizer
from lf_lightning.types import BackboneSpec, InputError

ROWS = [{"instruction": "ab", "output": "cd"}, {"instruction": "e", "output": "f" * 9}, {"instruction": "g"}]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "rows.json") -> Source:
    (folder / name).write_text(json.dumps(rows))
    return Source(name.split(".")[0], folder / name)


def made(*sources: Source, template: str = "empty", max_length: int = 8, **options: Any) -> TokenStore:
    tokenizer = byte_tokenizer()
    loaded = load_template(template, tokenizer)
    fit_tokenizer(tokenizer, loaded)
    return build_store(sources, EncodeOptions(max_length=max_length), tokenizer, loaded, **options)


def same(a: TokenStore, b: TokenStore) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in store_module.ARRAYS)
    return arrays and a.names == b.names and a.summaries == b.summaries


def test_documents_lie_one_after_the_other(tmp_path: Path) -> None:
    store = made(write(tmp_path, ROWS[:2]), write(tmp_path, ROWS[:1], "more.json"))
    assert len(store) == 3
    assert store.offsets.tolist() == [0, 5, 13, 18]
    assert store.lengths.tolist() == [5, 8, 5]
    assert store.source_index.tolist() == [0, 0, 1]
    assert store.row.tolist() == [1, 2, 1]
    assert store.names == ("rows", "more")
    ids, labels = store.document(0)
    assert (ids.tolist(), labels.tolist()) == ([100, 101, 102, 103, 2], [-100, -100, 102, 103, 2])
    assert (ids.dtype, labels.dtype, store.offsets.dtype) == (np.int32, np.int32, np.int64)


def test_the_first_invalid_row_stops(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        made(write(tmp_path, ROWS))
    assert str(error.value) == (
        "rows.json, row 3: has no answer to learn: the last turn must be the assistant's. "
        "Fix the row, or set data.invalid_rows: skip."
    )


def test_skipped_rows_are_counted_and_named(tmp_path: Path) -> None:
    store = made(write(tmp_path, [*ROWS, {"instruction": "h"}, {"instruction": 1}]), invalid_rows="skip")
    assert store.summaries[0].line() == (
        "rows: 5 rows, 2 kept, 1 cut (3 tokens), 3 dropped (row 3 and 1 more: has no answer to learn: the last turn "
        "must be the assistant's; row 5: column 'instruction' must be a string, got 1)"
    )
    assert store.row.tolist() == [1, 2]


def test_a_summary_says_when_nothing_happened_and_when_rows_were_split() -> None:
    assert StoreSummary("a", 1200, 1200, 1200).line() == "a: 1,200 rows, 1,200 kept, 0 cut, 0 dropped"
    line = StoreSummary("a", 9, 9, 14, num_per_turn=5, num_last_turn=1).line()
    assert line.endswith("5 split into one example per turn, 1 learned in their last turn only")


def test_max_samples_takes_the_first_rows_of_each_dataset(tmp_path: Path) -> None:
    store = made(write(tmp_path, ROWS), write(tmp_path, ROWS, "more.json"), max_samples=1)
    assert store.row.tolist() == [1, 1]


def test_a_second_call_reads_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write(tmp_path, ROWS), tmp_path / "cache"
    first = made(source, cache_dir=cache, invalid_rows="skip")
    monkeypatch.setattr(build, "load_rows", None)
    second = made(source, cache_dir=cache, invalid_rows="skip")
    assert same(first, second)
    assert isinstance(second.input_ids, np.memmap)
    assert same(made_in_memory := first, second)
    assert made_in_memory.summaries[0].num_dropped == 1
    assert [path.name[0] for path in cache.iterdir()] != ["."]
    assert len(list(cache.iterdir())) == 1


def test_a_moved_file_is_still_the_same_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write(tmp_path, ROWS[:2]), tmp_path / "cache"
    made(source, cache_dir=cache)
    moved = Source(source.name, source.path.rename(tmp_path / "moved.json"))
    monkeypatch.setattr(build, "load_rows", None)
    assert len(made(moved, cache_dir=cache)) == 2


def test_other_content_is_encoded_anew(tmp_path: Path) -> None:
    source, cache = write(tmp_path, ROWS[:2]), tmp_path / "cache"

    def count() -> int:
        return len(list(cache.iterdir()))

    made(source, cache_dir=cache)
    made(source, cache_dir=cache, max_length=7)
    assert count() == 2
    made(source, cache_dir=cache, template="chatml")
    assert count() == 3
    made(source, cache_dir=cache, max_samples=1)
    assert count() == 4
    made(write(tmp_path, ROWS[:1]), cache_dir=cache)
    assert count() == 5
    made(Source("rows", source.path, columns={"prompt": "instruction", "response": "output"}), cache_dir=cache)
    assert count() == 6
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["cd"])
    template = load_template("empty", tokenizer)
    build_store([source], EncodeOptions(max_length=8), tokenizer, template, cache_dir=cache)
    assert count() == 7
    made(source, cache_dir=cache)
    assert count() == 7


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def counting(monkeypatch: pytest.MonkeyPatch, *, stop_at: int | None = None) -> list[int]:
    """The first row of every job that is encoded from now on; the process dies before it encodes a certain one."""
    encoded, real = [], build.Encoder.chunk

    def chunk(encoder: build.Encoder, job: build.Job) -> build.Chunk:
        if job.first_row == stop_at:
            raise KeyboardInterrupt
        encoded.append(job.first_row)
        return real(encoder, job)

    monkeypatch.setattr(build.Encoder, "chunk", chunk)
    return encoded


MANY = [{"instruction": f"{number}", "output": "x" * (number % 9 + 1)} for number in range(25)]
MANY[3] = {"instruction": "no answer"}


def test_a_build_that_was_cut_off_goes_on_with_the_chunk_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "CHUNK_ROWS", 5)
    source, cache = write(tmp_path, MANY), tmp_path / "cache"
    straight = made(source, cache_dir=tmp_path / "straight", invalid_rows="skip")
    with monkeypatch.context() as patch:
        encoded = counting(patch, stop_at=16)
        with pytest.raises(KeyboardInterrupt):
            made(source, cache_dir=cache, invalid_rows="skip")
    assert encoded == [1, 6, 11]
    (parts,) = cache.iterdir()
    assert sorted(path.name for path in parts.iterdir()) == [
        "0000-0000000001-0000000005.npz",
        "0000-0000000006-0000000010.npz",
        "0000-0000000011-0000000015.npz",
    ]
    (torn,) = parts.glob("*-0000000010.npz")  # as a machine that loses power may leave it
    torn.write_bytes(torn.read_bytes()[:-30])
    capsys.readouterr()
    encoded = counting(monkeypatch)
    store = made(source, cache_dir=cache, invalid_rows="skip")
    assert encoded == [6, 16, 21]
    assert capsys.readouterr().err == "encoding: 10 of 25 rows were encoded before\n"
    assert same(store, straight)
    assert store.summaries[0].num_dropped == 1
    assert contents(store.folder) == contents(straight.folder)
    assert [path.name for path in cache.iterdir()] == [straight.folder.name]


def test_what_is_kept_of_judged_rows_survives_a_cut_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHUNK_ROWS", 2)
    rows = [{"instruction": f"{n}", "chosen": "ab" * (n + 1), "rejected": "c"} for n in range(6)]
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    source = Source("pairs", write(tmp_path, rows, "pairs.json").path, columns=columns, ranking=True)

    def pairs(**options: Any) -> TokenStore:
        tokenizer = byte_tokenizer()
        template = load_template("empty", tokenizer, "dpo")
        return build_store([source], EncodeOptions("dpo", max_length=32), tokenizer, template, **options)

    with monkeypatch.context() as patch:
        counting(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            pairs(cache_dir=tmp_path / "cache")
    alone, resumed = pairs(), pairs(cache_dir=tmp_path / "cache")
    assert resumed.facts.keys() == alone.facts.keys()
    assert len(alone.facts) > 0
    assert same(alone, resumed)
    assert alone.fingerprint == resumed.fingerprint


def test_a_full_disk_is_one_line_and_what_is_encoded_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = write(tmp_path, ROWS[:2]), tmp_path / "cache"

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module.np, "save", fail)
        with pytest.raises(InputError) as error:
            made(source, cache_dir=cache)
    assert str(error.value) == (
        f"data.cache_dir: must be a folder that can be written, got {cache} (No space left on device). "
        "Make room there, choose another, or null to keep encoded rows in memory."
    )
    assert sorted(path.suffix for path in cache.iterdir()) == [".failed", ".parts"]
    encoded = counting(monkeypatch)
    assert len(made(source, cache_dir=cache)) == 2
    assert encoded == []
    monkeypatch.setattr(store_module.Parts, "write_tokens", fail)
    with pytest.raises(InputError, match="No space left"):
        made(source, cache_dir=tmp_path / "other")


def test_rows_that_stop_the_run_leave_no_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "CHUNK_ROWS", 1)
    for cache, rows, invalid_rows in (("a", ROWS, "stop"), ("b", ROWS[2:], "skip")):
        with pytest.raises(InputError):
            made(write(tmp_path, rows), cache_dir=tmp_path / cache, invalid_rows=invalid_rows)
        assert [path.suffix for path in (tmp_path / cache).iterdir()] == [".failed"]


def test_a_second_process_that_finishes_later_takes_the_folder_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache, real = write(tmp_path, ROWS[:2]), tmp_path / "cache", store_module._encode_parts

    def overtaken(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(store_module, "_encode_parts", real)
            for lock in cache.glob(".*.lock"):
                lock.unlink()  # as if this process had been taken for dead
            made(source, cache_dir=cache)

    monkeypatch.setattr(store_module, "_encode_parts", overtaken)
    assert len(made(source, cache_dir=cache)) == 2
    assert [path.name[0] for path in cache.iterdir()] != ["."]
    assert len(list(cache.iterdir())) == 1


def test_how_far_the_encoding_is_is_told_in_lines_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "CHUNK_ROWS", 10)
    source = write(tmp_path, MANY)
    made(source, invalid_rows="skip")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(build, "LINE_SECONDS", 0.0)
    lines = ["encoding: 10 of 25 rows", "encoding: 20 of 25 rows", "encoding: 25 of 25 rows"]
    made(source, invalid_rows="skip")
    assert capsys.readouterr().err.splitlines() == lines
    made(source, cache_dir=tmp_path / "cache", invalid_rows="skip")
    assert capsys.readouterr().err.splitlines() == lines


def test_workers_give_the_same_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": f"{number}", "output": "x" * (number % 9 + 1)} for number in range(40)]
    monkeypatch.setattr(build, "CHUNK_ROWS", 9)
    sources = write(tmp_path, rows), write(tmp_path, [*rows[:20], {"instruction": "g"}], "more.json")
    alone = made(*sources, invalid_rows="skip")
    assert same(alone, made(*sources, invalid_rows="skip", num_workers=2))
    monkeypatch.setattr(build, "CHUNK_ROWS", 1000)
    assert same(alone, made(*sources, invalid_rows="skip"))


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no row can be used \(rows: 1 rows, 0 kept, 0 cut, 1 dropped \(row 1"):
        made(write(tmp_path, ROWS[2:]), invalid_rows="skip")


def test_a_dataset_for_another_task_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="d: holds ranked answers"):
        made(Source("d", tmp_path / "gone.json", ranking=True))


def test_prompts_end_where_the_answer_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, [*ROWS[::2], {"instruction": 1}])
    tokenizer = byte_tokenizer()
    template = load_template("empty", tokenizer)
    prompts = prompt_rows([source], tokenizer, template, invalid_rows="skip")
    assert prompts == [Prompt("ab", (100, 101), "cd", "rows", 1), Prompt("g", (106,), "", "rows", 2)]
    assert capsys.readouterr().err.splitlines() == [
        "rows: 1 of 3 prompts dropped (row 3: column 'instruction' must be a string, got 1)",
    ]
    with pytest.raises(InputError, match=r"rows\.json, row 3: column 'instruction' must be a string"):
        prompt_rows([source], tokenizer, template)


def test_texts_of_pt_are_prompts_too(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("ab\n")
    tokenizer = byte_tokenizer()
    prompts = prompt_rows(
        [Source("t", tmp_path / "t.txt", "text")], tokenizer, load_template("auto", tokenizer), task="pt"
    )
    assert prompts == [Prompt("ab", (100, 101), "", "t", 1)]


def test_real_rows_are_kept(shared: Path) -> None:
    tokenizer = load_tokenizer(BackboneSpec(path=str(shared / "parity" / "model")))
    sources = resolve_sources(["alpaca_en_demo", "identity"], str(shared / "data"))
    store = build_store(sources, EncodeOptions(), tokenizer, load_template("auto", tokenizer))
    assert [summary.line() for summary in store.summaries] == [
        "alpaca_en_demo: 999 rows, 999 kept, 0 cut, 0 dropped",
        "identity: 91 rows, 91 kept, 0 cut, 0 dropped",
    ]
    texts = resolve_sources(["c4_demo"], str(shared / "data"))
    options = EncodeOptions("pt", max_length=256, packing="blocks")
    store = build_store(texts, options, tokenizer, load_template("auto", tokenizer, "pt"))
    assert store.summaries[0].line() == "c4_demo: 300 rows, 300 kept, 0 cut, 0 dropped"
    assert (store.input_ids[store.offsets[1:] - 1] == tokenizer.eos_token_id).all()
    assert np.array_equal(store.input_ids, store.labels)
