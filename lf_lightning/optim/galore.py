"""GaLore: an optimizer of one's choice on gradients that are projected to a low rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lf_lightning.optim.exact import ExactOptimizer
from lf_lightning.optim.low_rank import (
    Side,
    bases_of,
    low_rank_groups,
    low_rank_rules,
    low_rank_shape,
    projected,
    projected_back,
    singular_bases,
)
from lf_lightning.optim.parameters import Trained
from lf_lightning.optim.several import LayerwiseOptimizer
from lf_lightning.optim.spec import OptimizerSpec, adam_rules, check_options, check_package, targeted

Base = Literal["adamw", "adafactor", "adamw_8bit"]


@dataclass(frozen=True)
class GaLore(OptimizerSpec):
    """Moments of linear layers in a space of low rank (Zhao et al. 2024, arXiv:2403.03507), for Full and Freeze.

    Every `interval` steps the leading singular vectors of a gradient become its basis. Our own: the state of
    galore-torch 1.0 holds objects, which no checkpoint of tensors can, and its 8-bit class does not fit bitsandbytes.

    Args:
        lr: Largest learning rate of the schedule, > 0.
        rank: Rank of the space, > 0.
        interval: Steps between two bases, > 0.
        scale: Factor of the update of a projected layer, > 0.
        projection: `std` projects the shorter side of a matrix, `reverse_std` the longer one, `left` its rows, `right`
            its columns, `full` both.
        target: `all` linear layers but the heads, or a list of names such as [q_proj, mlp.up_proj].
        base: Which optimizer works in that space, and on everything that is not projected.
        betas: Of adamw and adamw_8bit, each in [0, 1). Adafactor has none.
        eps: Of adamw and adamw_8bit, > 0.
        weight_decay: As in AdamW, >= 0; never of biases and norms.
        layerwise: As in AdamW.
    """

    tunings: ClassVar[tuple[str, ...]] = ("Full", "Freeze")

    lr: float = 5e-5
    rank: int = 16
    interval: int = 200
    scale: float = 2.0
    projection: Side = "std"
    target: str | list[str] = "all"
    base: Base = "adamw"
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
        if self.base == "adamw_8bit":
            check_package(self, "bitsandbytes")
        if self.base == "adafactor":
            check_options(
                self,
                betas=(self.betas == (0.9, 0.999), "left out with base: adafactor"),
                eps=(self.eps == 1e-8, "left out with base: adafactor"),
            )

    @property
    def is_layerwise(self) -> bool:
        """As the option says."""
        return self.layerwise

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> Optimizer:
        """Groups of the projected matrices, and of the rest, decayed and not."""
        low = {id(each.parameter) for each in targeted(trained, self.target)}
        if self.layerwise:
            return LayerwiseOptimizer([self._build([each], low) for each in trained])
        return self._build(trained, low)

    def _build(self, trained: Sequence[Trained], low: set[int]) -> Optimizer:
        groups = low_rank_groups(trained, low, self.weight_decay)
        return GaLoreOptimizer(groups, spec=self, inner=self._inner)

    def _inner(self, groups: list[dict[str, Any]]) -> Optimizer:
        """The optimizer of the base, on these groups."""
        adam: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        found: Optimizer
        if self.base == "adamw":
            found = torch.optim.AdamW(groups, **adam)
        elif self.base == "adafactor":
            from transformers.optimization import Adafactor

            found = Adafactor(groups, lr=self.lr, scale_parameter=False, relative_step=False)
        else:
            from bitsandbytes.optim.adamw import AdamW8bit

            found = AdamW8bit(groups, **adam)
        return found


class GaLoreOptimizer(ExactOptimizer):
    """Projects gradients, lets an inner optimizer step stand-ins of the projected size, and projects their move back.

    Args:
        groups: Parameter groups; those with `is_projected` hold matrices that are projected.
        spec: The constants.
        inner: Makes the optimizer that works on the stand-ins, and on what is not projected.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, spec: GaLore, inner: Callable[[list[dict[str, Any]]], Optimizer]
    ) -> None:
        super().__init__(groups, {"lr": spec.lr, "is_projected": False})
        self.spec = spec
        self._stand_ins: dict[nn.Parameter, nn.Parameter] = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["is_projected"] else ():
                shape = low_rank_shape(parameter.shape, spec.projection, spec.rank)
                self._stand_ins[parameter] = nn.Parameter(parameter.new_zeros(shape))
        self.inner = inner([{**self._inner_options(group), **self._inner_params(group)} for group in self.param_groups])
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            group.update({key: value for key, value in own.items() if key not in ("params", *group)})

    def update(self) -> None:
        """Make a step."""
        for group, own in zip(self.param_groups, self.inner.param_groups, strict=True):
            own.update(self._inner_options(group))
        bases = {parameter: self._project(parameter) for parameter in self._stand_ins if parameter.grad is not None}
        self.inner.step()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._take(parameter, bases.get(parameter), decay=group["lr"] * group["weight_decay"])

    def _project(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Give a stand-in its gradient, and find a new basis where one is due."""
        state, stand_in, gradient = self.state[parameter], self._stand_ins[parameter], parameter.grad
        assert gradient is not None
        bases = bases_of(state)
        if not bases or state["num_projected"] % self.spec.interval == 0:
            bases = singular_bases(gradient, self.spec.projection, self.spec.rank)
        stand_in.grad = projected(gradient, bases)
        stand_in.zero_()
        return bases

    def _take(self, parameter: nn.Parameter, bases: dict[str, Tensor] | None, *, decay: float) -> None:
        """Move a parameter as its stand-in moved, and remember what the next step needs."""
        if bases is None:
            self.state[parameter] = self.inner.state[parameter]
            return
        num_projected = self.state[parameter].get("num_projected", 0)
        stand_in = self._stand_ins[parameter]
        parameter.mul_(1 - decay).add_(projected_back(stand_in, bases), alpha=self.spec.scale)
        stand_in.grad = None
        state = self.inner.state[stand_in]
        state.update(bases, num_projected=num_projected + 1)
        self.state[parameter] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the inner optimizer what is its own: it knows which types its moments have."""
        super().load_state_dict(state_dict)
        self.inner.load_state_dict(state_dict)
        for parameter, stand_in in self._stand_ins.items():
            if parameter in self.state:
                self.inner.state[stand_in].update(bases_of(self.state[parameter]))
        for known in list(self.state):
            self.state[known] = self.inner.state[self._stand_ins.get(known, known)]  # type: ignore[call-overload]

    def _inner_params(self, group: dict[str, Any]) -> dict[str, Any]:
        return {"params": [self._stand_ins.get(parameter, parameter) for parameter in group["params"]]}

    def _inner_options(self, group: dict[str, Any]) -> dict[str, Any]:
        """The options of a group as the inner optimizer takes them; projected matrices are decayed outside of it."""
        left_out = ("params", "is_projected", "initial_lr")
        options = {key: value for key, value in group.items() if key not in left_out}
        return {**options, "weight_decay": 0.0} if group["is_projected"] else options
