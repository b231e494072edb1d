"""Streams over small files, and what they give."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lf_lightning import BackboneSpec, DataModule
from lf_lightning.data.build import Encoder
from lf_lightning.data.encode import EncodeOptions
from lf_lightning.data.shards import Shard, shards_of
from lf_lightning.data.source import Source
from lf_lightning.data.stream import Stream, StreamPlan
from lf_lightning.data.stream_documents import StreamDocuments
from lf_lightning.data.stream_loader import StreamLoader
from lf_lightning.data.templates import load_template
from lf_lightning.data.tokenizer import byte_tokenizer
from lf_lightning.types import StepBatch, Unit
from tests.cli.runs import LLAMA

TOKENIZER = byte_tokenizer()
BACKBONE = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")


def texts(start: int, end: int) -> list[dict[str, Any]]:
    """Rows whose text is their number."""
    return [{"text": f"row {number}"} for number in range(start, end)]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_source(path: Path, name: str | None = None) -> Source:
    return Source(name or path.stem, path, "text")


def files(folder: Path, sizes: Sequence[int], name: str = "rows") -> Source:
    """A dataset of numbered rows in several files."""
    (folder / name).mkdir()
    start = 0
    for number, size in enumerate(sizes):
        write_rows(folder / name / f"{number}.jsonl", texts(start, start + size))
        start += size
    return text_source(folder / name)


def encoder(sources: Sequence[Source], **options: Any) -> Encoder:
    template = load_template("auto", TOKENIZER, options.get("task", "pt"))
    return Encoder(tuple(sources), EncodeOptions(**{"task": "pt", "max_length": 64, **options}), TOKENIZER, template)


def plan(**changes: Any) -> StreamPlan:
    return StreamPlan(**{"seed": 1, "shuffle": True, "buffer_size": 5, **changes})


def text_of_units(units: Sequence[Unit], store: Any) -> StepBatch:
    """The texts of units instead of a batch: easier to compare."""
    found = []
    for unit in units:
        ids = [int(token) for span in unit.spans for token in store.document(span.document)[0][span.start : span.end]]
        found.append(TOKENIZER.decode(ids).replace("<|im_end|>", "|"))
    return found  # type: ignore[return-value]


def loader(
    sources: Sequence[Source],
    *,
    shards: Sequence[Shard] | None = None,
    steps: int = 10,
    size: int = 4,
    arrange: Any = text_of_units,
    invalid_rows: Any = "stop",
    order: StreamPlan | None = None,
    **options: Any,
) -> StreamLoader:
    """The steps of a stream."""
    encodes = encoder(sources, **options)
    stream = Stream(shards if shards is not None else shards_of(sources), order or plan())
    documents = StreamDocuments(stream, encodes, invalid_rows=invalid_rows)
    return StreamLoader(documents, encodes, num_steps=steps, global_batch_size=size, arrange=arrange)


def pass_of(stream: Stream, epoch: int = 0) -> list[str]:
    """The texts of one pass, in order."""
    found: list[str] = []
    for buffer in stream.buffers(epoch):
        found += [row.values["text"] for row in buffer.rows]
        if buffer.is_last:
            return found
    raise AssertionError("a pass ends")


def data_module(datasets: list[Any], *, task: Any = "sft", **options: Any) -> DataModule:
    given = {"datasets": datasets, "streaming": True, "cache_dir": None, "global_batch_size": 4, "seed": 3, **options}
    return DataModule(BACKBONE, task, **given)


class FakeTrainer:
    """What the DataModule asks of a trainer."""

    def __init__(self, max_steps: int, rank: int = 0, num_ranks: int = 1) -> None:
        self.max_steps, self.max_epochs = max_steps, -1
        self.rank, self.num_ranks = rank, num_ranks
        self.strategy = None
