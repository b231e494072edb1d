"""The files of a value head: LlamaFactory's, and what AutoModelForSequenceClassification stores instead."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lf_lightning.models.tensor_files import tensor_files
from lf_lightning.shards import fill, whole_tensor
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from lf_lightning.models.backbone import Backbone
    from lf_lightning.models.value_head import ValueHead

SAFETENSORS, PICKLE = "value_head.safetensors", "value_head.bin"
WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"
SCORE = ("score.weight", "base_model.model.score.weight")
"""Names of the head in a folder for AutoModelForSequenceClassification: of a whole model, of an adapter."""


def whole_head(backbone: Backbone) -> dict[str, Tensor]:
    """Weight (1, H) and bias (1,) of the head on the CPU, by LlamaFactory's names; where sharded, all ranks must call.

    A head without bias gives a bias of 0.
    """
    assert backbone.value_head is not None, "only a reward model has a value head"
    layer = backbone.value_head.summary
    found = {}
    for name, parameter in ((WEIGHT, layer.weight), (BIAS, layer.bias)):
        tensor = torch.zeros(1, dtype=layer.weight.dtype) if parameter is None else whole_tensor(parameter)
        found[name] = tensor.cpu().contiguous()
    return found


def save_value_head(backbone: Backbone, folder: Path, *, writes: bool) -> None:
    """Write value_head.safetensors with LlamaFactory's names.

    Args:
        backbone: A reward model; where it is sharded, every rank must call.
        folder: An existing folder.
        writes: Whether this rank writes; only one may.
    """
    tensors = whole_head(backbone)
    if writes:
        save_file(tensors, folder / SAFETENSORS, metadata={"format": "pt"})


@torch.no_grad()
def load_value_head(head: ValueHead, folder: Path) -> None:
    """Take the weights of a head from a folder: our own, LlamaFactory's, or one for sequence classification.

    Raises:
        InputError: The folder holds no head, or one that does not fit.
    """
    path, tensors = read_head(folder)
    layer = head.summary
    if WEIGHT not in tensors or set(tensors) - {WEIGHT, BIAS}:
        raise InputError(f"{path}: must hold {WEIGHT} and {BIAS}, got {sorted(tensors)}. Give another file.")
    bias = tensors.setdefault(BIAS, torch.zeros(1))
    for name, shape in ((WEIGHT, (1, layer.in_features)), (BIAS, (1,))):
        if tensors[name].shape != shape:
            got = tuple(tensors[name].shape)
            raise InputError(f"{path}: {name} must have shape {shape}, got {got}. Use the head of this model.")
        if not tensors[name].isfinite().all():
            raise InputError(f"{path}: {name} must be finite, got NaN or infinity. Use another checkpoint.")
    if layer.bias is None and bias.any():
        raise InputError(
            f"{path}: {BIAS} must be 0 for model.init_args.value_head.save_as: sequence_classification, which knows no "
            f"bias, got {bias.item():g}. Set save_as: value_head."
        )
    fill(layer.weight, tensors[WEIGHT])
    if layer.bias is not None:
        fill(layer.bias, bias)


def read_head(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file with the head, and its tensors by LlamaFactory's names.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    files = _files_of_head(folder)
    if not files:
        raise InputError(
            f"reward model: {folder} must hold {SAFETENSORS} or {PICKLE}, got neither. Give a folder that has a value "
            "head, or train one."
        )
    path, names = files
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as handle:
            return path, {WEIGHT if name in SCORE else name: handle.get_tensor(name) for name in names}
    try:
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path}: must hold tensors alone, got a file that cannot be read as such.") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise InputError(f"{path}: must hold {WEIGHT} and {BIAS}, got {type(tensors).__name__}. Give another file.")
    return path, dict(tensors)


def _files_of_head(folder: Path) -> tuple[Path, tuple[str, ...]] | None:
    """The file of a folder that holds a value head, with the names to read there; None where there is none."""
    files = tensor_files(folder)
    names = tuple(name for name, path in files.items() if path.name == SAFETENSORS)
    if (folder / SAFETENSORS).is_file():
        return folder / SAFETENSORS, names
    if (folder / PICKLE).is_file():
        return folder / PICKLE, ()
    return next(((files[name], (name,)) for name in SCORE if name in files), None)


def find_value_head(name: str, *, revision: str | None) -> Path | None:
    """The folder with the head of a model, whose folder or hub name is given; None where it has none."""
    if Path(name).is_dir():
        return Path(name) if _files_of_head(Path(name)) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for file in (SAFETENSORS, PICKLE):
        try:
            return Path(hf_hub_download(name, file, revision=revision)).parent
        except EntryNotFoundError:  # also where the hub cannot be reached and nothing was kept
            continue
    return None
