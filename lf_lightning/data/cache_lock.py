"""One process makes a folder of the cache, the others wait for it on the disk: not in a collective, which times out."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from lf_lightning.console import say_on_node
from lf_lightning.types import InputError, TrainingStopped

POLL_SECONDS = 0.5
"""How often a process looks whether the folder is there."""
BEAT_SECONDS = 10.0
"""How often the owner of a lock touches it."""
STALE_SECONDS = 180.0
"""A lock that nobody has touched for so long has lost its owner; network file systems remember times for a minute."""
REPORT_SECONDS = 60.0
"""How often a process that waits says so."""


class Owner(NamedTuple):
    """The process that holds a lock."""

    token: str  # of this very hold; empty where the lock cannot be read
    place: str  # machine, boot and process namespace: where `pid` means this process; empty where unknown
    host: str
    pid: int
    start: str | None  # when the process began: a number may be another process's later

    @property
    def is_gone(self) -> bool:
        """Whether the process is known to be dead; only processes of this place are known."""
        return bool(self.place) and self.place == _place() and _start_of(self.pid) != self.start

    def __str__(self) -> str:
        """Who it is, in words."""
        return f"process {self.pid} on {self.host}"


UNKNOWN = Owner("", "", "another machine", 0, None)


def made_once(folder: Path, make: Callable[[], None], *, progress: Callable[[], str]) -> None:
    """Have a folder made by one of all processes that ask for it, on whichever machines; return when it is there.

    A lock beside the folder says who makes it. It is taken over where its owner is gone: dead on this machine, or
    silent for STALE_SECONDS on another. Should two processes make the folder at once, they make the same one, and the
    second finds the first's: the lock spares work, and nothing rests on it.

    Args:
        folder: The folder, whole as soon as it exists.
        make: Makes it.
        progress: How far `make` is in another process, in a few words.

    Raises:
        InputError: `make` failed, here or in the process that was waited for; or the lock cannot be written.
        TrainingStopped: The process that was waited for failed in another way.
    """
    watch = _Watch(folder, progress)
    while not folder.exists():
        watch.look()
        lock = CacheLock.taken(folder)
        if lock is None:
            time.sleep(POLL_SECONDS)
            continue
        with lock:
            if not folder.exists():
                make()


def cache_refusal(folder: Path, error: OSError) -> InputError:
    """The error for a folder of the cache that cannot be written, as one line."""
    return InputError(
        f"data.cache_dir: must be a folder that can be written, got {folder.parent} ({error.strerror or error}). "
        "Make room there, choose another, or null to keep encoded rows in memory."
    )


class CacheLock:
    """A file beside a folder that says who makes it, touched every few seconds; `taken` gives one."""

    def __init__(self, folder: Path, owner: Owner) -> None:
        self._path, self._failed, self._owner = _lock_of(folder), _failure_of(folder), owner
        self._released = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="cache-lock").start()

    @classmethod
    def taken(cls, folder: Path) -> CacheLock | None:
        """The lock of a folder, or None where another process holds it.

        Raises:
            InputError: It cannot be written.
        """
        owner = Owner(uuid.uuid4().hex, _place(), socket.gethostname(), os.getpid(), _start_of(os.getpid()))
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock_of(folder).open("x", encoding="utf-8") as file:
                json.dump(owner._asdict(), file)
        except FileExistsError:
            if folder.parent.is_dir():
                return None
            raise cache_refusal(folder, NotADirectoryError("not a folder")) from None
        except OSError as error:
            raise cache_refusal(folder, error) from error
        _failure_of(folder).unlink(missing_ok=True)  # of an earlier attempt
        return cls(folder, owner)

    def __enter__(self) -> CacheLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock; what went wrong is left in a file for those who wait, an interrupt aside."""
        self._released.set()
        with suppress(OSError):  # a full disk: then those who wait try for themselves
            if error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
                is_input = isinstance(error, InputError)
                message = str(error) if is_input else f"{type(error).__name__}: {error}"
                record = {"token": self._owner.token, "is_input": is_input, "message": message}
                draft = self._failed.with_suffix(".draft")
                draft.write_text(json.dumps(record), encoding="utf-8")
                draft.replace(self._failed)
        with suppress(OSError):
            if _owner_of(self._path).token == self._owner.token:  # otherwise it has been taken over
                self._path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._path)


class _Watch:
    """What a process that waits has seen of the lock: times are this process's own, clocks of machines differ."""

    def __init__(self, folder: Path, progress: Callable[[], str]) -> None:
        self._folder, self._progress = folder, progress
        self._owner: Owner | None = None
        self._beat: tuple[str, int] | None = None
        self._since = self._begun = self._reported = time.monotonic()

    def look(self) -> None:
        """Look once: take a lock away from an owner that is gone, and say what is waited for.

        Raises:
            InputError: The owner failed by a mistake of the user's.
            TrainingStopped: It failed in another way.
        """
        path, now = _lock_of(self._folder), time.monotonic()
        try:
            owner, touched = _owner_of(path), path.stat().st_mtime_ns
        except OSError:  # no lock: its owner is done, one way or the other
            if failure := self._failure():
                raise failure from None
            self._owner = self._beat = None
            return
        self._owner = owner
        if self._beat != (owner.token, touched):
            self._beat, self._since = (owner.token, touched), now
        if owner.is_gone or now - self._since > STALE_SECONDS:
            say_on_node(f"data: {owner}, which encoded the data, is gone: going on with what it left")
            _remove(path, owner)
        elif now - self._reported >= REPORT_SECONDS:
            self._reported = now
            minutes = (now - self._begun) / 60
            say_on_node(f"data: waiting for {owner}, which encodes the data: {self._progress()}, {minutes:.0f} min")

    def _failure(self) -> InputError | TrainingStopped | None:
        """What the owner left behind who was waited for, where it failed."""
        try:
            record = json.loads(_failure_of(self._folder).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is none, or none yet
            return None
        if self._owner is None or record["token"] != self._owner.token:
            return None
        if record["is_input"]:
            return InputError(record["message"])
        return TrainingStopped(f"{self._owner}, which encoded the data, failed: {record['message']}")


def _lock_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def _failure_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.failed"


def _owner_of(path: Path) -> Owner:
    """Who holds a lock; someone unknown while it is being written."""
    text = path.read_text(encoding="utf-8")
    with suppress(ValueError, TypeError):
        return Owner(**json.loads(text))
    return UNKNOWN


def _remove(path: Path, owner: Owner) -> None:
    """Take a lock away, unless someone else has done so and taken it."""
    with suppress(OSError):
        if _owner_of(path) == owner:
            path.unlink()


def _place() -> str:
    """Where process numbers are ours: this boot of this machine, in this container; empty where /proc is absent."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _start_of(pid: int) -> str | None:
    """When a process of this place began, in clock ticks since boot; None where there is none, or only its corpse."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None
