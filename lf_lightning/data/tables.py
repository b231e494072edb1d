"""Rows of parquet and arrow files. A place in one is a group of rows or a batch, and the rows of it that lie before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lf_lightning.data.places import Place, Rows
from lf_lightning.types import InputError

BATCH = 1000
"""Rows of a parquet file that are decoded together."""
MAGIC = b"ARROW1"
"""How an arrow file begins; one without is a stream of messages, as the datasets library writes it."""


def parquet_rows(path: Path, start: Place) -> Rows:
    """The rows of a parquet file from a place on: (row group, rows of it).

    Raises:
        InputError: It is broken.
    """
    import pyarrow
    import pyarrow.parquet

    first, skipped = start.at or (0, 0)
    row = start.row
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for group in range(first, file.num_row_groups):
                batches = file.iter_batches(batch_size=BATCH, row_groups=[group])
                for values, within in _values(batches, skipped if group == first else 0):
                    row += 1
                    yield values, Place(row, (group, within))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _broken(path, "parquet", error) from error


def arrow_rows(path: Path, start: Place) -> Rows:
    """The rows of an arrow file from a place on: (batch, rows of it), a batch of a stream by its first byte.

    Raises:
        InputError: It is broken, or a stream with dictionaries.
    """
    import pyarrow

    first, skipped = start.at or (0, 0)
    row = start.row
    try:
        with path.open("rb") as file:
            batches_from = _file_batches if file.read(len(MAGIC)) == MAGIC else _stream_batches
        for number, batch in batches_from(path, first):
            for values, within in _values([batch], skipped if number == first else 0):
                row += 1
                yield values, Place(row, (number, within))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _broken(path, "arrow", error) from error


def _values(batches: Iterable[Any], skipped: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The rows of batches after the first ones, each with the number of rows up to it."""
    within = 0
    for batch in batches:
        begin = min(max(skipped - within, 0), batch.num_rows)
        yield from ((row, number) for number, row in enumerate(batch.slice(begin).to_pylist(), within + begin + 1))
        within += batch.num_rows


def _file_batches(path: Path, first: int) -> Iterator[tuple[int, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as file:
        for number in range(first, file.num_record_batches):
            yield number, file.get_batch(number)


def _stream_batches(path: Path, first: int) -> Iterator[tuple[int, Any]]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        schema = pyarrow.ipc.read_schema(source)
        source.seek(max(first, source.tell()))
        while True:
            byte = source.tell()
            try:
                message = pyarrow.ipc.read_message(source)
            except EOFError:
                return
            if message.type != "record batch":
                raise InputError(f"{path}: must hold plain columns, got a dictionary. Write the file as parquet.")
            yield byte, pyarrow.ipc.read_record_batch(message, schema)


def _broken(path: Path, kind: str, error: BaseException) -> InputError:
    reason = str(error).splitlines()[0].rstrip(".")
    return InputError(f"{path}: cannot be read as {kind}: {reason}. Write the file again.")
