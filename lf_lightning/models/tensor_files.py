"""Which tensors a folder holds, and in which files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lf_lightning.types import InputError


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor of a folder -> the file that holds it.

    Raises:
        InputError: A safetensors file is cut off or broken.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as handle:
                found.update(dict.fromkeys(handle.keys(), path))
        except SafetensorError as error:
            raise InputError(f"{path}: must be a whole safetensors file, got {error}. Use another folder.") from error
    return found
