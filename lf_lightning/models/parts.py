"""Models of which each rank reads only its own rows from the files, so that no rank ever holds a whole one.

transformers builds a model without storage, then loads it; between the two its parameters are cut here, and it then
reads of each tensor the rows of this rank, converted to its own arrangement where a family has one. Until `shard` makes
groups of them, the parameters have shape and device but no storage: adapters and heads are added as to any model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lf_lightning.shards import cut, cut_as, replace_parameters, rows_of, without_storage

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Parts = dict[nn.Parameter, Tensor]
"""A parameter without storage -> the rows of it that this rank holds, on the CPU."""


def read_parts(path: str, config: PretrainedConfig, mesh: DeviceMesh, **options: Any) -> tuple[PreTrainedModel, Any]:
    """A model whose parameters are cut over the ranks of a mesh, on the CPU, and transformers' report of its weights.

    Args:
        path: Folder or hub name.
        config: Of the model.
        mesh: One dimension: the ranks that share the model.
        options: Of `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    with torch.device("meta"):
        remote = options.get("trust_remote_code", False)
        kind: Any = type(AutoModelForCausalLM.from_config(config, trust_remote_code=remote))

    class Cut(kind):  # type: ignore[misc]  # the two hooks between building and loading, which transformers calls
        @classmethod
        def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> Any:
            """Meshes are the strategy's business."""
            return distributed_config, device_map, None

        @classmethod
        def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
            """Cut every parameter, which has no storage yet."""
            replace_parameters(model, {parameter: _cut(parameter, mesh) for parameter in model.parameters()})
            return model

    Cut.__name__, Cut.__qualname__, Cut.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    answer: Any = Cut.from_pretrained(
        path,
        config=config,
        distributed_config=DistributedConfig(),
        output_loading_info=True,
        use_safetensors=True,
        **options,
    )
    model, report = answer
    model.__class__ = kind
    del model.config.distributed_config
    return model, report


def _cut(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    rows = rows_of(parameter.shape[0], mesh.get_local_rank(), mesh.size())
    return nn.Parameter(cut(parameter.detach()[rows], mesh, parameter), requires_grad=parameter.requires_grad)


def take_parts(model: nn.Module) -> Parts:
    """Take its rows out of a model that is cut; its parameters keep shape, type and device without storage."""
    new, parts = {}, {}
    for parameter in model.parameters():
        tensor: Any = parameter.detach()
        empty = nn.Parameter(without_storage(tensor), requires_grad=parameter.requires_grad)
        new[parameter], parts[empty] = empty, tensor.to_local()
    replace_parameters(model, new)
    return parts


def put_parts(model: nn.Module, parts: dict[str, Tensor]) -> None:
    """Give the rows back to a model that FSDP2 has cut.

    Args:
        model: Its parameters of the names of `parts` are cut and on the meta device.
        parts: Name of a parameter -> this rank's rows.
    """
    new = {}
    for name, parameter in model.named_parameters():
        if name in parts:
            sharded: Any = parameter.detach()
            # a copy: on the CPU the rows are a window on the file
            local = parts.pop(name).to(sharded.device_mesh.device_type, parameter.dtype, copy=True)
            new[parameter] = nn.Parameter(cut_as(local, sharded), requires_grad=parameter.requires_grad)
    replace_parameters(model, new)
