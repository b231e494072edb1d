"""Files become rows, from the beginning or from any place between two rows: json, jsonl, csv, parquet, arrow, txt."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lf_lightning.data.places import START, Place, Row, Rows
from lf_lightning.data.tables import arrow_rows, parquet_rows
from lf_lightning.types import InputError

OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}
"""Suffix of a compressed file of lines -> how it is opened. Seeking in one decompresses what lies before."""
BROKEN = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, OSError)
"""What their reading raises where the bytes are not what the suffix says."""
BOM = b"\xef\xbb\xbf"
ENDS = 2**16
"""Bytes at either end of a file that `quick_digest` looks at."""


def kind_of(path: Path) -> str:
    """The suffix that says how a file is read, without that of its compression."""
    inner = path.with_suffix("").suffix
    return inner if path.suffix in OPENERS and inner in (".json", ".jsonl", ".csv", ".txt") else path.suffix


def is_compressed(path: Path) -> bool:
    """Whether going to a place means to decompress everything before it."""
    return path.suffix in OPENERS


def read_rows(path: Path, start: Place = START) -> Rows:
    """The rows of a file from a place on, each with the place behind it.

    JSON is read by the json module and CSV as strings, so that no type or key is inferred from other rows. Text files
    give one `{"text": line}` for each line that is not blank.

    Args:
        path: A file of a type in READERS, or a compressed one of lines.
        start: A place that an earlier call gave.

    Raises:
        InputError: The file is empty, broken, or a row of it is not an object.
    """
    empty = start == START
    for row, place in READERS[kind_of(path)](path, start):
        empty = False
        yield row, place
    if empty:
        raise InputError(f"{path}: holds no rows. Write at least one, or take the dataset out of data.datasets.")


def file_digest(path: Path) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def quick_digest(path: Path) -> str:
    """SHA-256 of the size of a file and of the bytes at either end, in hexadecimal: however large the file is."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = file.read(ENDS)
        file.seek(max(size - ENDS, 0))
        ends += file.read(ENDS)
    return hashlib.sha256(f"{size} ".encode() + ends).hexdigest()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InputError: It is another encoding.
    """
    try:
        with _opened(path) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except BROKEN as error:
        raise _unreadable(path, error) from error


def _opened(path: Path) -> IO[bytes]:
    file: IO[bytes] = OPENERS[path.suffix](path) if path.suffix in OPENERS else path.open("rb")
    return file


def _unreadable(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path}: cannot be read: {error}. Write the file again.")


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        InputError: It is broken.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}. Correct the file."
        ) from error


def kind_of_value(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def object_row(row: Any, path: Path | str, number: int) -> Row:
    """The row, which must be an object.

    Raises:
        InputError: It is not.
    """
    if not isinstance(row, dict):
        raise InputError(
            f'{path}, row {number}: must be an object, got {kind_of_value(row)}. Write {{"column": value, ...}}.'
        )
    return row


class _Lines:
    """The lines of a file from a byte on, and how far they have been read."""

    def __init__(self, path: Path, start: Place) -> None:
        self._path = path
        at: tuple[int, int] = start.at or (0, 0)
        self.byte, self.number = at

    def __iter__(self) -> Iterator[str]:
        try:
            with _opened(self._path) as file:
                file.seek(self.byte)
                for line in file:
                    first = self.byte == 0
                    self.byte, self.number = self.byte + len(line), self.number + 1
                    yield (line.removeprefix(BOM) if first else line).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path}: is not UTF-8 ({error.reason}). Save it as UTF-8.") from error
        except BROKEN as error:
            raise _unreadable(self._path, error) from error

    def place(self, row: int) -> Place:
        """The place behind the last line, with the rows before it."""
        return Place(row, (self.byte, self.number))


def _jsonl_rows(path: Path, start: Place) -> Rows:
    lines, row = _Lines(path, start), start.row
    for line in lines:
        if not line.strip():
            continue
        row += 1
        try:
            value = json.loads(line.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            where = f"line {lines.number}, column {error.colno}"
            raise InputError(f"{path}, row {row}: broken JSON at {where}: {error.msg}. Correct the line.") from error
        yield object_row(value, path, row), lines.place(row)


def _txt_rows(path: Path, start: Place) -> Rows:
    lines, row = _Lines(path, start), start.row
    for line in lines:
        if line.strip():
            row += 1
            yield {"text": line.rstrip("\r\n")}, lines.place(row)


def _csv_rows(path: Path, start: Place) -> Rows:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines, row = _Lines(path, start), start.row
    reader = csv.reader(iter(lines), strict=True)  # takes a line when it needs one, so that `lines` knows the place
    try:
        names = next(csv.reader(iter(_Lines(path, START)), strict=True), [])
        if start == START:
            next(reader, None)
        for cells in reader:
            if not cells:
                continue
            row += 1
            if len(cells) != len(names):
                raise InputError(
                    f"{path}, row {row}: must have {len(names)} columns like the first line. "
                    f"Quote cells that hold commas or line breaks."
                )
            yield dict(zip(names, cells, strict=True)), lines.place(row)
    except csv.Error as error:
        raise InputError(f"{path}, line {lines.number}: broken CSV: {error}. Correct the line.") from error


def _json_rows(path: Path, start: Place) -> Rows:
    text = read_text(path)
    if not text.strip():
        return
    rows = parse_json(text, str(path))
    if not isinstance(rows, list):
        raise InputError(
            f"{path}: must be an array of objects, got {kind_of_value(rows)}. Put the rows in [...], or name the file "
            f".jsonl where each line is a row."
        )
    for number, row in enumerate(rows[start.row :], start=start.row + 1):
        yield object_row(row, path, number), Place(number)


READERS: dict[str, Callable[[Path, Place], Rows]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".txt": _txt_rows,
}
