"""Optimizers of our own: their state keeps its types in a checkpoint, and the arithmetic of Adam that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lf_lightning.optim.parameters import trained_parameters


class ExactOptimizer(Optimizer):
    """An optimizer whose step is `update`, and whose state comes back as it was written."""

    def update(self) -> None:
        """Make a step with the gradients that are there."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure, which clips gradients, then make a step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update()
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does, but tensors keep their own type: torch casts moments to that of their parameter."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, trained_parameters(self), strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = value.to(parameter.device, copy=True)


def adam_direction(
    state: dict[str, Any], gradient: Tensor, *, betas: tuple[float, float], eps: float, like: Tensor | None = None
) -> Tensor:
    """m_hat / (sqrt(v_hat) + eps) with bias-corrected running means m of the gradient and v of its square.

    Args:
        state: Gets `step`, `exp_avg` and `exp_avg_sq`.
        gradient: In the type of the moments.
        betas: Decay of the two means.
        eps: As in the formula.
        like: Where moments are cut over ranks as this tensor is; they are then held so.

    Source: Kingma and Ba 2015, arXiv:1412.6980, algorithm 1.
    """
    if "exp_avg" not in state:
        state["step"] = 0
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(gradient if like is None else like, dtype=gradient.dtype)
    state["step"] += 1
    mean, square = local(state["exp_avg"]), local(state["exp_avg_sq"])
    mean.lerp_(gradient, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    scale = (1 - betas[1] ** state["step"]) ** 0.5
    direction: Tensor = (mean / (1 - betas[0] ** state["step"])) / (square.sqrt() / scale + eps)
    return direction


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that is cut, which share its memory; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def drawn(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator of random numbers that is a function of some whole numbers alone."""
    state = np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)
    return torch.Generator(device=device).manual_seed(int(state[0] >> np.uint64(1)))
