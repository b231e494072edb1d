"""What an optimizer remembers of parameters that are cut over ranks: each rank writes its part, anyone reads any part.

In trainer_state/ lies one safetensors file for each rank that wrote; `state.ckpt` holds what is not cut (steps, options
of the groups) and the shapes. So saving gathers nothing, and the same checkpoint continues on any number of ranks, cut
or not. Of replicas the first alone writes. Parameters go by their number in the optimizer, as torch's own `state_dict`
has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lf_lightning.shards import Box, box_of, cut_as, cut_dim, names_of, own_box
from lf_lightning.types import InputError

State = dict[str, Any]
"""Of `Optimizer.state_dict`, with entries that say what lies in files.

`cut`: parameter -> name -> shape. `split`: parameter -> the dimension that is cut before rows are. `num_files` and
`num_splits`: into how many parts rows and that dimension are cut; a file holds one part of each.
"""


class Place(NamedTuple):
    """Which file is this rank's."""

    part: int  # of the rows
    num_parts: int
    split: int  # of the dimension that is cut first
    num_splits: int
    writes: bool  # whether no other rank has the same

    @classmethod
    def on(cls, mesh: DeviceMesh) -> Place:
        """The place of this rank on a mesh."""
        if "replicas" in names_of(mesh):
            return cls(mesh.get_local_rank(1), mesh.size(1), 0, 1, writes=mesh.get_local_rank(0) == 0)
        if mesh.ndim == 1:
            return cls(mesh.get_local_rank(), mesh.size(), 0, 1, writes=True)
        return cls(mesh.get_local_rank(0), mesh.size(0), mesh.get_local_rank(1), mesh.size(1), writes=True)


def save_rows(states: list[State], folder: Path) -> list[State]:
    """Write this rank's rows of what is cut; every rank must call.

    Args:
        states: Of each optimizer.
        folder: An existing folder that all ranks see.

    Returns:
        The states without what was written, for one rank to write.
    """
    tensors: dict[str, Tensor] = {}
    place: Place | None = None
    light: list[State] = []
    for index, state in enumerate(states):
        kept: dict[int, dict[str, Any]] = {}
        shapes: dict[int, dict[str, list[int]]] = {}
        splits: dict[int, int] = {}
        for number, values in state["state"].items():
            kept[number], shapes[number] = {}, {}
            for name, value in values.items():
                if not isinstance(value, DTensor):
                    kept[number][name] = value
                    continue
                place, shapes[number][name] = Place.on(value.device_mesh), list(value.shape)
                dim = cut_dim(value, 1) if place.num_splits > 1 else None
                splits |= {} if dim is None else {number: dim}
                if value.to_local().numel() and (dim is not None or place.split == 0):
                    tensors[_key(index, number, name)] = value.to_local().cpu().contiguous()
        light.append({**state, "state": kept, "cut": shapes, "split": splits})
    if place is not None and place.writes:
        save_file(tensors, folder / _file(place.part * place.num_splits + place.split, _num_files(place)))
    parts = {"num_files": place.num_parts if place else 0, "num_splits": place.num_splits if place else 1}
    return [{**state, **parts} for state in light]


def _num_files(place: Place) -> int:
    return place.num_parts * place.num_splits


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
        values[name] = _read(folder, state, (index, number, name), box_of(shape, ()))
    return values


def load_rows(optimizers: Iterable[torch.optim.Optimizer], states: list[State], folder: Path) -> None:
    """Give optimizers of parameters that are cut their states, of which this rank reads its part alone.

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
                box = own_box(like, shape) if isinstance(like, DTensor) else box_of(shape, ())
                local = _read(folder, state, (index, number, name), box).to(like.device)
                values[number][name] = cut_as(local, like) if isinstance(like, DTensor) else local
        optimizer.load_state_dict({"state": values, "param_groups": state["param_groups"]})


def _own_part(like: Tensor, value: Any) -> Any:
    """Of a whole tensor of the shape of a parameter that is cut, this rank's part; anything else as it is."""
    if isinstance(value, Tensor) and isinstance(like, DTensor) and value.shape == like.shape:
        return cut_as(value[own_box(like)].clone().to(like.device), like)
    return value


def _read(folder: Path, state: State, at: tuple[int, int, str], box: Box) -> Tensor:
    """A part of a tensor of an optimizer, from the files that hold parts of it.

    Args:
        folder: Where the files lie.
        state: Of that optimizer.
        at: Number of the optimizer, of the parameter in it, and name.
        box: The part.
    """
    _, number, name = at
    shape, dim = state["cut"][number][name], state.get("split", {}).get(number)
    num_parts, num_splits = state["num_files"], state.get("num_splits", 1)
    found: Tensor | None = None
    for part, split in product(range(num_parts), range(num_splits if dim is not None else 1)):
        cuts = [] if dim is None else [(dim, split, num_splits)]
        there = box_of(shape, [*cuts, (0, part, num_parts)])
        both = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(there, box, strict=True)]
        if any(each.start >= each.stop for each in both):
            continue
        path = folder / _file(part * num_splits + split, num_parts * num_splits)
        try:
            with safe_open(path, "pt") as handle:
                piece = handle.get_slice(_key(*at))[_within(both, there)]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: must hold {_key(*at)}, got {error}. Give another checkpoint.") from error
        found = piece.new_empty([each.stop - each.start for each in box]) if found is None else found
        found[_within(both, box)] = piece
    return torch.zeros([each.stop - each.start for each in box]) if found is None else found


def _within(part: Iterable[slice], box: Box) -> Box:
    """A part of a tensor, counted from the begin of a larger one that holds it."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, box, strict=True))


def _key(index: int, number: int, name: str) -> str:
    return f"{index}.{number}.{name}"


def _file(rank: int, num_files: int) -> str:
    return f"optimizer-{rank + 1:05d}-of-{num_files:05d}.safetensors"
