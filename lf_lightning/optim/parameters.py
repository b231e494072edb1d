"""Parameters that train, with what an optimizer wants to know of each, and the groups that they form."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.optim import Optimizer

Role = Literal["linear", "embedding", "head", "vector", "other"]
"""What a parameter is: the weight of a linear layer, an embedding, of the output layer or a value head, a vector
(biases, norms), or anything else, such as experts fused into one tensor."""

QUERIES_AND_KEYS = frozenset({"q_proj", "k_proj", "query", "key", "wq", "wk"})
"""Names of layers whose rows are those of attention heads, one head after the other."""


class Trained(NamedTuple):
    """A parameter that trains."""

    name: str
    parameter: nn.Parameter
    role: Role
    block: int | None = None
    """Number of the decoder block that it lies in."""
    head_rows: int | None = None
    """Rows of an attention head, for the weights of queries and keys."""

    @property
    def is_decayed(self) -> bool:
        """Whether weight decay applies: to all but biases and norms (RMSNorm's too), which have one dimension."""
        return self.parameter.ndim > 1

    @property
    def module(self) -> str:
        """Dotted name of the layer that holds it."""
        return self.name.rpartition(".")[0]


def describe(
    module: nn.Module,
    *,
    heads: Collection[nn.Module] = (),
    blocks: Sequence[nn.Module] = (),
    head_size: int | None = None,
) -> list[Trained]:
    """The parameters of a module that train, in its own order; one that has several names goes by its first.

    Args:
        module: The module.
        heads: Its output layer and other heads.
        blocks: Its decoder blocks.
        head_size: Rows of an attention head.
    """
    in_heads = {id(parameter) for head in heads for parameter in head.parameters()}
    block_of = {id(parameter): index for index, block in enumerate(blocks) for parameter in block.parameters()}
    owners = {
        id(parameter): owner
        for owner in reversed(list(module.modules()))  # the first owner stays
        for parameter in owner.parameters(recurse=False)
    }
    found = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            role = _role(name, parameter, owners.get(id(parameter)), is_head=id(parameter) in in_heads)
            has_heads = bool(head_size) and parameter.shape[0] % (head_size or 1) == 0 and _has_heads(name, role)
            found.append(Trained(name, parameter, role, block_of.get(id(parameter)), head_size if has_heads else None))
    return found


def decay_groups(trained: Iterable[Trained], weight_decay: float, **options: Any) -> list[dict[str, Any]]:
    """Split parameters into those with weight decay and those without; empty groups are left out.

    Args:
        trained: The parameters.
        weight_decay: Of those that are decayed, >= 0.
        options: Further options of both groups.
    """
    known = list(trained)
    groups = [
        {"params": [each.parameter for each in known if each.is_decayed], "weight_decay": weight_decay, **options},
        {"params": [each.parameter for each in known if not each.is_decayed], "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group, as the configuration says them."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _role(name: str, parameter: nn.Parameter, owner: nn.Module | None, *, is_head: bool) -> Role:
    if parameter.ndim <= 1:
        return "vector"
    if isinstance(owner, nn.Embedding) or "lora_embedding_" in name:
        return "embedding"
    if is_head:
        return "head"
    return "linear" if isinstance(owner, nn.Linear) and parameter.ndim == 2 else "other"


def _has_heads(name: str, role: Role) -> bool:
    parts = set(name.split("."))
    return role == "linear" and bool(parts & QUERIES_AND_KEYS) and "lora_A" not in parts
