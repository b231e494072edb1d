"""Processes that train, forked from one that has imported everything: a start takes seconds less than `python -m`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lf_lightning.commands.kills import Child

CONTEXT: Any = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.preload"])


class Fork:
    """A process of the fork server, as `kills.Child` wants it."""

    def __init__(self, process: Any) -> None:
        self.process = process
        process.start()

    @property
    def pid(self) -> int | None:
        return int(self.process.pid)

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code


def fit_in_fork(folder: Path, output: Path, argv: list[str]) -> Callable[[], Child]:
    """What starts `lf-lightning fit` in a folder, by its own front door."""
    return lambda: Fork(CONTEXT.Process(target=train, args=(str(folder), str(output), argv)))


def train(folder: str, output: str, argv: list[str]) -> None:
    """Run `fit` as the first process of a group of its own; the process ends with its exit code."""
    os.setsid()
    os.chdir(folder)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    from lf_lightning.__main__ import main

    code = main(["fit", *argv])
    sys.stdout.flush()
    os._exit(code)
