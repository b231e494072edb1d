"""FSDP2: parameters cut over ranks, block by block; and the norm of gradients that may be cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lf_lightning.models.adapters import decoder_blocks, is_tied
from lf_lightning.models.backbone import Backbone
from lf_lightning.models.parts import put_parts
from lf_lightning.models.tensor_parallel import split
from lf_lightning.shards import cut_dim, names_of, replace_parameters, sharing_dims, tensor_dim
from lf_lightning.types import IGNORE, Document, InputError, TokenBatch


def shard(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shard every block, and the rest with the root, over the ranks of a mesh that do not share layers.

    What trains beside frozen weights, and a value head, form groups of their own, since a group holds one dtype. The
    kernel runs inside the root's forward, where the output layer is whole. A model that was read in parts gets its
    rows. Where a mesh has replicas, gradients are added up over these too.
    """
    from torch.distributed.fsdp import fully_shard

    ranks, together = sharing_dims(mesh), tensor_dim(mesh)
    if together is not None:
        split(backbone.causal_lm, together)
    parts = {name: backbone.parts[each] for name, each in backbone.named_parameters() if each in backbone.parts}
    meta = {
        each: nn.Parameter(
            torch.empty_like(each, device="meta", memory_format=torch.contiguous_format), each.requires_grad
        )
        for each in backbone.parts
    }
    replace_parameters(backbone, meta)
    backbone.parts = {}
    _check_adapters(backbone)
    blocks = decoder_blocks(backbone.causal_lm)
    for block in blocks:
        trained = _trained_parts(block)
        if trained:
            fully_shard(trained, mesh=ranks)
        fully_shard(block, mesh=ranks)
    if backbone.value_head is not None:
        fully_shard(backbone.value_head, mesh=ranks)
    for part in _parts_of_another_type(backbone, blocks):
        fully_shard(part, mesh=ranks)
    fully_shard(backbone, mesh=ranks)
    put_parts(backbone, parts)


def _trained_parts(block: nn.Module) -> list[nn.Module]:
    """The modules of a block that train, where others do not: adapters, or a part of its own weights."""
    if all(parameter.requires_grad for parameter in block.parameters()):
        return []
    return [
        module
        for module in block.modules()
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]


def _parts_of_another_type(backbone: Backbone, blocks: nn.ModuleList) -> list[nn.Module]:
    """The modules outside of all blocks that are float32 in a half-precision model.

    Raises:
        InputError: The output layer is one of them, which the kernel reads outside of its own forward.
    """
    taken = {id(module) for module in blocks.modules()}
    taken |= {id(module) for module in backbone.value_head.modules()} if backbone.value_head is not None else set()
    rest = [module for module in backbone.modules() if id(module) not in taken]
    own = [(module, [*module.parameters(recurse=False)]) for module in rest]
    types = {parameter.dtype for _, parameters in own for parameter in parameters}
    if len(types) < 2:
        return []
    parts = [module for module, parameters in own if any(each.requires_grad for each in parameters)]
    head = backbone.output_layer.weight
    if any(parameter is head for part in parts for parameter in part.parameters(recurse=False)):
        raise InputError(
            "trainer.strategy: fsdp2 needs an output layer of the type of the model around it, got a trained one in "
            "float32. Set model.init_args.backbone.dtype: float32, or do not train it."
        )
    return parts


def _check_adapters(backbone: Backbone) -> None:
    """Refuse what peft reads outside of its own forward: adapters on tensors of fused experts, and tied copies.

    Raises:
        InputError: As said.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import ModulesToSaveWrapper

    head = backbone.causal_lm.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper) and is_tied(backbone.causal_lm):
        raise InputError(
            "trainer.strategy: fsdp2 cannot cut a trained copy of embedding and output layer that are tied, got one. "
            "Use ddp, or Full tuning."
        )
    if any(isinstance(module, ParamWrapper) for module in backbone.modules()):
        raise InputError(
            "trainer.strategy: fsdp2 cannot cut an adapter on fused experts, got one. Use ddp, or name the layers "
            "without experts in model.init_args.tuning.init_args.target."
        )


def cut_again(backbone: Backbone) -> None:
    """Let go of what the last forward left whole: the root's parameters, then plain copies of the real ones."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(backbone, FSDPModule):
        backbone.reshard()


