"""Adam-mini: one second moment for each block of parameters that belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lf_lightning.optim.exact import ExactOptimizer
from lf_lightning.optim.parameters import Trained, decay_groups
from lf_lightning.optim.spec import OptimizerSpec, adam_rules, check_options


@dataclass(frozen=True)
class AdamMini(OptimizerSpec):
    """AdamW with a second moment per attention head or row (Zhang et al. 2024, arXiv:2406.16793): half its memory.

    Queries and keys have one for each head, other matrices one for each row, a norm one, a bias one for each entry. Our
    own: adam-mini 1.1.1 takes hidden_size / num_heads for the size of a head, which is wrong for Qwen3, and asks a
    process group that is not there where a machine has several GPUs.

    Args:
        lr: Largest learning rate of the schedule, > 0.
        betas: Decay of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: As in AdamW, >= 0; never of biases and norms.
    """

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_options(self, **adam_rules(self.lr, self.betas, self.eps, self.weight_decay))

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> Optimizer:
        """Two groups, decayed and not, in the order of the model."""
        rows = {each.parameter: _rows_of_block(each) for each in trained}
        groups = decay_groups(trained, self.weight_decay)
        return AdamMiniOptimizer(groups, rows=rows, lr=self.lr, betas=self.betas, eps=self.eps)


class AdamMiniOptimizer(ExactOptimizer):
    """The step of Adam-mini.

    v = beta_2 v + (1 - beta_2) mean of g^2 over the block

    Args:
        groups: Parameter groups of AdamW.
        rows: Rows of a block of each parameter; 0 means that the parameter is one block.
        defaults: Options of AdamW.
    """

    def __init__(self, groups: list[dict[str, Any]], *, rows: dict[nn.Parameter, int], **defaults: Any) -> None:
        super().__init__(groups, defaults)
        self._rows = rows

    def update(self) -> None:
        """Make a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = self._direction(parameter, parameter.grad, group)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])

    def _direction(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state, rows, (first, second) = self.state[parameter], self._rows[parameter], group["betas"]
        blocks = parameter.shape[0] // rows if rows else 1
        square = gradient.square().reshape(blocks, -1).mean(dim=1)
        if "step" not in state:
            state.update(step=0, exp_avg=torch.zeros_like(gradient), exp_avg_sq=torch.zeros_like(square))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).add_(square, alpha=1 - second)
        root = (state["exp_avg_sq"] / (1 - second ** state["step"])).sqrt() + group["eps"]
        step = state["exp_avg"] / (1 - first ** state["step"])
        direction: Tensor = (step.reshape(blocks, -1) / root[:, None]).reshape(parameter.shape)
        return direction


def _rows_of_block(each: Trained) -> int:
    """Rows of a parameter that share a second moment; 0 where all do."""
    if each.head_rows is not None:
        return each.head_rows
    is_bias = each.role == "vector" and each.name.rpartition(".")[2].endswith("bias")
    return 1 if each.is_decayed or is_bias else 0
