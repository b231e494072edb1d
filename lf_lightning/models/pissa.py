"""A PiSSA adapter as a plain LoRA: what it began with, taken away again, makes it valid on the original base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lf_lightning.shards import own_box
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from lf_lightning.models.backbone import Backbone

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINABLE_ADAPTER = "adapter"
"""Folder in trainer_state/ with the adapter as it trains; its base is the model without what the adapter began with."""
A, B = ".lora_A.weight", ".lora_B.weight"


def start_of(model: Any) -> dict[str, Tensor]:
    """A and B of every adapted layer as they are now, on the CPU, by their names in an adapter's file."""
    return {
        name.replace(".default.", "."): parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in model.named_parameters()
        if (".lora_A.default." in name or ".lora_B.default." in name) and not parameter.is_meta
    }


def convert_to_lora(folder: Path, start: dict[str, Tensor]) -> None:
    """Turn a saved PiSSA adapter into a LoRA of twice the rank that is valid on the original model.

    W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]: the base loses nothing, and the scale s stays as it is. The adapter as
    it trains goes to trainer_state/adapter where the folder has a trainer_state.

    Args:
        folder: What `save_weights` wrote.
        start: What `start_of` gave before training.
    """
    tensors = load_file(folder / WEIGHTS)
    values = json.loads((folder / CONFIG).read_text())
    if (folder / "trainer_state").is_dir():
        own = folder / "trainer_state" / TRAINABLE_ADAPTER
        own.mkdir(exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            (folder / name).rename(own / name)
    for name, began in start.items():
        sign, axis = (1, 0) if name.endswith(A) else (-1, 1)
        tensors[name] = torch.cat([tensors[name].float(), sign * began], dim=axis).contiguous()
    growth = math.sqrt(2) if values["use_rslora"] else 2  # rsLoRA divides alpha by the root of the rank
    values |= {"r": 2 * values["r"], "lora_alpha": growth * values["lora_alpha"], "init_lora_weights": True}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def converted_shape(name: str, shape: torch.Size) -> torch.Size:
    """The shape that a trained A or B has in a converted adapter."""
    return torch.Size((2 * shape[0], shape[1]) if name.endswith(A) else (shape[0], 2 * shape[1]))


def trained_part(backbone: Backbone, path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter as it trains, out of a converted one; the model's weights lose what that one began with.

    On the machine that wrote it they have lost the same already, bit by bit. Elsewhere the decomposition may round
    otherwise: then they are given back what they lost here, and lose what they lost there.

    Args:
        backbone: A PiSSA model; where it is sharded, each rank has its rows.
        path: The file, for errors.
        tensors: What it holds.

    Raises:
        InputError: It holds no converted adapter of this rank.
    """
    found, began = dict(tensors), {}
    for name, here in backbone.start.items():
        axis = 0 if name.endswith(A) else 1
        size = here.shape[axis]
        if name not in tensors or tensors[name].shape[axis] != 2 * size:
            got = tuple(tensors[name].shape) if name in tensors else "none"
            raise InputError(
                f"{path}: {name} must have twice the rank {size} of this PiSSA adapter, got {got}. "
                "Use the run's own tuning."
            )
        trained, then = tensors[name].split(size, dim=axis)
        found[name], began[name] = trained.contiguous(), (then if axis == 0 else -then).contiguous()
    own = path.parent / "trainer_state" / TRAINABLE_ADAPTER / WEIGHTS
    if own.is_file():
        found |= load_file(own)
    if any(not torch.equal(began[name], here) for name, here in backbone.start.items()):
        _rebase(backbone, began)
        backbone.start = began
    return found


@torch.no_grad()
def _rebase(backbone: Backbone, began: dict[str, Tensor]) -> None:
    modules = dict(backbone.model.named_modules())
    for name in (name for name in began if name.endswith(A)):
        layer: Any = modules[name.removesuffix(A)]
        other = name.removesuffix(A) + B
        change = backbone.start[other].double() @ backbone.start[name].double()
        change -= began[other].double() @ began[name].double()
        change = layer.scaling["default"] * (change.T if layer.fan_in_fan_out else change)
        weight: Tensor = layer.get_base_layer().weight
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        part = change[own_box(weight)] if isinstance(weight, DTensor) else change
        local.copy_((local.double() + part.to(local.device)).to(local.dtype))
