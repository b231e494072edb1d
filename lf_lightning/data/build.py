"""Rows to encoded chunks, in this process or in several, with the same result."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lf_lightning.console import say
from lf_lightning.data.encode import EncodedRow, EncodeOptions, RowProblem, encode_rows
from lf_lightning.data.encode_judgements import FACTS, encode_judgements
from lf_lightning.data.source import Source
from lf_lightning.data.sources import load_rows
from lf_lightning.data.templates import Template, Way

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 1000
"""Rows that are encoded together; fixed, so that chunks do not depend on the number of workers."""
LINE_SECONDS = 15.0
"""How often a line tells how far the encoding is, where no bar does."""


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


def jobs_of(sources: Iterable[Source], max_samples: int | None = None) -> list[Job]:
    """The jobs of all sources, in order.

    Args:
        sources: The datasets.
        max_samples: Use only the first rows of each source, this many.

    Raises:
        InputError: A file is broken or empty.
    """
    jobs = []
    for index, source in enumerate(sources):
        rows = load_rows(source, max_samples)
        for start in range(0, len(rows), CHUNK_ROWS):
            jobs.append(Job(index, start + 1, rows[start : start + CHUNK_ROWS]))
    return jobs


def encoded_chunks(
    encoder: Encoder,
    jobs: Sequence[Job],
    *,
    num_workers: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Chunk]:
    """The chunks of jobs, in order.

    Args:
        encoder: All that encodes a row.
        jobs: What to encode.
        num_workers: Processes that encode; None or 1 is this one.
        progress: Told the rows of each chunk, once it has been used.
    """
    num_workers = min(num_workers or 1, len(jobs))
    chunks = map(encoder.chunk, jobs) if num_workers <= 1 else _chunks_of_workers(encoder, jobs, num_workers)
    for job, chunk in zip(jobs, chunks, strict=True):
        yield chunk
        progress(len(job.rows))


class EncodingProgress:
    """How far the encoding is: a bar on a terminal, otherwise a line every LINE_SECONDS.

    Args:
        num_rows: Rows in all.
        num_done: Rows that an earlier start has encoded.
        tell: Prints a line.
    """

    def __init__(self, num_rows: int, num_done: int = 0, *, tell: Callable[[str], None] = say) -> None:
        self._num_rows, self._num_done, self._tell = num_rows, num_done, tell
        if num_done:
            tell(f"encoding: {num_done:,} of {num_rows:,} rows were encoded before")
        is_bar = sys.stderr.isatty()
        self._bar = tqdm(total=num_rows, initial=num_done, desc="Encoding", unit=" rows", disable=not is_bar)
        self._told = float("inf") if is_bar else time.monotonic()

    def __enter__(self) -> EncodingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, num_rows: int) -> None:
        """Count rows that have been encoded."""
        self._num_done += num_rows
        self._bar.update(num_rows)
        if time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            self._tell(f"encoding: {self._num_done:,} of {self._num_rows:,} rows")


def _chunks_of_workers(encoder: Encoder, jobs: Sequence[Job], num_workers: int) -> Iterator[Chunk]:
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
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A pool's worker waits forever for jobs of a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers have a parent"
    parent.join()
    os._exit(1)


def _worker_chunk(job: Job) -> Chunk:
    return _ENCODER[0].chunk(job)
