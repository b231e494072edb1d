"""Several optimizers that look like one: for parameters that are stepped in different ways, or one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lf_lightning.types import InputError


class SeveralOptimizers(Optimizer):
    """Optimizers of disjoint parameters behind one list of groups and one state.

    The groups are the parts' own, so that a schedule reaches them; `state_dict` has torch's layout.

    Args:
        parts: The optimizers.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {"lr": self.parts[0].defaults["lr"]})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure, which clips gradients, then step each part."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each part its own, as it wants to be given it."""
        groups = list(state_dict["param_groups"])
        if len(groups) != len(self.param_groups):
            raise InputError(
                f"model.init_args.optimizer: must make {len(groups)} groups of parameters as the checkpoint does, "
                f"got {len(self.param_groups)}. Use the run's own optimizer."
            )
        for part in self.parts:
            own, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            numbers = {number for group in own for number in group["params"]}
            state = {number: values for number, values in state_dict["state"].items() if number in numbers}
            part.load_state_dict({"state": state, "param_groups": own})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self._share()

    def _share(self) -> None:
        state: Any = self.state
        state.clear()
        for part in self.parts:
            state.update(part.state)
        for part in self.parts:
            part.state = state


class LayerwiseOptimizer(SeveralOptimizers):
    """One optimizer for each parameter, stepped as soon as its gradient is there; the gradient is then let go.

    So the gradients of a model are never all in memory. What needs all of them at once cannot be had: clipping, the
    scaler of 16-mixed, several micro-batches, several ranks, a step that is given up. A parameter whose gradient is not
    finite is left as it is, and the norm says so.

    Args:
        parts: An optimizer of exactly one parameter each.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        super().__init__(parts)
        self._square = 0.0
        self._arrived: set[int] = set()
        for index, part in enumerate(self.parts):
            ((parameter,),) = [group["params"] for group in part.param_groups]
            parameter.register_post_accumulate_grad_hook(partial(self._take, index))

    @property
    def grad_norm(self) -> float:
        """Global norm of the gradients since the last step, none of them clipped."""
        return math.sqrt(self._square)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """End a step: its parts have been made already."""
        loss = closure() if closure is not None else None
        self._square = 0.0
        self._arrived.clear()
        return loss

    @torch.no_grad()
    def _take(self, index: int, parameter: Tensor) -> None:
        if index in self._arrived:
            raise InputError(
                "data.micro_batch_size: must make one micro-batch of a step with a layerwise optimizer, got more. "
                "Set it to data.global_batch_size."
            )
        self._arrived.add(index)
        assert parameter.grad is not None
        norm = float(torch.linalg.vector_norm(parameter.grad.float()))
        self._square += norm * norm
        if math.isfinite(norm):
            self.parts[index].step()
        parameter.grad = None
