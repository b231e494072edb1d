"""Tensors that are cut over ranks, row by row as FSDP2 cuts them: which rows are whose, and values put into them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


class Rows(Protocol):
    """A tensor, or one that lies in a file and is read by slices."""

    def __getitem__(self, rows: Any) -> Tensor:
        """The rows of a slice."""


def rows_of(num_rows: int, rank: int, num_ranks: int) -> slice:
    """The rows of a tensor that a rank holds: equal parts, of which the last may be short or empty."""
    part = -(-num_rows // num_ranks)
    start = min(rank * part, num_rows)
    return slice(start, min(start + part, num_rows))


def own_rows(tensor: DTensor) -> slice:
    """The rows of a cut tensor that this rank holds."""
    mesh = tensor.device_mesh
    return rows_of(tensor.shape[0], mesh.get_local_rank(), mesh.size())


def cut(local: Tensor, mesh: DeviceMesh, like: Tensor) -> DTensor:
    """A tensor of the shape of `like`, of which this rank holds `local`."""
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride())


@torch.no_grad()
def fill(parameter: Tensor, whole: Rows) -> None:
    """Put values into a tensor: all of them, or this rank's rows of one that is cut."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(whole[own_rows(parameter)])
    else:
        parameter.copy_(whole[:] if parameter.ndim else whole[...])


@torch.no_grad()
def fill_from(parameter: Tensor, other: Tensor) -> None:
    """Put the values of a tensor into another that is cut as it is, or whole as it is."""
    if isinstance(parameter, DTensor) and isinstance(other, DTensor):
        parameter.to_local().copy_(other.to_local())
    else:
        fill(parameter, other)


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor without gradient; of one that is cut, every rank must ask."""
    if is_partitioned(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def is_cut(tensor: Tensor) -> bool:
    """Whether this rank holds a part of a tensor only."""
    return isinstance(tensor, DTensor) or is_partitioned(tensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether a parameter is cut by ZeRO-3, which leaves it without entries and keeps its own facts beside it."""
    return "ds_tensor" in vars(tensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, without gradient: all of it, its rows, or its part of a long vector."""
    if is_partitioned(tensor):
        part: Tensor = vars(tensor)["ds_tensor"]
        return part.detach()
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape of a tensor as if it were not cut."""
    return torch.Size(vars(tensor).get("ds_shape", tensor.shape))


def without_storage(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros of the shape of a tensor, on the CPU, which are all one number in memory."""
    return torch.zeros((), dtype=dtype or like.dtype).expand(like.shape)


def has_storage(tensor: Tensor) -> bool:
    """Whether every entry of a tensor has memory of its own."""
    return tensor.untyped_storage().nbytes() >= tensor.nbytes


def replace_parameters(model: nn.Module, new: dict[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the place of some, wherever they are used."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in new:
                setattr(module, name, new[parameter])
