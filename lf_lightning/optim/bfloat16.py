"""AdamW on weights that stay in bfloat16, without losing the small steps that rounding to nearest throws away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lf_lightning.optim.exact import ExactOptimizer, adam_direction, drawn, local
from lf_lightning.shards import cut_dim

Rounding = Literal["kahan", "stochastic"]


class Bfloat16AdamW(ExactOptimizer):
    """AdamW with float32 moments over bfloat16 weights; float32 weights among them are stepped as usual.

    kahan:      w + e is the weight; e, in bfloat16 too, is what rounding w has left over, and is added back first
    stochastic: w is rounded up or down at random, so that its mean is exact

    Args:
        groups: Parameter groups of AdamW.
        rounding: What becomes of the part of a step that bfloat16 cannot hold.
        seeds: Of the stochastic rounding of each parameter, whose draw is a function of (seed, step, rank).
        defaults: Options of AdamW.

    Source: Zamirai et al. 2020, arXiv:2010.06192, algorithms 1 (stochastic) and 2 (Kahan summation).
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, rounding: Rounding, seeds: dict[nn.Parameter, int], **defaults: Any
    ) -> None:
        super().__init__(groups, defaults)
        self.rounding, self._seeds = rounding, seeds

    def update(self) -> None:
        """Make a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update_one(parameter, group)

    def _update_one(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        gradient = local(parameter.grad).float()  # type: ignore[arg-type]  # it is there
        direction = adam_direction(state, gradient, betas=group["betas"], eps=group["eps"], like=parameter)
        weight = local(parameter)
        value = weight.float()
        if self.rounding == "kahan" and weight.dtype != torch.float32:
            if "lost" not in state:
                state["lost"] = torch.zeros_like(parameter)
            value = value + local(state["lost"]).float()
        value = value * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction
        if weight.dtype == torch.float32:
            weight.copy_(value)
        elif self.rounding == "kahan":
            weight.copy_(value)
            local(state["lost"]).copy_(value - weight.float())
        else:
            part = _part(parameter)
            weight.copy_(rounded_at_random(value, drawn(value.device, self._seeds[parameter], state["step"], part)))


def _part(parameter: Tensor) -> int:
    """Number of the part that this rank holds; replicas of a part have the same, and draw the same."""
    found = 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for at in range(mesh.ndim):
            if cut_dim(parameter, at) is not None:
                found = found * mesh.size(at) + mesh.get_local_rank(at)
    return found


def rounded_at_random(value: Tensor, generator: torch.Generator) -> Tensor:
    """A bfloat16 neighbour of each float32 number, the nearer the likelier, so that the mean is the number itself."""
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, device=value.device, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
