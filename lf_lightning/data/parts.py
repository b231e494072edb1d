"""The encoded chunks of a store that is not finished, a file each, so that a kill costs only those in the making."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lf_lightning.data.build import Chunk, Job
from lf_lightning.data.cache_lock import cache_refusal
from lf_lightning.data.encode import RowProblem

ARRAYS = ("input_ids", "labels", "lengths", "rows")
FACT = "fact-"
"""How the name of a fact begins."""


class Parts:
    """A hidden folder beside a store to be, which goes when the store is there.

    Args:
        store: The folder of the store.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self.folder = store.parent / f".{store.name}.parts"

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs whose chunks are not here yet."""
        return [job for job in jobs if not zipfile.is_zipfile(self._path(job))]

    @property
    def num_finished(self) -> int:
        """Chunks that are here."""
        return len(list(self.folder.glob("*.npz")))

    def write(self, job: Job, chunk: Chunk) -> None:
        """Keep the chunk of a job: under its name it is whole, and on the disk.

        Raises:
            InputError: It cannot be written.
        """
        texts = json.dumps({"ways": chunk.ways, "cuts": chunk.cuts, "problems": chunk.problems})
        arrays: dict[str, Any] = {name: getattr(chunk, name) for name in ARRAYS}  # fields of the tuple
        arrays |= {f"{FACT}{name}": array for name, array in chunk.facts.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", suffix=".tmp", delete=False) as file:
                np.savez(file, texts=np.array(texts), **arrays)
                file.flush()
                os.fsync(file.fileno())
            Path(file.name).replace(self._path(job))
        except OSError as error:
            raise cache_refusal(self._store, error) from error

    def read(self, job: Job, *, tokens: bool = True) -> Chunk:
        """The chunk of a job.

        Args:
            job: A job whose chunk is here.
            tokens: Read ids and labels too; otherwise both are empty.
        """
        with np.load(self._path(job)) as file:
            texts = json.loads(str(file["texts"]))
            nothing = np.zeros(0, np.int32)
            return Chunk(
                job.source_index,
                input_ids=file["input_ids"] if tokens else nothing,
                labels=file["labels"] if tokens else nothing,
                lengths=file["lengths"],
                rows=file["rows"],
                ways=texts["ways"],
                cuts=texts["cuts"],
                problems=[RowProblem(*problem) for problem in texts["problems"]],
                facts={name.removeprefix(FACT): file[name] for name in file.files if name.startswith(FACT)},
            )

    def write_tokens(self, jobs: Sequence[Job], folder: Path, *, num_tokens: int) -> None:
        """Write ids and labels of all chunks as input_ids.npy and labels.npy, one chunk in memory at a time.

        Not through a memory map: on a full disk that ends the process instead of raising.

        Args:
            jobs: All jobs, in order.
            folder: Where to.
            num_tokens: Tokens of all chunks.
        """
        names = ("input_ids", "labels")
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False}
        with ExitStack() as stack:
            files = {name: stack.enter_context((folder / f"{name}.npy").open("wb")) for name in names}
            for file in files.values():
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (num_tokens,)})
            for job in jobs:
                chunk = self.read(job)
                files["input_ids"].write(chunk.input_ids.tobytes())
                files["labels"].write(chunk.labels.tobytes())

    def remove(self) -> None:
        """Remove all of it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, job: Job) -> Path:
        last = job.first_row + len(job.rows) - 1
        return self.folder / f"{job.source_index:04d}-{job.first_row:010d}-{last:010d}.npz"
