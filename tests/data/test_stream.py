"""The order of a stream is a function of (seed, pass, shards, buffer size); a place in it costs nothing to find."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lf_lightning.data.shards import shards_of
from lf_lightning.data.stream import Stream
from tests.data.streams import files, pass_of, plan, text_source, texts, write_rows


def rows(start: int, end: int) -> list[str]:
    return [f"row {number}" for number in range(start, end)]


def order(folder: Path, sizes: tuple[int, ...] = (12, 12, 12), *, epoch: int = 0, **changes: Any) -> list[str]:
    source = files(folder, sizes, name=f"s{len(list(folder.iterdir()))}")
    return pass_of(Stream(shards_of([source]), plan(**changes)), epoch)


def test_the_order_follows_from_each_of_seed_pass_shards_and_buffer_size(tmp_path: Path):
    first = order(tmp_path)
    assert order(tmp_path) == first
    others = [
        order(tmp_path, seed=2),
        order(tmp_path, epoch=1),
        order(tmp_path, (18, 18)),
        order(tmp_path, buffer_size=6),
    ]
    assert len({tuple(each) for each in (first, *others)}) == 5
    assert all(sorted(each) == sorted(rows(0, 36)) for each in (first, *others))


def test_the_order_is_pinned_so_that_a_checkpoint_resumes_in_the_same_order_years_later(tmp_path: Path):
    assert [int(text[4:]) for text in order(tmp_path, (3, 3, 3))] == [8, 1, 0, 6, 7, 3, 2, 4, 5]


def test_nothing_else_changes_the_order(tmp_path: Path):
    np.random.seed(1)
    first = order(tmp_path)
    np.random.seed(2)
    order(tmp_path, epoch=1)
    assert order(tmp_path) == first


def test_without_shuffling_the_order_is_that_of_the_files_in_every_pass(tmp_path: Path):
    for epoch in (0, 3):
        assert order(tmp_path, shuffle=False, buffer_size=1, epoch=epoch) == rows(0, 36)


def test_a_buffer_of_one_row_mixes_shards_and_no_rows(tmp_path: Path):
    found = order(tmp_path, (4,) * 6, buffer_size=1)
    assert found != rows(0, 24)
    assert sorted(found[start : start + 4] for start in range(0, 24, 4)) == [
        *sorted(rows(start, start + 4) for start in range(0, 24, 4))
    ]


def test_a_row_leaves_its_buffer_for_no_other(tmp_path: Path):
    found = order(tmp_path, (36,), buffer_size=10)
    for start in range(0, 36, 10):
        assert sorted(found[start : start + 10]) == sorted(rows(start, min(start + 10, 36)))
        assert found[start : start + 10] != rows(start, min(start + 10, 36))


@pytest.mark.parametrize("size", [1, 4, 9, 36, 99])
@pytest.mark.parametrize("strategy", ["concat", "interleave_under", "interleave_over", "interleave_once"])
def test_a_stream_goes_on_from_any_buffer(tmp_path: Path, size: int, strategy: Any):
    sources = [files(tmp_path, (5, 7), name="a"), files(tmp_path, (3, 4, 2), name="b")]
    probs = () if strategy == "concat" else (2.0, 1.0)
    stream = Stream(shards_of(sources), plan(buffer_size=size, mix_strategy=strategy, probs=probs))
    seen = []
    for buffer in stream.buffers():
        seen.append(buffer)
        if buffer.epoch == 2:
            break
    for index, buffer in enumerate(seen):
        again = stream.buffers(buffer.epoch, buffer.number, buffer.start)
        assert [next(again) for _ in seen[index:]] == seen[index:]


def mixed(folder: Path, **changes: Any) -> list[str]:
    """Which dataset each row of a pass comes from: 12 rows of a, 4 of b."""
    sources = [files(folder, (12,), name="a"), files(folder, (4,), name="b")]
    found: list[str] = []
    for buffer in Stream(shards_of(sources), plan(shuffle=False, buffer_size=1, **changes)).buffers():
        found += ["ab"[row.shard] + row.values["text"][4:] for row in buffer.rows]
        if buffer.is_last:
            return found
    raise AssertionError


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("concat", "a0 a1 a2 a3 a4 a5 a6 a7 a8 a9 a10 a11 b0 b1 b2 b3"),
        ("interleave_under", "a0 b0 a1 b1 a2 b2 a3 b3 a4"),
        ("interleave_once", "a0 b0 a1 b1 a2 b2 a3 b3 a4 a5 a6 a7 a8 a9 a10 a11"),
        ("interleave_over", "a0 b0 a1 b1 a2 b2 a3 b3 a4 b0 a5 b1 a6 b2 a7 b3 a8 b0 a9 b1 a10 b2 a11 b3"),
    ],
)
def test_datasets_are_mixed_row_by_row(tmp_path: Path, strategy: Any, expected: str):
    assert mixed(tmp_path, mix_strategy=strategy) == expected.split()


def test_rows_are_drawn_from_datasets_as_often_as_asked(tmp_path: Path):
    sources = [files(tmp_path, (3000,), name="a"), files(tmp_path, (3000,), name="b")]
    counts = []
    for probs in ((3.0, 1.0), (0.3, 0.1), (1.0, 3.0)):
        order = plan(mix_strategy="interleave_over", probs=probs, buffer_size=400)
        first = next(Stream(shards_of(sources), order).buffers())
        counts.append(Counter(row.shard for row in first.rows)[0])
    assert counts[0] == counts[1]
    assert 270 < counts[0] < 330
    assert 70 < counts[2] < 130


def test_draws_follow_from_seed_and_pass(tmp_path: Path):
    sources = [files(tmp_path, (50,), name="a"), files(tmp_path, (50,), name="b")]
    found = set()
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        order = plan(seed=seed, mix_strategy="interleave_under", probs=(1.0, 1.0), buffer_size=1, shuffle=False)
        buffers = Stream(shards_of(sources), order).buffers(epoch)
        found.add(tuple(next(buffers).rows[0].shard for _ in range(40)))
    assert len(found) == 3


def test_an_empty_file_in_a_stream_is_one_line(tmp_path: Path):
    source = files(tmp_path, (3, 3))
    (tmp_path / "rows" / "2.jsonl").write_text("")
    with pytest.raises(Exception, match=r"2\.jsonl: holds no rows"):
        pass_of(Stream(shards_of([source]), plan()))


def test_a_file_that_cannot_seek_is_announced_when_it_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import gzip

    write_rows(tmp_path / "plain.jsonl", texts(0, 20))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress((tmp_path / "plain.jsonl").read_bytes()))
    for name, line in (
        ("rows.jsonl.gz", "streaming: rows is compressed and cannot seek: reading up to its row 10 again\n"),
        ("plain.jsonl", ""),
    ):
        stream = Stream(shards_of([text_source(tmp_path / name, "rows")]), plan())
        buffers = stream.buffers()
        *_, third = (next(buffers) for _ in range(3))
        assert capsys.readouterr().err == ""
        assert next(stream.buffers(0, 2, third.start)) == third
        assert capsys.readouterr().err == line
