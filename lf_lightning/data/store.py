"""The encoded documents of all datasets as flat arrays on disk, made once for the same data, template and tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from lf_lightning.console import say_from_any
from lf_lightning.data.build import CHUNK_ROWS, Chunk, Encoder, EncodingProgress, Job, encoded_chunks, jobs_of
from lf_lightning.data.cache_lock import cache_refusal, made_once
from lf_lightning.data.checks import check_task
from lf_lightning.data.content_key import content_key
from lf_lightning.data.encode import EncodeOptions, RowProblem
from lf_lightning.data.parts import FACT, Parts
from lf_lightning.data.source import Source
from lf_lightning.data.templates import Template
from lf_lightning.types import InputError, UnitId

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scalar = TypeVar("Scalar", bound=np.generic)
InvalidRows = Literal["stop", "skip"]
ARRAYS = ("input_ids", "labels", "offsets", "source_index", "row")
NUM_REASONS = 3
"""Distinct reasons for dropped rows that a summary keeps."""


@dataclass(frozen=True)
class StoreSummary:
    """What became of the rows of one dataset.

    Args:
        name: The dataset.
        num_rows: Rows read.
        num_kept: Rows that gave at least one document.
        num_documents: Documents of these rows.
        num_cut_rows: Rows that lost tokens to `max_length`.
        num_cut_tokens: Tokens that they lost.
        num_dropped: Rows that could not be used.
        num_per_turn: Rows that became one document for each turn, because the template rewrites earlier turns.
        num_last_turn: Rows of which only the last turn is learned, for the same reason (`history: whole`).
        reasons: Why rows were dropped, each with the first such row, as `row 17: ...` or `row 17 and 3 more: ...`.
    """

    name: str
    num_rows: int = 0
    num_kept: int = 0
    num_documents: int = 0
    num_cut_rows: int = 0
    num_cut_tokens: int = 0
    num_dropped: int = 0
    num_per_turn: int = 0
    num_last_turn: int = 0
    reasons: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for the user, such as `identity: 91 rows, 90 kept, 2 cut (35 tokens), 1 dropped (row 17: ...)`."""
        parts = [f"{self.num_rows:,} rows", f"{self.num_kept:,} kept"]
        parts.append(f"{self.num_cut_rows:,} cut" + (f" ({self.num_cut_tokens:,} tokens)" if self.num_cut_rows else ""))
        parts.append(f"{self.num_dropped:,} dropped" + (f" ({'; '.join(self.reasons)})" if self.reasons else ""))
        if self.num_per_turn:
            parts.append(f"{self.num_per_turn:,} split into one example per turn")
        if self.num_last_turn:
            parts.append(f"{self.num_last_turn:,} learned in their last turn only")
        return f"{self.name}: {', '.join(parts)}"


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents as flat arrays. D documents, N tokens in all.

    Args:
        input_ids: Tokens of all documents one after the other; (N,) int32.
        labels: The token where it is learned, else IGNORE; not shifted; (N,) int32.
        offsets: Document i is `offsets[i]` to `offsets[i + 1]`; (D + 1,) int64.
        source_index: Dataset of each document, an index into `names`; (D,) int32.
        row: Row of each document in its dataset, 1-based; (D,) int64.
        names: Names of the datasets.
        summaries: What became of the rows, one for each dataset.
        facts: What a task keeps of each document beside its tokens, by name (`encode_judgements.FACTS`); each (D,).
        folder: Where it lies; None in memory.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]
    source_index: NDArray[np.int32]
    row: NDArray[np.int64]
    names: tuple[str, ...]
    summaries: tuple[StoreSummary, ...]
    facts: dict[str, NDArray[Any]] = field(default_factory=dict)
    folder: Path | None = None

    def __len__(self) -> int:
        """Number of documents, D."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document; (D,) int64."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over what every document holds, in hexadecimal: equal for equal data, template and lengths."""
        digest = hashlib.sha256()
        arrays: dict[str, NDArray[Any]] = {"ids": self.input_ids, "offsets": self.offsets, **self.facts}
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def row_of(self, document: int) -> UnitId:
        """The row that a document was made of."""
        return UnitId(self.names[int(self.source_index[document])], int(self.row[document]))

    def document(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids and labels of a document, as views."""
        start, end = self.offsets[index], self.offsets[index + 1]
        return self.input_ids[start:end], self.labels[start:end]


def build_store(
    sources: Sequence[Source],
    options: EncodeOptions,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    cache_dir: Path | str | None = None,
    num_workers: int | None = None,
    max_samples: int | None = None,
    invalid_rows: InvalidRows = "stop",
) -> TokenStore:
    """Encode all rows, or open what an earlier call with the same content left in `cache_dir`.

    Of several processes that ask for the same content one encodes, and the others wait for its folder. Chunks are
    kept as they are finished, so that a call that was killed is continued by the next one.

    Args:
        sources: The datasets.
        options: What decides ids and labels.
        tokenizer: The tokenizer, fitted to the template.
        template: The template.
        cache_dir: Folder for encoded data; each content has a folder there. None keeps everything in memory.
        num_workers: Processes that encode; None is this one. The result does not depend on it.
        max_samples: Use only the first rows of each dataset, this many.
        invalid_rows: `stop` at the first row that cannot be used, or `skip` and count such rows.

    Raises:
        InputError: A dataset does not suit the task, a file is broken, a row is invalid, no row is left, or
            `cache_dir` cannot be written.
        TrainingStopped: Another process encoded the same content, and failed.
    """
    for source in sources:
        check_task(source, options.task)
    encoder = Encoder(tuple(sources), options, tokenizer, template)
    if cache_dir is None:
        jobs = jobs_of(encoder.sources, max_samples)
        with EncodingProgress(_num_rows(jobs)) as progress:
            found = encoded_chunks(encoder, jobs, num_workers=num_workers, progress=progress)
            return _store_of([_usable(chunk, sources, invalid_rows) for chunk in found], sources)
    folder = Path(cache_dir).expanduser() / content_key(encoder, max_samples, invalid_rows)
    parts = Parts(folder)

    def make() -> None:
        jobs = jobs_of(encoder.sources, max_samples)
        _encode_parts(encoder, parts, jobs, num_workers=num_workers, invalid_rows=invalid_rows)
        _join_parts(parts, jobs, sources, folder)

    made_once(folder, make, progress=lambda: f"{parts.num_finished:,} chunks of {CHUNK_ROWS:,} rows are done")
    return open_store(folder)


def _encode_parts(
    encoder: Encoder, parts: Parts, jobs: list[Job], *, num_workers: int | None, invalid_rows: InvalidRows
) -> None:
    """Write the chunks that an earlier call has not left already."""
    missing = parts.missing(jobs)
    num_rows = _num_rows(jobs)
    with EncodingProgress(num_rows, num_rows - _num_rows(missing), tell=say_from_any) as progress:
        chunks = encoded_chunks(encoder, missing, num_workers=num_workers, progress=progress)
        for job, chunk in zip(missing, chunks, strict=True):
            if chunk.problems and invalid_rows == "stop":
                parts.remove()  # of no use: what mends the row changes the content
            parts.write(job, _usable(chunk, encoder.sources, invalid_rows))


def _usable(chunk: Chunk, sources: Sequence[Source], invalid_rows: InvalidRows) -> Chunk:
    """The chunk, unless it has a row that cannot be used and such rows are not to be skipped."""
    if chunk.problems and invalid_rows == "stop":
        number, reason = chunk.problems[0]
        raise row_error(sources[chunk.source_index], number, reason)
    return chunk


def _num_rows(jobs: Iterable[Job]) -> int:
    return sum(len(job.rows) for job in jobs)


def row_error(source: Source, row: int, reason: str) -> InputError:
    """The error for a row that cannot be used, as one line."""
    where = source.path.name if source.path is not None else source.name
    return InputError(f"{where}, row {row}: {reason}. Fix the row, or set data.invalid_rows: skip.")


def open_store(folder: Path) -> TokenStore:
    """The store in a folder, its arrays read from disk as they are needed."""
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    facts = {path.stem.removeprefix(FACT): np.load(path, mmap_mode="r") for path in folder.glob(f"{FACT}*.npy")}
    kept = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summaries = tuple(StoreSummary(**{**summary, "reasons": tuple(summary["reasons"])}) for summary in kept)
    names = tuple(summary.name for summary in summaries)
    return TokenStore(**arrays, names=names, summaries=summaries, facts=facts, folder=folder)


def _store_of(chunks: list[Chunk], sources: Sequence[Source]) -> TokenStore:
    summaries = tuple(
        _summary(source.name, [chunk for chunk in chunks if chunk.source_index == index])
        for index, source in enumerate(sources)
    )
    lengths = _joined([chunk.lengths for chunk in chunks], np.int64)
    if not len(lengths):
        lines = "; ".join(summary.line() for summary in summaries)
        raise InputError(f"data.datasets: no row can be used ({lines}). Check formatting, columns and max_length.")
    index = [np.full(len(chunk.lengths), chunk.source_index, np.int32) for chunk in chunks]
    return TokenStore(
        input_ids=_joined([chunk.input_ids for chunk in chunks], np.int32),
        labels=_joined([chunk.labels for chunk in chunks], np.int32),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        source_index=_joined(index, np.int32),
        row=_joined([chunk.rows for chunk in chunks], np.int64),
        names=tuple(source.name for source in sources),
        summaries=summaries,
        facts={name: np.concatenate([chunk.facts[name] for chunk in chunks]) for name in chunks[0].facts},
    )


def _joined(arrays: list[NDArray[Scalar]], dtype: type[Scalar]) -> NDArray[Scalar]:
    return np.concatenate([np.zeros(0, dtype), *arrays])


def _summary(name: str, chunks: list[Chunk]) -> StoreSummary:
    problems = [problem for chunk in chunks for problem in chunk.problems]
    cuts = [cut for chunk in chunks for cut in chunk.cuts if cut]
    ways = [way for chunk in chunks for way in chunk.ways]
    return StoreSummary(
        name,
        num_rows=len(ways) + len(problems),
        num_kept=len(ways),
        num_documents=sum(len(chunk.lengths) for chunk in chunks),
        num_cut_rows=len(cuts),
        num_cut_tokens=sum(cuts),
        num_dropped=len(problems),
        num_per_turn=ways.count("per_turn"),
        num_last_turn=ways.count("last_turn"),
        reasons=_reasons(problems),
    )


def _reasons(problems: list[RowProblem]) -> tuple[str, ...]:
    rows: dict[str, list[int]] = {}
    for row, reason in problems:
        rows.setdefault(reason, []).append(row)
    return tuple(
        f"row {numbers[0]}{f' and {len(numbers) - 1:,} more' if len(numbers) > 1 else ''}: {reason}"
        for reason, numbers in list(rows.items())[:NUM_REASONS]
    )


def _join_parts(parts: Parts, jobs: Sequence[Job], sources: Sequence[Source], folder: Path) -> None:
    """Write the folder of a store whole or not at all, and a chunk of tokens at a time: hidden, synced, renamed."""
    try:
        chunks = [parts.read(job, tokens=False) for job in jobs]
        if not any(len(chunk.lengths) for chunk in chunks):
            parts.remove()  # of no use either
        store = _store_of(chunks, sources)
        draft = Path(tempfile.mkdtemp(prefix="whole-", dir=parts.folder))
        parts.write_tokens(jobs, draft, num_tokens=int(store.offsets[-1]))
        for name in ("offsets", "source_index", "row"):
            np.save(draft / f"{name}.npy", getattr(store, name))  # fields of the store
        for name, array in store.facts.items():
            np.save(draft / f"{FACT}{name}.npy", array)
        summaries = [asdict(summary) for summary in store.summaries]
        (draft / "summary.json").write_text(json.dumps(summaries, indent=1, ensure_ascii=False), encoding="utf-8")
        for path in draft.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        draft.rename(folder)
    except OSError as error:
        if not folder.exists():  # otherwise another process finished the same content first: its folder serves
            raise cache_refusal(folder, error) from error
    parts.remove()
