"""Rows of every file type, from the beginning and from any place between two rows."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lf_lightning.data.files import quick_digest, read_rows
from lf_lightning.types import InputError

ROWS = [{"text": f'row {number}, ü\nand "more"', "b": "x" * (number % 7)} for number in range(50)]


PACKED = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
ARROW = {"arrow": pyarrow.ipc.new_file, "stream.arrow": pyarrow.ipc.new_stream}


def write(path: Path) -> list[dict[str, Any]]:
    """Write the rows as the name of the file says; the rows that it then has."""
    suffix = path.name.split(".", 1)[1]
    lines = "\n\n".join(json.dumps(row) for row in ROWS).encode()
    table = pyarrow.Table.from_pylist(ROWS)
    if suffix == "txt":
        path.write_bytes(b"\n".join(b" %d \r\n" % number for number in range(50)))
        return [{"text": f" {number} "} for number in range(50)]
    if suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=12)
    elif suffix == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS[:25])
            file.write("\r\n")
            writer.writerows(ROWS[25:])
    elif suffix in ARROW:
        with pyarrow.OSFile(str(path), "wb") as sink, ARROW[suffix](sink, table.schema) as out:
            out.write_table(table, max_chunksize=12)
    else:
        path.write_bytes(PACKED[path.suffix[1:]](lines) if path.suffix[1:] in PACKED else b"\xef\xbb\xbf" + lines)
    return ROWS


NAMES = ["json", "jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "txt", "csv", "parquet", "arrow", "stream.arrow"]


@pytest.mark.parametrize("suffix", NAMES)
def test_reading_goes_on_at_any_place(tmp_path: Path, suffix: str):
    path = tmp_path / f"r.{suffix}"
    rows = write(path)
    whole = list(read_rows(path))
    assert [row for row, _ in whole] == rows
    assert [place.row for _, place in whole] == list(range(1, 51))
    for row, (_, place) in enumerate(whole, start=1):
        assert list(read_rows(path, place)) == whole[row:]


def test_the_number_of_a_broken_line_is_right_from_any_place(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n\n{"a" 3}\n')
    reading = read_rows(path)
    _, place = next(reading)
    for rows in (reading, read_rows(path, place)):
        with pytest.raises(InputError, match=r"r\.jsonl, row 3: broken JSON at line 5, column 6"):
            list(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:30], "cannot be read: Compressed file ended"),
        ("r.jsonl.xz", b"no xz at all", "cannot be read: Input format not supported"),
        ("r.jsonl.gz", gzip.compress(b"", mtime=0), "holds no rows"),
        ("r.arrow", b"ARROW1 and nothing more", "cannot be read as arrow"),
        ("r.arrow", b"nothing", "cannot be read as arrow"),
        ("r.parquet.gz", b"x", "the type '.gz' is not supported"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str):
    from lf_lightning.data.source import Source
    from lf_lightning.data.sources import load_rows

    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_rows(Source("r", tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_arrow_stream_with_dictionaries_is_refused(tmp_path: Path):
    table = pyarrow.table({"a": pyarrow.array(["x", "y"]).dictionary_encode()})
    with pyarrow.OSFile(str(tmp_path / "d.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="must hold plain columns, got a dictionary"):
        list(read_rows(tmp_path / "d.arrow"))


def test_the_quick_digest_looks_at_size_and_ends(tmp_path: Path):
    path = tmp_path / "x"
    found = set()
    for content in (b"a" * 300_000, b"a" * 300_001, b"b" + b"a" * 299_999, b"a" * 299_999 + b"b"):
        path.write_bytes(content)
        found.add(quick_digest(path))
    assert len(found) == 4
    path.write_bytes(b"")
    assert quick_digest(path) not in found
