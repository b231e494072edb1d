"""Writing a folder so that it is either whole or absent: a hidden sibling, synced, renamed; the manifest last."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lf_lightning.console import say
from lf_lightning.types import InputError

MANIFEST = "manifest.json"
STATE = "trainer_state/state.ckpt"
"""What a resume reads besides the weights, in the folder of a checkpoint."""


def hidden_folder(target: Path) -> Path:
    """Where a folder is filled before it gets its name."""
    return target.parent / f".{target.name}.tmp"


def name_folder(hidden: Path, target: Path) -> None:
    """Put a folder that is whole in the place of `target`, all at once but for a moment in which neither is there.

    A crash in that moment leaves the old one as `.NAME.old`; `put_back` gives it its name again.
    """
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    hidden.rename(target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(target: Path) -> None:
    """Give a folder its name back, where a crash has come between the two renames that replace it."""
    old = target.parent / f".{target.name}.old"
    if old.is_dir() and not target.exists():
        old.rename(target)


def sync_folder(folder: Path) -> None:
    """Bring a folder to the disk: its files, then a manifest with names, sizes and hashes of all of them."""
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
    """Compare a checkpoint with its manifest, file by file, byte by byte.

    Raises:
        InputError: It has no manifest, or one that cannot be read; or a file is missing, or differs.
    """
    for name, facts in _manifest(folder).items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else "no file"
        if size != facts["size"]:
            raise InputError(f"{path}: must have {facts['size']} bytes, got {size}. Give another checkpoint.")
        if sha256(path) != facts["sha256"]:
            raise InputError(f"{path}: must be as it was saved, got other bytes. Give another checkpoint.")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(f"{folder}: must be a complete checkpoint, got one without {MANIFEST}. Give another folder.")
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        if all({"size", "sha256"} <= facts.keys() for facts in files.values()):
            return dict(files)
    except (ValueError, TypeError, KeyError, AttributeError):  # no JSON, or JSON of another form
        pass
    raise InputError(f"{path}: must list names, sizes and hashes, got something else. Give another checkpoint.")


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint folder's name, None where it is not one."""
    prefix, _, number = folder.name.rpartition("-")
    return int(number) if prefix == "step" and number.isdigit() else None


def checkpoint_folders(run_folder: Path) -> list[Path]:
    """The folders of a run that have the name of a checkpoint, whole or not, oldest first."""
    found = [path for path in (run_folder / "checkpoints").glob("step-*") if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def complete_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run that have a manifest, oldest first."""
    return [path for path in checkpoint_folders(run_folder) if (path / MANIFEST).is_file()]


def newest_whole(run_folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as it was saved, and why newer ones are not; None where there is none."""
    reasons: list[str] = []
    for folder in reversed(checkpoint_folders(run_folder)):
        try:
            check_whole(folder)
        except (InputError, OSError) as error:
            reasons.append(str(error).split(". Give another", maxsplit=1)[0])
            continue
        if (folder / STATE).is_file():
            return folder, reasons
        reasons.append(f"{folder}: must hold {STATE}, got none")
    return None, reasons


def last_checkpoint(run_folder: str | Path) -> Path | None:
    """The file that `Trainer.fit(ckpt_path=...)` takes to continue a run, None where there is nothing to continue.

    Checkpoints that are not as they were saved are skipped, each with a line that says why.
    """
    folder, reasons = newest_whole(Path(run_folder))
    for line in reasons:
        say(f"skipped {line}")
    return folder / STATE if folder is not None else None


def advice(folder: Path) -> str:
    """What to do after a failed write, and what there is to go on from."""
    newest, _ = newest_whole(folder)
    if newest is None:
        return "There is no checkpoint yet. Make room or mend the folder, and start again."
    return f"The last good checkpoint is {newest}. Make room or mend the folder, and continue with --ckpt_path last."


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
