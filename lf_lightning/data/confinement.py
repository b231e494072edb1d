"""Files that a dataset_info.json names lie in its folder: one from elsewhere must not read what else this user may."""

from __future__ import annotations

from pathlib import Path

from lf_lightning.types import InputError


def check_inside(file_name: str, folder: Path, where: str) -> None:
    """Refuse a file outside of a folder, whether by `..`, by an absolute path or by a symbolic link.

    Args:
        file_name: A file, or a folder of files, beginning in `folder`.
        folder: What it must lie in.
        where: Whose file it is.

    Raises:
        InputError: As said.
    """
    inside, path = folder.resolve(), folder / file_name
    for each in (path, *(sorted(path.iterdir()) if path.is_dir() else ())):
        if not each.resolve().is_relative_to(inside):
            raise InputError(
                f"{where}: file_name must stay inside {folder}, got {file_name!r}, which leads to {each.resolve()}. "
                "Move the file there, or set data.allow_outside: true."
            )
