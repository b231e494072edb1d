"""Tensor parallelism: ranks that compute each layer together, as transformers' plan of a family says.

Heads of attention and columns of the MLP are cut over the ranks of a group. All else (norms, embedding, output layer)
is whole on each of them, so that they see the same hidden states and the loss needs no exchange.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lf_lightning.shards import replace_parameters
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WHERE = "trainer.strategy.init_args.tensor_parallel"
LINEAR: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
PARTIAL_GRADIENT = "replicated_with_grad_allreduce"
"""Of a norm over each head: a rank sees its own heads, so that the gradients of all ranks belong together."""


def check_plan(config: PretrainedConfig, num_ranks: int) -> None:
    """Refuse a model that so many ranks cannot compute together, before its weights are read.

    Raises:
        InputError: transformers has no plan for the family, or one that is not known here; or heads cannot be shared.
    """
    text = config.get_text_config()
    plan: dict[str, str] = text.base_model_tp_plan or {}
    if not plan:
        raise InputError(
            f"{WHERE}: needs a family with a plan in transformers, got {text.model_type}, which has none. Leave it out."
        )
    unknown = sorted(set(plan.values()) - {*LINEAR, PARTIAL_GRADIENT})
    if unknown:
        raise InputError(
            f"{WHERE}: cuts linear layers by columns and rows only, got {text.model_type}, whose plan asks for "
            f"{unknown[0]}. Leave it out."
        )
    values = text.to_dict()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = values.get(name)
        if size is not None and size % num_ranks:
            raise InputError(f"{WHERE}: must divide the model's {name}, {size}, got {num_ranks}. Use another number.")


def split(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cut a model that is whole on every rank over the ranks of a mesh, in place; `check_plan` has seen it.

    Every parameter becomes one of the mesh, so that optimizers and norms of gradients see tensors of one kind.

    Args:
        model: On the CPU, or where it computes.
        mesh: One dimension: the ranks that compute each layer together.
    """
    check_plan(model.config, mesh.size())
    prefix = next(name for name, module in model.named_modules() if module is model.base_model)
    plan: dict[str, str] = model.config.get_text_config().base_model_tp_plan or {}
    styles = {f"{prefix}.{name}".lstrip("."): style for name, style in plan.items()}
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in list(model.named_modules()):
        style = styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style in LINEAR:
            parallelize_module(module, mesh, LINEAR[style](), src_data_rank=None)
            continue
        own = dict(module.named_parameters(recurse=False))
        whole |= {each: _on_every_rank(each, mesh) for each in own.values() if each not in whole}
        if own:
            local = Local(tuple(own), Partial() if style == PARTIAL_GRADIENT else Replicate())
            module.register_forward_pre_hook(local.take)
            module.register_forward_hook(local.put_back, always_call=True)
    replace_parameters(model, whole)


class Local:
    """Lets a module compute with plain tensors where its parameters are whole on every rank of a mesh.

    Args:
        names: Of the parameters.
        gradient: What the gradient of one rank is of that of all.
    """

    def __init__(self, names: tuple[str, ...], gradient: Placement) -> None:
        self._names, self._gradient = names, gradient
        self._kept: dict[str, nn.Parameter] = {}

    def take(self, module: nn.Module, args: Any) -> None:
        """Before a forward: put plain tensors in the place of the parameters."""
        for name in self._names:
            parameter: Any = module.get_parameter(name)
            self._kept[name] = parameter
            delattr(module, name)
            local = parameter.to_local(grad_placements=[self._gradient])
            setattr(module, name, local.view_as(local))  # torch 2.13 calls what `to_local` gives a parameter too

    def put_back(self, module: nn.Module, args: Any, output: Any) -> None:
        """After a forward, also one that failed."""
        for name, parameter in self._kept.items():
            delattr(module, name)
            module.register_parameter(name, parameter)
        self._kept = {}


def local_weight(weight: Tensor) -> Tensor:
    """What this rank computes with, of a weight that is whole on every rank of its mesh; any other as it is."""
    if isinstance(weight, DTensor) and all(placement.is_replicate() for placement in weight.placements):
        local: Tensor = weight.to_local()
        return local
    return weight


def _on_every_rank(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    placed = distribute_tensor(parameter.detach(), mesh, [Replicate()], src_data_rank=None)
    return nn.Parameter(placed, requires_grad=parameter.requires_grad)
