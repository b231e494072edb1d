"""One process makes a folder of the cache; others wait, take over where it is gone, or learn why it failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lf_lightning.data import cache_lock
from lf_lightning.data.cache_lock import CacheLock, made_once
from lf_lightning.types import InputError, TrainingStopped


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_lock, "POLL_SECONDS", 0.02)


def lock_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def held(folder: Path, **changes: object) -> Path:
    """The lock of a folder as this process would hold it, with other values of its record."""
    folder.parent.mkdir(exist_ok=True)
    start = cache_lock._start_of(os.getpid())
    owner = cache_lock.Owner("t", cache_lock._place(), "node-3", os.getpid(), start)
    lock_of(folder).write_text(json.dumps({**owner._asdict(), **changes}))
    return lock_of(folder)


def ask(folder: Path, make: Callable[[], None]) -> None:
    made_once(folder, make, progress=lambda: "3 chunks are done")


class Waiting(threading.Thread):
    """Asks for a folder that it never wants to make itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.error, self.made = folder, None, False
        self.start()

    def run(self) -> None:
        try:
            ask(self.folder, self.make)
        except (InputError, TrainingStopped) as error:
            self.error = error

    def make(self) -> None:
        self.made = True
        self.folder.mkdir()


def test_of_many_that_ask_at_once_one_makes_the_folder_and_all_return_when_it_is_there(tmp_path: Path):
    folder, calls = tmp_path / "cache" / "key", []

    def make() -> None:
        calls.append(threading.get_ident())
        time.sleep(0.3)
        folder.mkdir()

    threads = [threading.Thread(target=ask, args=(folder, make)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(calls) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["key"], "nothing is left beside it"


def test_a_folder_that_is_there_needs_no_lock_and_no_place_to_write(tmp_path: Path):
    def make() -> None:
        raise AssertionError("it is there")

    ask(tmp_path, make)


@pytest.mark.parametrize("how", ["killed", "a corpse"])
def test_the_lock_of_a_killed_process_is_taken_over(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "key"
    owner = subprocess.Popen(["sleep", "600"])
    try:
        held(folder, pid=owner.pid, start=cache_lock._start_of(owner.pid))
        waiting = Waiting(folder)
        time.sleep(0.3)
        assert waiting.is_alive()
        assert not waiting.made, "its owner lives"
        owner.send_signal(signal.SIGKILL)
        if how == "killed":
            owner.wait()
        waiting.join(timeout=60)
    finally:
        owner.kill()
        owner.wait()
    assert waiting.made
    assert capsys.readouterr().err == (
        f"data: process {owner.pid} on node-3, which encoded the data, is gone: going on with what it left\n"
    )


def test_a_number_that_is_another_process_now_is_no_owner(tmp_path: Path):
    held(tmp_path / "key", start="1")
    waiting = Waiting(tmp_path / "key")
    waiting.join(timeout=60)
    assert waiting.made


@pytest.mark.parametrize("beats", [True, False])
def test_the_owner_on_another_machine_is_gone_when_its_lock_is_not_touched_any_more(
    beats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache_lock, "STALE_SECONDS", 2.0)
    lock = held(tmp_path / "key", place="another boot", pid=1)
    os.utime(lock, (0, 0))  # clocks of machines differ: only whether it moves counts
    waiting = Waiting(tmp_path / "key")
    for number in range(8):
        time.sleep(0.5)
        if beats:
            os.utime(lock, (number, number))
    assert waiting.made == (not beats)
    lock.unlink(missing_ok=True)
    waiting.join(timeout=60)
    assert waiting.made


def test_a_lock_that_cannot_be_read_has_an_owner_until_it_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_lock, "STALE_SECONDS", 1.0)
    lock_of(tmp_path / "key").write_text("")
    waiting = Waiting(tmp_path / "key")
    time.sleep(0.2)
    assert not waiting.made
    waiting.join(timeout=60)
    assert waiting.made


def test_the_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_lock, "BEAT_SECONDS", 0.05)
    lock = CacheLock.taken(tmp_path / "key")
    assert lock is not None
    with lock:
        os.utime(lock_of(tmp_path / "key"), (0, 0))
        for _ in range(600):
            time.sleep(0.05)
            if lock_of(tmp_path / "key").stat().st_mtime > 0:
                break
        assert lock_of(tmp_path / "key").stat().st_mtime > 0
        assert CacheLock.taken(tmp_path / "key") is None
    assert not lock_of(tmp_path / "key").exists()


def failing(folder: Path, error: Exception) -> Callable[[], None]:
    def make() -> None:
        time.sleep(0.5)
        raise error

    return make


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (InputError("rows.json, row 3: is wrong. Mend it."), InputError, "rows.json, row 3: is wrong. Mend it."),
        (
            KeyError("input_ids"),
            TrainingStopped,
            f"process {os.getpid()} on HOST, which encoded the data, failed: KeyError: 'input_ids'",
        ),
    ],
    ids=["a mistake of the user", "a mistake of ours"],
)
def test_the_failure_of_the_owner_reaches_all_who_wait(
    error: Exception, kind: type, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cache_lock.socket, "gethostname", lambda: "HOST")
    folder, failed = tmp_path / "key", []

    def own() -> None:
        try:
            ask(folder, failing(folder, error))
        except type(error) as own_error:
            failed.append(own_error)

    owner = threading.Thread(target=own)
    owner.start()
    while not lock_of(folder).exists():
        time.sleep(0.01)
    waiting = [Waiting(folder) for _ in range(2)]
    for thread in (owner, *waiting):
        thread.join(timeout=60)
    assert failed == [error]
    assert [type(each.error) for each in waiting] == [kind, kind]
    assert [str(each.error) for each in waiting] == [message, message]
    assert not any(each.made for each in waiting)

    later = Waiting(folder)
    later.join(timeout=60)
    assert later.made, "a failure is not held against the next who asks"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_an_interrupt_is_nobody_elses_failure(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), CacheLock.taken(tmp_path / "key"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("local_rank", "lines"), [("0", True), ("1", False)])
def test_who_waits_says_for_whom_once_on_each_node(
    local_rank: str, lines: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(cache_lock, "REPORT_SECONDS", 0.1)
    lock = held(tmp_path / "key")
    waiting = Waiting(tmp_path / "key")
    time.sleep(1.0)
    lock.unlink()
    waiting.join(timeout=60)
    said = capsys.readouterr().err.splitlines()
    line = f"data: waiting for process {os.getpid()} on node-3, which encodes the data: 3 chunks are done, 0 min"
    assert set(said) == ({line} if lines else set())


@pytest.mark.parametrize("place", ["a file", "a file/cache"])
def test_a_cache_that_cannot_be_written_is_one_line(place: str, tmp_path: Path):
    (tmp_path / "a file").write_text("")
    reason = "not a folder" if place == "a file" else "Not a directory"
    with pytest.raises(InputError) as error:
        ask(tmp_path / place / "key", lambda: None)
    assert str(error.value) == (
        f"data.cache_dir: must be a folder that can be written, got {tmp_path / place} ({reason}). "
        "Make room there, choose another, or null to keep encoded rows in memory."
    )
