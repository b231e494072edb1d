"""Opening a saved folder again: what was trained must be in it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lf_lightning.models.backbone import Backbone
from lf_lightning.models.export import TRAINABLE, TRAINED, tied_names
from lf_lightning.models.pissa import TRAINABLE_ADAPTER, WEIGHTS, converted_shape
from lf_lightning.models.tensor_files import names_in, tensor_files
from lf_lightning.models.value_head_files import WEIGHT, read_head
from lf_lightning.shards import own_part, whole_shape
from lf_lightning.types import InputError, TrainingStopped


def check_saved(backbone: Backbone, folder: Path) -> None:
    """Open what was written of a model: every trained parameter is there, of its shape, and finite.

    Args:
        backbone: The model that was saved; only names and shapes are read, so it may be sharded.
        folder: Where it was saved.

    Raises:
        TrainingStopped: Something is missing or broken.
    """
    try:
        for name, shape, file in _expected(backbone, folder):
            _check(name, shape, file)
        if backbone.value_head is not None:
            _check_head(backbone, folder)
    except (InputError, SafetensorError) as error:
        raise TrainingStopped(f"a folder that cannot be read again: {error}") from error


def _expected(backbone: Backbone, folder: Path) -> Iterator[tuple[str, torch.Size, Path]]:
    """The trained parameters of the language model: name in the folder, shape, and the file that must hold it."""
    files = tensor_files(folder)
    is_adapter = backbone.is_adapter
    own = folder / "trainer_state" / (f"{TRAINABLE_ADAPTER}/{WEIGHTS}" if is_adapter else TRAINABLE)
    if own.is_file():
        files |= dict.fromkeys(names_in(own), own)
    aliases = {} if is_adapter else tied_names(backbone)
    trained = backbone.model if is_adapter else backbone.causal_lm
    for name, parameter in trained.named_parameters():
        if not parameter.requires_grad:
            continue
        known = name_in_adapter(name) if is_adapter else name
        stored = next((each for each in (known, *sorted(aliases.get(name, ()))) if each in files), None)
        if stored is not None:
            is_converted = stored in backbone.start and files[stored] != own
            shape = whole_shape(parameter)
            yield stored, converted_shape(stored, shape) if is_converted else shape, files[stored]
        elif is_adapter or (folder / "trainer_state").is_dir():
            raise TrainingStopped(f"a folder without the trained parameter {known}")
        # else a final folder of a family that is saved in another arrangement than it is trained in


def name_in_adapter(name: str) -> str:
    """What peft calls a parameter of the trained adapter in a file."""
    if ".lora_magnitude_vector." in name:  # of DoRA
        name = name.removesuffix(".weight")
    left_out = (TRAINED, "modules_to_save")
    return ".".join(part for part in name.split(".") if part not in left_out)


def _check(name: str, shape: torch.Size, path: Path) -> None:
    with safe_open(path, "pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
    if tensor.shape != shape:
        raise TrainingStopped(f"{name} of shape {tuple(tensor.shape)} instead of {tuple(shape)}")
    if not tensor.isfinite().all():
        raise TrainingStopped(f"numbers that are not finite in {name}")


def _check_head(backbone: Backbone, folder: Path) -> None:
    assert backbone.value_head is not None
    _, tensors = read_head(folder)
    want = whole_shape(backbone.value_head.summary.weight)
    if WEIGHT not in tensors or tensors[WEIGHT].shape != want:
        raise TrainingStopped(f"no {WEIGHT} of shape {tuple(want)}")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise TrainingStopped("numbers that are not finite in the value head")


def adapter_digest(backbone: Backbone) -> str | None:
    """Hash over every bit of the adapter that trains, this rank's part of it; None where there is no adapter."""
    if not backbone.is_adapter:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in backbone.model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode())
            digest.update(own_part(parameter).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
