"""Casts around float32 modules in a half-precision model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn


def cast_around(first: nn.Module, last: nn.Module, dtype: torch.dtype) -> None:
    """Let what goes into `first` be float32, and what `last` gives be of another type; they may be one module."""
    first.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    last.register_forward_hook(partial(_cast_output, dtype=dtype))


def cast_around_copies(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast around the copies of modules that peft trains whole."""
    from peft.utils import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            for copy in module.modules_to_save.values():
                if any(parameter.requires_grad for parameter in copy.parameters()):
                    cast_around(copy, copy, dtype)


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    cast = [_to(value, torch.float32) for value in args]
    return tuple(cast), {name: _to(value, torch.float32) for name, value in kwargs.items()}


def _cast_output(module: nn.Module, args: tuple[Any, ...], output: Any, *, dtype: torch.dtype) -> Any:
    if isinstance(output, tuple):
        return (_to(output[0], dtype), *output[1:])
    return _to(output, dtype)


def _to(value: Any, dtype: torch.dtype) -> Any:
    if type(value) is tuple:  # rotary cosines and sines; a named tuple is no pair of tensors
        return tuple(_to(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
