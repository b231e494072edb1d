"""Which tensors a folder holds, and in which files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lf_lightning.types import InputError

PICKLES = ("*model*.bin", "*model*.pt", "*model*.pth", "consolidated*.pth")
"""Names of files with weights that are pickles."""
BESIDE = "value_head.safetensors"
"""Holds no weights of the model itself."""


def refuse_pickles(folder: Path, where: str) -> None:
    """Refuse a folder whose weights are pickles alone: opening one may run whatever its author has put in.

    Raises:
        InputError: As said.
    """
    if any(path.name != BESIDE for path in folder.glob("*.safetensors")):
        return
    found = sorted(path.name for kind in PICKLES for path in folder.glob(kind))
    if found:
        raise InputError(
            f"{where}: must hold weights as safetensors, got {found[0]} in {folder}, a pickle, which may run code. "
            "Save the model again with save_pretrained, where you trust it."
        )


def tensor_files(folder: Path) -> dict[str, Path]:
    """Name of each tensor of a folder -> the file that holds it.

    Raises:
        InputError: A safetensors file is cut off or broken.
    """
    return {name: path for path in sorted(folder.glob("*.safetensors")) for name in names_in(path)}


def names_in(path: Path) -> list[str]:
    """Names of the tensors in a file.

    Raises:
        InputError: It is cut off or broken.
    """
    try:
        with safe_open(path, "pt") as handle:
            return list(handle.keys())
    except SafetensorError as error:
        raise InputError(f"{path}: must be a whole safetensors file, got {error}. Use another folder.") from error
