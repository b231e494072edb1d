"""Rows to encoded chunks, in this process or in several, with the same result."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lf_lightning.data.encode import EncodedRow, EncodeOptions, RowProblem, encode_rows
from lf_lightning.data.encode_judgements import FACTS, encode_judgements
from lf_lightning.data.sources import load_rows
from lf_lightning.data.templates import Template, Way
from lf_lightning.types import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 1000
"""Rows that are encoded together; fixed, so that chunks do not depend on the number of workers."""


class Job(NamedTuple):
    """Rows to encode together."""

    source_index: int
    first_row: int  # 1-based
    rows: list[dict[str, Any]]


class Chunk(NamedTuple):
    """The encoded rows of a job. D documents, N tokens, R rows that were kept."""

    source_index: int
    input_ids: NDArray[np.int32]  # (N,)
    labels: NDArray[np.int32]  # (N,)
    lengths: NDArray[np.int64]  # (D,)
    rows: NDArray[np.int64]  # (D,) 1-based row of each document
    ways: list[Way]  # (R,)
    cuts: list[int]  # (R,) tokens cut from each row
    problems: list[RowProblem]
    facts: dict[str, NDArray[Any]]  # each (D,): what the task keeps beside the tokens


class Encoder(NamedTuple):
    """All that encodes a row."""

    sources: tuple[Source, ...]
    options: EncodeOptions
    tokenizer: PreTrainedTokenizerBase
    template: Template

    def chunk(self, job: Job) -> Chunk:
        """Encode the rows of a job."""
        source = self.sources[job.source_index]
        facts = FACTS.get(self.options.task, {})
        encode = encode_judgements if facts else encode_rows
        results = encode(job.rows, source, self.options, self.tokenizer, self.template, first_row=job.first_row)
        kept = [result for result in results if isinstance(result, EncodedRow)]
        documents = [example for row in kept for example in row.examples]
        return Chunk(
            job.source_index,
            input_ids=np.array([token for document in documents for token in document.input_ids], np.int32),
            labels=np.array([label for document in documents for label in document.labels], np.int32),
            lengths=np.array([len(document.input_ids) for document in documents], np.int64),
            rows=np.array([row.row for row in kept for _ in row.examples], np.int64),
            ways=[row.way for row in kept],
            cuts=[row.num_cut for row in kept],
            problems=[result for result in results if isinstance(result, RowProblem)],
            facts={name: np.array([each.facts[name] for each in documents], kind) for name, kind in facts.items()},
        )


def encoded_chunks(
    encoder: Encoder, *, num_workers: int | None = None, max_samples: int | None = None, progress: bool = True
) -> Iterator[Chunk]:
    """The chunks of all sources in order.

    Args:
        encoder: All that encodes a row.
        num_workers: Processes that encode; None or 1 is this one.
        max_samples: Use only the first rows of each source, this many.
        progress: Show a progress bar on stderr where that is a terminal.
    """
    jobs = list(_jobs(encoder.sources, max_samples))
    num_workers = min(num_workers or 1, len(jobs))
    bar = tqdm(
        total=sum(len(job.rows) for job in jobs),
        desc="Encoding",
        unit=" rows",
        disable=not (progress and sys.stderr.isatty()),
    )
    with bar:
        chunks = map(encoder.chunk, jobs) if num_workers <= 1 else _chunks_of_workers(encoder, jobs, num_workers)
        for job, chunk in zip(jobs, chunks, strict=True):
            bar.update(len(job.rows))
            yield chunk


def _jobs(sources: Iterable[Source], max_samples: int | None) -> Iterator[Job]:
    for index, source in enumerate(sources):
        rows = load_rows(source, max_samples)
        for start in range(0, len(rows), CHUNK_ROWS):
            yield Job(index, start + 1, rows[start : start + CHUNK_ROWS])


def _chunks_of_workers(encoder: Encoder, jobs: list[Job], num_workers: int) -> Iterator[Chunk]:
    """Spawned, not forked: the tokenizer's threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    try:
        yield from pool.map(_worker_chunk, jobs)
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODER: list[Encoder] = []  # filled once in a worker process: sending the tokenizer with each job would cost seconds


def _start_worker(encoder: Encoder) -> None:
    _ENCODER.append(encoder)


def _worker_chunk(job: Job) -> Chunk:
    return _ENCODER[0].chunk(job)