def check_sharded(backbone: Backbone) -> None:
    """Make sure that the gradient of everything that trains is reduced: what is added after `shard` drifts apart.

    Raises:
        InputError: A parameter trains and is not cut over the ranks.
    """
    cut_again(backbone)
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise InputError(
                f"trainer.strategy: fsdp2 must cut every parameter that trains, got {name} whole. "
                "Add parameters in extend_backbone, before the model is sharded."
            )


@contextmanager
def whole(backbone: Backbone) -> Iterator[None]:
    """All weights of a sharded backbone whole on every rank for a while, so that its parts run without collectives.

    Every rank must enter and leave. Nothing happens where the backbone is not sharded.

    Raises:
        InputError: Ranks compute each layer together, so that no part of it runs without collectives.
    """
    from torch.distributed.fsdp import FSDPModule

    if any(
        isinstance(each, DTensor) and "tensor_parallel" in names_of(each.device_mesh) for each in backbone.parameters()
    ):
        raise InputError(
            "trainer.strategy.init_args.tensor_parallel: must be 1 where answers are generated, got more. "
            "Remove the callback that generates, or leave tensor_parallel out."
        )
    groups = [module for module in backbone.modules() if isinstance(module, FSDPModule)]
    if not isinstance(backbone, FSDPModule):
        yield
        return
    backbone.set_reshard_after_forward(False)
    try:
        with torch.no_grad():  # the root's own forward makes FSDP ready, and gathers group after group
            backbone(_filler(backbone), kernel=lambda hidden, output_layer, targets: hidden)
        for group in groups:
            group.unshard()
        yield
    finally:
        backbone.set_reshard_after_forward(True)
        backbone.set_reshard_after_forward(False, recurse=False)  # the root's are needed again at once
        # also forgets in which order blocks ran: a backward would gather by it, on each rank what that rank ran last
        backbone.reset_iter_state()


def _filler(backbone: Backbone) -> TokenBatch:
    """One row of two tokens."""
    device = next(backbone.parameters()).device
    ids, positions = torch.zeros((1, 2), dtype=torch.int64, device=device), torch.arange(2, device=device)[None]
    free = backbone.is_padding_free
    return TokenBatch(
        ids, torch.full_like(ids, IGNORE), positions, (Document(2),) if free else None, num_units=0, num_tokens=0
    )


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients so that their global norm over the whole mesh is at most `max_norm`.

    Returns:
        The norm before clipping; scalar. Zero where nothing has a gradient.
    """
    trained = [parameter for parameter in parameters if parameter.grad is not None]
    if not trained:
        return torch.zeros(())
    groups: dict[Any, list[Tensor]] = {}  # of what is cut alike
    for parameter in trained:
        grad = parameter.grad
        assert grad is not None, "those without one are left out above"
        groups.setdefault(grad.placements if isinstance(grad, DTensor) else None, []).append(grad)
    norms = [_norm_of(group) for group in groups.values()]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def _norm_of(gradients: list[Tensor]) -> Tensor:
    """Norm of gradients that are cut alike, or not at all; the same bits on every rank."""
    first = gradients[0]
    if not isinstance(first, DTensor):
        return get_total_norm(gradients)
    mesh, together = first.device_mesh, tensor_dim(first.device_mesh)
    square = get_total_norm([each.to_local() for each in gradients if isinstance(each, DTensor)]).square()
    for at in reversed(range(mesh.ndim)):
        if cut_dim(first, at) is not None:
            torch.distributed.all_reduce(square, group=mesh.get_group(at))
    if together is not None:  # whose ranks have added up over other ranks each, perhaps in another order
        torch.distributed.broadcast(square, group_src=0, group=together.get_group())
    return square.sqrt()
