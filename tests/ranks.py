"""Ranks as forks of the test's own process, which has imported everything already, and results shared by workers."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from lf_lightning.__main__ import main

PATIENCE = 600.0
"""Seconds that ranks may take on a machine that is busy with other things."""


def fork_ranks(function: Callable[[], None], num_ranks: int, folder: Path) -> None:
    """Run a function once on each rank, in an environment as torchrun would give it; the test fails where a rank does.

    Args:
        function: What each rank runs.
        num_ranks: How many; the environment of a single one says nothing of ranks.
        folder: Gets `log.<rank>`.
    """
    if torch.distributed.is_initialized():  # by a run of an earlier test; a fork could not leave its group
        torch.distributed.destroy_process_group()
    port = free_port()
    children = [_fork(function, rank, num_ranks, port, folder / f"log.{rank}") for rank in range(num_ranks)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + PATIENCE
    while len(codes) < num_ranks and time.monotonic() < deadline and not any(codes.values()):
        for child in children:
            if child not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(found[1])
        time.sleep(0.02)
    for child in children:  # where one has failed, the others would wait for it
        if child not in codes:
            os.killpg(child, signal.SIGKILL)
            codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    logs = "\n".join((folder / f"log.{rank}").read_text()[-4000:] for rank in range(num_ranks))
    assert list(codes.values()) == [0] * num_ranks, logs


def _fork(function: Callable[[], None], rank: int, num_ranks: int, port: int, log: Path) -> int:
    """Start one rank; the process number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if num_ranks > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port, "NODE_RANK": 0}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        function()
        code = 0
    except BaseException:  # noqa: BLE001  # whatever it is, it must not run the rest of the tests a second time
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fork_command(arguments: Sequence[str], cwd: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of lf-lightning in a folder, as a process of its own that need not import anything again.

    Args:
        arguments: The command and its arguments.
        cwd: Where it runs.
        folder: Gets what it says.
    """
    said, errors = folder / "command.out", folder / "command.err"
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number, path in ((1, said), (2, errors)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            os.chdir(cwd)
            code = main(list(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:  # noqa: BLE001  # as in `_fork`
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess(list(arguments), code, said.read_text(), errors.read_text())


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first test process to ask for it fills, and all others of this session find full.

    Args:
        factory: Of this process.
        name: Of the folder; equal in all processes.
        make: Fills it.
    """
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = root / name
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            (folder / "made").touch()
    return folder
