"""What an optimizer remembers of parameters that are cut over ranks: each rank writes its rows, anyone reads any rows.

In trainer_state/ lies one safetensors file for each rank that wrote; `state.ckpt` holds what is not cut (steps, options
of the groups) and the shapes. So saving gathers nothing, and the same checkpoint continues on any number of ranks, cut
or not. Parameters go by their number in the optimizer, as torch's own `state_dict` has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lf_lightning.shards import cut, own_rows, rows_of
from lf_lightning.types import InputError

State = dict[str, Any]
"""Of `Optimizer.state_dict`, with `cut` (parameter -> name -> shape) and `num_files` where rows lie in files."""


def save_rows(states: list[State], folder: Path) -> list[State]:
    """Write this rank's rows of what is cut; every rank must call.

    Args:
        states: Of each optimizer.
        folder: An existing folder that all ranks see.

    Returns:
        The states without what was written, for one rank to write.
    """
    tensors: dict[str, Tensor] = {}
    rank, num_files = 0, 0
    light: list[State] = []
    for index, state in enumerate(states):
        kept: dict[int, dict[str, Any]] = {}
        shapes: dict[int, dict[str, list[int]]] = {}
        for number, values in state["state"].items():
            kept[number], shapes[number] = {}, {}
            for name, value in values.items():
                if not isinstance(value, DTensor):
                    kept[number][name] = value
                    continue
                rank, num_files = value.device_mesh.get_local_rank(), value.device_mesh.size()
                shapes[number][name] = list(value.shape)
                assert value.placements == (Shard(0),), "FSDP2 cuts rows"
                if value.to_local().numel():
                    tensors[_key(index, number, name)] = value.to_local().cpu().contiguous()
        light.append({**state, "state": kept, "cut": shapes, "num_files": num_files})
    if num_files:
        save_file(tensors, folder / _file(rank, num_files))
    return light


def whole_states(states: list[State], folder: Path) -> list[State]:
    """The states with every tensor whole, for optimizers whose parameters are not cut.

    Raises:
        InputError: A file of the checkpoint is missing or broken.
    """
    found = []
    for index, state in enumerate(states):
        values = {number: whole_values(state, number, folder, index=index) for number in state["state"]}
        found.append({"state": values, "param_groups": state["param_groups"]})
    return found


def whole_values(state: State, number: int, folder: Path, *, index: int = 0) -> dict[str, Any]:
    """What a state holds of one parameter, every tensor whole.

    Args:
        state: As `save_rows` gave it, or as an optimizer of whole parameters did.
        number: Of the parameter.
        folder: Where `save_rows` wrote.
        index: Of the optimizer.

    Raises:
        InputError: A file of the checkpoint is missing or broken.
    """
    values = dict(state["state"].get(number, {}))
    for name, shape in state.get("cut", {}).get(number, {}).items():
        values[name] = _read(folder, _key(index, number, name), slice(0, shape[0]), shape, state["num_files"])
    return values


def load_rows(optimizers: Iterable[torch.optim.Optimizer], states: list[State], folder: Path) -> None:
    """Give optimizers of parameters that are cut their states, of which this rank reads its rows alone.

    Args:
        optimizers: As many as there are states.
        states: As `save_rows` gave them, or as optimizers of whole parameters did.
        folder: Where `save_rows` wrote.

    Raises:
        InputError: A file of the checkpoint is missing or broken.
    """
    for index, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        values: dict[int, dict[str, Any]] = {}
        for number, kept in state["state"].items():
            like = parameters[number]
            values[number] = {name: _own_part(like, value) for name, value in kept.items()}
            for name, shape in state.get("cut", {}).get(number, {}).items():
                rows = own_rows(like) if isinstance(like, DTensor) else slice(0, shape[0])
                local = _read(folder, _key(index, number, name), rows, shape, state["num_files"]).to(like.device)
                values[number][name] = cut(local, like.device_mesh, like) if isinstance(like, DTensor) else local
        optimizer.load_state_dict({"state": values, "param_groups": state["param_groups"]})


def _own_part(like: Tensor, value: Any) -> Any:
    """Of a whole tensor of the shape of a parameter that is cut, this rank's rows; anything else as it is."""
    if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
        return cut(value[own_rows(like)].clone().to(like.device), like.device_mesh, like)
    return value


def _read(folder: Path, key: str, rows: slice, shape: list[int], num_files: int) -> Tensor:
    """Some rows of a tensor of this shape, from the files that hold them."""
    parts = []
    for rank in range(num_files):
        there = rows_of(shape[0], rank, num_files)
        low, high = max(there.start, rows.start), min(there.stop, rows.stop)
        if low >= high:
            continue
        path = folder / _file(rank, num_files)
        try:
            with safe_open(path, "pt") as handle:
                parts.append(handle.get_slice(key)[low - there.start : high - there.start])
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: must hold {key}, got {error}. Give another checkpoint.") from error
    return torch.cat(parts) if parts else torch.zeros([0, *shape[1:]])


def _key(index: int, number: int, name: str) -> str:
    return f"{index}.{number}.{name}"


def _file(rank: int, num_files: int) -> str:
    return f"optimizer-{rank + 1:05d}-of-{num_files:05d}.safetensors"
