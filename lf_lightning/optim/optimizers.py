"""Optimizers by name, with typed options."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lf_lightning.types import InputError


@dataclass(frozen=True)
class OptimizerSpec(ABC):
    """Which optimizer, with which constants."""

    @abstractmethod
    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer of the named parameters that require a gradient."""


@dataclass(frozen=True)
class AdamW(OptimizerSpec):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), PyTorch's own.

    Args:
        lr: Largest learning rate of the schedule, > 0.
        betas: Decay of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: Share of a weight taken away per step and unit of learning rate, >= 0. Biases and the weights of
            norms (every parameter with one dimension) are never decayed.
        fused: One kernel for the whole update; faster, differs in the last digits. Refused with 16-mixed.
    """

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    fused: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        for name, holds, want in (
            ("lr", self.lr > 0, "positive"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("eps", self.eps > 0, "positive"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
        ):
            if not holds:
                where = f"model.init_args.optimizer.init_args.{name}"
                raise InputError(f"{where}: must be {want}, got {vars(self)[name]}. Correct it.")

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Two groups, decayed and not, in the order of the model."""
        return torch.optim.AdamW(
            decay_groups(parameters, self.weight_decay),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=self.fused or None,
        )


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those with weight decay (two dimensions and more) and those without (biases, norms)."""
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
