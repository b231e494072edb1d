"""Writing a folder so that it is either whole or absent: a hidden sibling, synced, renamed; the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Trainer

from lf_lightning.types import InputError

MANIFEST = "manifest.json"


@contextmanager
def whole_folder(target: Path, *, writes: bool) -> Iterator[Path]:
    """Give a hidden folder to fill; afterwards it takes the place of `target`, all at once.

    Args:
        target: The folder to make or to replace.
        writes: Whether this process writes manifest and name; only one may.
    """
    hidden = target.parent / f".{target.name}.tmp"
    if writes:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
    yield hidden
    if not writes:
        return
    write_manifest(hidden)
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    hidden.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path) -> None:
    """Write names, sizes and hashes of all files of a folder, after everything else is on the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        _sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
        _sync(inner)
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n")
    _sync(folder / MANIFEST)
    _sync(folder)


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run."""
    return Path(trainer.default_root_dir)


def sha256(path: Path) -> str:
    """Hash of a file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_whole(folder: Path) -> None:
    """Compare a checkpoint with its manifest, file by file, by size.

    Raises:
        InputError: It has no manifest, or a file is missing or has another size.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise InputError(f"{folder}: must be a complete checkpoint, got one without {MANIFEST}. Give another folder.")
    for name, facts in json.loads(manifest.read_text())["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else "no file"
        if size != facts["size"]:
            raise InputError(f"{folder / name}: must have {facts['size']} bytes, got {size}. Give another checkpoint.")


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder's name, None where it is not one."""
    prefix, _, number = folder.name.rpartition("-")
    return int(number) if prefix == "step" and number.isdigit() else None


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run that have a manifest, oldest first."""
    found = [path for path in (run_folder / "checkpoints").glob("step-*") if (path / MANIFEST).is_file()]
    return sorted((path for path in found if step_of(path) is not None), key=lambda path: step_of(path) or 0)


def last_checkpoint(run_folder: str | Path) -> Path | None:
    """The file that `Trainer.fit(ckpt_path=...)` takes to continue a run, None where there is nothing to continue."""
    found = complete_checkpoints(Path(run_folder))
    return found[-1] / "trainer_state" / "state.ckpt" if found else None


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, its manifest first, so that half of it is never taken for a whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
