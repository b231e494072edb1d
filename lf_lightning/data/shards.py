"""What a stream is read from: files, lists of rows and pieces of hub datasets, each from any place on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lf_lightning.console import say
from lf_lightning.data.files import is_compressed, kind_of, quick_digest, read_rows
from lf_lightning.data.hub import hub_digest, hub_shards
from lf_lightning.data.places import START, Place, Row, Rows
from lf_lightning.data.source import Source
from lf_lightning.data.sources import HubSource, source_files
from lf_lightning.types import InputError


@dataclass(frozen=True)
class Shard:
    """One piece of a dataset, which is read from its beginning to its end.

    Args:
        source: Number of its dataset.
        name: What lines and errors call it.
        read: Gives its rows from a place on.
        digest: What tells it from another one, without reading it.
        first: Where training begins in it: behind the rows that validate.
        replay: Why going to a place reads what lies before, in the words of the line that says so; "" where it seeks.
    """

    source: int
    name: str
    read: Callable[[Place], Rows]
    digest: str
    first: Place = START
    replay: str = ""


class ShardRow(NamedTuple):
    """A row, and where it comes from."""

    shard: int  # number of its shard
    row: int  # in its shard, 1-based
    values: Row


def shards_of(sources: Sequence[Source]) -> list[Shard]:
    """The shards of datasets in their order: each file, all records, each piece that the datasets library makes.

    Raises:
        InputError: A folder is empty or mixes types, or a dataset of the hub cannot be reached.
    """
    shards: list[Shard] = []
    for index, source in enumerate(sources):
        if isinstance(source, HubSource):
            shards += _hub_shards(index, source)
        elif source.path is None:
            digest = hashlib.sha256(json.dumps(source.records, sort_keys=True, default=repr).encode()).hexdigest()
            shards.append(Shard(index, source.name, partial(_records, source), digest))
        else:
            files = source_files(source)
            shards += [_file_shard(index, source.name, path, alone=len(files) == 1) for path in files]
    return shards


def _hub_shards(index: int, source: HubSource) -> list[Shard]:
    digest, replay = hub_digest(source), "is read by the datasets library, which may not seek"
    readers = hub_shards(source)
    names = [f"{source.name}/{number}" if len(readers) > 1 else source.name for number in range(1, len(readers) + 1)]
    return [
        Shard(index, name, read, f"{digest} {name}", replay=replay) for name, read in zip(names, readers, strict=True)
    ]


def _file_shard(index: int, dataset: str, path: Path, *, alone: bool) -> Shard:
    name = dataset if alone else f"{dataset}/{path.name}"
    replay = "is compressed and cannot seek" if is_compressed(path) else ""
    if kind_of(path) == ".json":
        replay = "is one JSON array and cannot seek"
        say(f"streaming: {name} is one JSON array, which is read whole: a .jsonl file is read row by row")
    return Shard(index, name, partial(read_rows, path), f"{kind_of(path)} {quick_digest(path)}", replay=replay)


def _records(source: Source, start: Place) -> Rows:
    for number, row in enumerate(source.records[start.row :], start=start.row + 1):
        yield row, Place(number)


def held_out(name: str, shards: Sequence[Shard], num_rows: int) -> tuple[list[Row], list[Shard]]:
    """The first rows of a dataset, and its shards without them.

    Args:
        name: The dataset.
        shards: All shards of the dataset, in the order of its files.
        num_rows: How many rows.

    Raises:
        InputError: There are no more rows than these.
    """
    rows: list[Row] = []
    for index, shard in enumerate(shards):
        reading = shard.read(shard.first)
        place = shard.first
        while len(rows) < num_rows and (found := next(reading, None)) is not None:
            rows.append(found[0])
            place = found[1]
        if len(rows) == num_rows:
            left = [replace(shard, first=place), *shards[index + 1 :]] if next(reading, None) else shards[index + 1 :]
            if not left:
                break
            return rows, list(left)
    raise InputError(
        f"data.val_size: must leave rows to train on, got {num_rows} rows of {name}, which has {len(rows)}. Lower it."
    )
