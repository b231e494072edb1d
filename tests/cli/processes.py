"""Processes that a test starts: their environment, and their end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT

PATIENCE = 600.0
"""Seconds that anything may take on a machine that is busy with other things."""


@contextmanager
def started(*commands: Sequence[str], folder: Path, **environment: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run commands with this Python in a folder, each with its output in `log.<number>`; none outlives the block."""
    names = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            with (folder / f"log.{number}").open("wb") as log:
                running.append(
                    subprocess.Popen(
                        [sys.executable, *command], cwd=folder, env={**os.environ, **names}, stdout=log, stderr=log
                    )
                )
        yield running
    finally:
        for process in running:
            kill_tree(process)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and to all that it has started."""
    if process.poll() is None:
        whole = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in whole:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
    process.wait()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait until something is true; the test fails where it does not become so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.05)


def end_of(process: subprocess.Popen[bytes], log: Path) -> int:
    """The exit code of a process, whose log a failing test shows."""
    try:
        return process.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        pytest.fail(f"did not end: {log.read_text()[-3000:]}")


def torchrun(num_processes: int, *command: str) -> list[str]:
    """The command that starts a program several times on one node, all at once."""
    launcher = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={num_processes}"]
    return [*launcher, "--master-addr=127.0.0.1", f"--master-port={free_port()}", *command]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
