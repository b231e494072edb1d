"""Frozen weights in four or eight bits, by bitsandbytes; and folders whose weights are quantized already."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lf_lightning.models.adapters import Adapter, Tuning
from lf_lightning.shards import whole_shape
from lf_lightning.types import BackboneSpec, InputError, Quantization, torch_dtype

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig

WHERE = "model.init_args.backbone"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_quantized(spec: BackboneSpec, tuning: Tuning, *, trains: bool = True) -> None:
    """Refuse what cannot be done with quantized weights, before a model is loaded.

    Args:
        spec: Which model.
        tuning: What is put on it.
        trains: Whether anything of it will train.

    Raises:
        InputError: As said.
    """
    if spec.quantization is None:
        return
    where = f"{WHERE}.quantization"
    if trains and not isinstance(tuning, Adapter):
        raise InputError(
            f"{where}: only an adapter can train beside weights in few bits, got {type(tuning).__name__} with "
            f"{spec.quantization}. Use LoRA."
        )
    if isinstance(tuning, Adapter) and tuning.shifts_base:
        raise InputError(
            f"{where}: must be null where the adapter takes a part of the weights over, which few bits cannot hold, "
            f"got {spec.quantization} with a PiSSA start. Use init: zero."
        )
    if spec.path is None:
        raise InputError(f"{where}: must be of weights in a folder, got {spec.quantization} of random ones. Set path.")
    if spec.dtype == "float64":
        raise InputError(f"{where}: computes in float32 at most, got dtype: float64. Use float32 or bfloat16.")
    for name, given in (("merge_adapters", spec.merge_adapters), ("new_tokens", spec.added_tokens)):
        if given:
            raise InputError(
                f"{WHERE}.{name}: would change weights that are in few bits, got {given} with quantization: "
                f"{spec.quantization}. Make the changed model first, without quantization, and take its folder."
            )


def check_folder(spec: BackboneSpec, tuning: Tuning, config: PretrainedConfig, *, trains: bool, is_cut: bool) -> None:
    """Refuse to quantize a folder twice, and to train the weights of one that is quantized.

    Args:
        spec: Names the folder.
        tuning: What would train.
        config: Of the folder.
        trains: Whether anything of it will train.
        is_cut: Whether ranks will share the model.

    Raises:
        InputError: As said.
    """
    method = quantized_by(config)
    if is_cut and (method or spec.quantization):
        raise InputError(
            f"trainer.strategy: fsdp2 cannot cut weights in few bits, got {method or spec.quantization}. Use ddp."
        )
    if method is None:
        return
    if spec.quantization is not None:
        raise InputError(
            f"{WHERE}.quantization: {spec.path} is quantized already ({method}), got {spec.quantization}. Remove it."
        )
    if trains and (not isinstance(tuning, Adapter) or tuning.shifts_base):
        raise InputError(
            f"{WHERE}.path: only an adapter can train beside weights in few bits, got {spec.path} ({method}) with "
            f"{type(tuning).__name__}. Use LoRA with init: zero."
        )


def quantized_by(config: PretrainedConfig) -> str | None:
    """By which method the weights of a folder are quantized; None where they are not."""
    found: Any = config.to_dict().get("quantization_config")
    return None if found is None else str(found.get("quant_method", "unknown"))


def bits_config(kind: Quantization, *, double: bool, compute: torch.dtype) -> BitsAndBytesConfig:
    """What transformers' loader is told.

    Args:
        kind: `nf4`, `fp4` or `int8`.
        double: Whether the scales of 4-bit blocks are quantized too.
        compute: Type of the products with 4-bit weights.
    """
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=compute,
    )


def loader_options(
    kind: Quantization | None, *, double: bool, dtype: str, config: PretrainedConfig, device: torch.device | None
) -> dict[str, Any]:
    """Options of `from_pretrained` that quantize while loading; none where nothing is to be quantized.

    Args:
        kind: As of `bits_config`.
        double: The same.
        dtype: As the spec says it.
        config: Of the folder.
        device: Where the weights are quantized and stay; None for the CPU.
    """
    if kind is None:
        return {}
    named = config.dtype if dtype == "auto" else torch_dtype(dtype)
    compute = named if named in FLOATS else torch.float32
    options: dict[str, Any] = {"quantization_config": bits_config(kind, double=double, compute=compute)}
    return options | ({} if device is None else {"device_map": {"": device}})


def size_of(parameter: nn.Parameter) -> int:
    """Numbers that a parameter stands for: a byte of 4-bit weights stands for two."""
    state: Any = vars(parameter).get("quant_state")
    return whole_shape(parameter).numel() if state is None else math.prod(state.shape)
