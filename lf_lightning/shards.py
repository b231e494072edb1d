"""Tensors that are cut over ranks, as FSDP2 and tensor parallelism cut them: which part is whose, and values for it.

A mesh of ranks has two dimensions. Its first is `data_parallel`, whose ranks share the rows of a tensor, and its second
`tensor_parallel`, whose ranks share a layer; or its first is `replicas`, of which each holds all, and its second
`shards`, whose ranks share the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

Box = tuple[slice, ...]
"""A part of a tensor: from where to where in each dimension."""


class Rows(Protocol):
    """A tensor, or one that lies in a file and is read by slices."""

    def __getitem__(self, part: Any) -> Tensor:
        """The part of some slices."""


def sharing_dims(mesh: DeviceMesh) -> DeviceMesh:
    """The ranks of a mesh over which FSDP2 cuts, or replicates and cuts."""
    return mesh if "replicas" in names_of(mesh) else mesh["data_parallel"]


def reading_dim(mesh: DeviceMesh) -> DeviceMesh | None:
    """The ranks of a mesh that hold a model together, row by row; None where rows are not all that is cut."""
    if "replicas" in names_of(mesh):
        return mesh["shards"]
    return mesh["data_parallel"] if tensor_dim(mesh) is None else None


def tensor_dim(mesh: DeviceMesh) -> DeviceMesh | None:
    """The ranks of a mesh that share a layer; None where each computes whole ones."""
    if "tensor_parallel" not in names_of(mesh) or mesh["tensor_parallel"].size() == 1:
        return None
    return mesh["tensor_parallel"]


def names_of(mesh: DeviceMesh) -> tuple[str, ...]:
    """The names of the dimensions of a mesh."""
    return mesh.mesh_dim_names or ()


def rows_of(num_rows: int, rank: int, num_ranks: int) -> slice:
    """The rows of a tensor that a rank holds: equal parts, of which the last may be short or empty."""
    part = -(-num_rows // num_ranks)
    start = min(rank * part, num_rows)
    return slice(start, min(start + part, num_rows))


def box_of(shape: Sequence[int], cuts: Iterable[tuple[int, int, int]]) -> Box:
    """The part of a tensor that is left after some cuts.

    Args:
        shape: Of the whole tensor.
        cuts: Dimension of the tensor, rank and number of ranks of each, in their order.
    """
    box = [slice(0, size) for size in shape]
    for dim, rank, num_ranks in cuts:
        inner = rows_of(box[dim].stop - box[dim].start, rank, num_ranks)
        box[dim] = slice(box[dim].start + inner.start, box[dim].start + inner.stop)
    return tuple(box)


def own_box(tensor: DTensor, shape: Sequence[int] | None = None) -> Box:
    """The part of a cut tensor that this rank holds; or of another tensor of that shape, cut in the same way."""
    mesh = tensor.device_mesh
    dims = reversed(range(mesh.ndim))  # tensor parallelism cuts before FSDP2 does
    cuts = [(dim, mesh.get_local_rank(at), mesh.size(at)) for at in dims if (dim := cut_dim(tensor, at)) is not None]
    return box_of(tensor.shape if shape is None else shape, cuts)


def cut_dim(tensor: DTensor, mesh_dim: int) -> int | None:
    """The dimension of a tensor that a dimension of its mesh cuts; None where that one holds copies."""
    placement: Any = tensor.placements[mesh_dim]
    return None if placement.is_replicate() else int(placement.dim) % tensor.ndim


def cut(local: Tensor, mesh: DeviceMesh, like: Tensor) -> DTensor:
    """A tensor of the shape of `like`, of which each rank of one dimension holds `local`, some rows."""
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride())


def cut_as(local: Tensor, like: DTensor, whole: Tensor | None = None) -> DTensor:
    """A tensor that is cut as `like` is, of which this rank holds `local`; of the shape of `whole` where given."""
    shape, stride = (like.shape, like.stride()) if whole is None else (whole.shape, whole.stride())
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


@torch.no_grad()
def fill(parameter: Tensor, whole: Rows) -> None:
    """Put values into a tensor: all of them, or this rank's part of one that is cut."""
    if isinstance(parameter, DTensor):
        parameter.to_local().copy_(whole[own_box(parameter)])
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
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    found: Any = tensor.detach()
    for at in range(found.device_mesh.ndim):  # the last cut of `own_box` is undone first
        placements = [*[Replicate()] * (at + 1), *found.placements[at + 1 :]]
        found = found.redistribute(placements=placements)
    local: Tensor = found.to_local()
    return local


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
