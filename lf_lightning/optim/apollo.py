"""APOLLO: full gradients, scaled by what Adam does in a random space of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lf_lightning.optim.exact import ExactOptimizer, adam_direction, drawn
from lf_lightning.optim.low_rank import (
    bases_of,
    low_rank_groups,
    low_rank_rules,
    projected,
    random_bases,
    singular_bases,
)
from lf_lightning.optim.parameters import Trained
from lf_lightning.optim.several import LayerwiseOptimizer
from lf_lightning.optim.spec import OptimizerSpec, adam_rules, check_options, targeted

LARGEST_GROWTH = 1.01
"""Of the norm of an update over the one before (Chen et al. 2024, arXiv:2410.01623)."""


@dataclass(frozen=True)
class APOLLO(OptimizerSpec):
    """Gradients of linear layers, scaled channel by channel (Zhu et al. 2024, arXiv:2412.05270), for Full and Freeze.

    update = sqrt(scale) limited(s g),  s = |m_hat / (sqrt(v_hat) + eps)| / |P g|,  m, v the moments of P g

    Everything else gets AdamW. Our own: the licence of apollo-torch 1.0.3 forbids commercial use, and pytorch-optimizer
    4.1 updates in the projected space.

    Args:
        lr: Largest learning rate of the schedule, > 0.
        rank: Rank of the space, > 0; 1 with `scale_type: tensor` is APOLLO-Mini.
        interval: Steps between two projections, > 0.
        scale: Square of the factor of an update, > 0; larger for smaller ranks.
        scale_type: Whether s is one number for each `channel` of the longer side or for the whole `tensor`.
        scale_front: Apply the factor before the limit on the growth of the norm instead of after it.
        projection: `random` draws P, `svd` takes leading singular vectors of the gradient.
        projection_side: `std` projects the shorter side of a matrix, `left` its rows, `right` its columns.
        target: `all` linear layers but the heads, or a list of names such as [q_proj, mlp.up_proj].
        betas: Decay of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: As in AdamW, >= 0; never of biases and norms.
        layerwise: As in AdamW.
    """

    tunings: ClassVar[tuple[str, ...]] = ("Full", "Freeze")

    lr: float = 5e-5
    rank: int = 16
    interval: int = 200
    scale: float = 32.0
    scale_type: Literal["channel", "tensor"] = "channel"
    scale_front: bool = False
    projection: Literal["random", "svd"] = "random"
    projection_side: Literal["std", "left", "right"] = "std"
    target: str | list[str] = "all"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    layerwise: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_options(
            self,
            **low_rank_rules(self.rank, self.interval, self.scale, self.target),
            **adam_rules(self.lr, self.betas, self.eps, self.weight_decay),
        )

    @property
    def is_layerwise(self) -> bool:
        """As the option says."""
        return self.layerwise

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> Optimizer:
        """Groups of the projected matrices, and of the rest, decayed and not."""
        low = {id(each.parameter) for each in targeted(trained, self.target)}
        seeds = {id(each.parameter): seed + number for number, each in enumerate(trained)}
        if self.layerwise:
            return LayerwiseOptimizer([self._build([each], low, seeds) for each in trained])
        return self._build(trained, low, seeds)

    def _build(self, trained: Sequence[Trained], low: set[int], seeds: dict[int, int]) -> Optimizer:
        groups = low_rank_groups(trained, low, self.weight_decay)
        return ApolloOptimizer(groups, spec=self, seeds={each.parameter: seeds[id(each.parameter)] for each in trained})


class ApolloOptimizer(ExactOptimizer):
    """The step of APOLLO.

    Args:
        groups: Parameter groups; those with `is_projected` hold matrices that are projected.
        spec: The constants.
        seeds: Of the projections of each parameter.
    """

    def __init__(self, groups: list[dict[str, Any]], *, spec: APOLLO, seeds: dict[nn.Parameter, int]) -> None:
        super().__init__(groups, {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps, "is_projected": False})
        self.spec, self._seeds = spec, seeds

    def update(self) -> None:
        """Make a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["is_projected"]:
                    direction = self._scaled(parameter, parameter.grad, group)
                else:
                    state = self.state[parameter]
                    direction = adam_direction(state, parameter.grad, betas=group["betas"], eps=group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _scaled(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """The update of a projected matrix, without its learning rate."""
        state = self.state[parameter]
        low = projected(gradient, self._bases(parameter, gradient))
        direction = adam_direction(state, low, betas=group["betas"], eps=group["eps"])
        if self.spec.scale_type == "tensor":
            factor = direction.norm() / (low.norm() + 1e-8)
        else:  # of each row or column of the longer side, which is not projected in `std`
            dim = 0 if gradient.shape[0] < gradient.shape[1] else 1
            dim = dim if low.shape[1 - dim] == gradient.shape[1 - dim] else 1 - dim
            factor = direction.norm(dim=dim, keepdim=True) / (low.norm(dim=dim, keepdim=True) + 1e-8)
        front = self.spec.scale**0.5 if self.spec.scale_front else 1.0
        update = _limited(gradient * factor * front, state)
        return update if self.spec.scale_front else update * self.spec.scale**0.5

    def _bases(self, parameter: nn.Parameter, gradient: Tensor) -> dict[str, Tensor]:
        """The projection of this step: drawn anew every `interval` steps, from the seed of the parameter."""
        state = self.state[parameter]
        number, is_due = divmod(state.get("step", 0), self.spec.interval)
        if is_due and bases_of(state):
            return bases_of(state)
        side, rank = self.spec.projection_side, self.spec.rank
        if self.spec.projection == "svd":
            bases = singular_bases(gradient, side, rank)
        else:
            bases = random_bases(gradient, side, rank, drawn(gradient.device, self._seeds[parameter], number))
        state.update(bases)
        return bases


def _limited(update: Tensor, state: dict[str, Any]) -> Tensor:
    """An update whose norm grows by `LARGEST_GROWTH` at most from one step to the next."""
    norm = torch.linalg.vector_norm(update)
    if "norm" in state:
        limiter = (norm / (state["norm"] + 1e-8)).clamp(min=LARGEST_GROWTH) / LARGEST_GROWTH
        update, norm = update / limiter, norm / limiter
    state["norm"] = norm
    return update
