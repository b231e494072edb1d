"""`lf-lightning` whose encoding takes its time, in small chunks, and says who encoded what; started by tests.

    python planted_run.py COMMAND ...

PLANTED_SECONDS is what a chunk takes; with PLANTED_WAITS=1 it also waits until another process waits for this one.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from lf_lightning.__main__ import main
from lf_lightning.data import build
from lf_lightning.data.cache_lock import CacheLock

build.CHUNK_ROWS = 2
encode, take = build.Encoder.chunk, CacheLock.taken


def slow_chunk(encoder: build.Encoder, job: build.Job) -> build.Chunk:
    while os.environ.get("PLANTED_WAITS") and not Path("waiting").exists():
        time.sleep(0.1)
    time.sleep(float(os.environ["PLANTED_SECONDS"]))
    with Path("encoded").open("a") as file:
        file.write(f"{os.getpid()} {job.first_row}\n")
    return encode(encoder, job)


def noted(folder: Path) -> CacheLock | None:
    lock = take(folder)
    if lock is None:
        Path("waiting").touch()
    return lock


build.Encoder.chunk = slow_chunk
CacheLock.taken = noted
if __name__ == "__main__":
    sys.exit(main())
