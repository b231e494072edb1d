"""Muon as PyTorch has it, for the matrices inside a model; AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from lf_lightning.optim.parameters import Trained, decay_groups
from lf_lightning.optim.several import SeveralOptimizers
from lf_lightning.optim.spec import WHERE, OptimizerSpec, adam_rules, check_options
from lf_lightning.types import InputError


@dataclass(frozen=True)
class Muon(OptimizerSpec):
    """Orthogonalised momentum for the linear layers inside the model (Jordan et al. 2024), PyTorch's own.

    Embeddings, output layer, value head, norms, biases and fused experts get AdamW.

    Args:
        lr: Largest learning rate of the schedule, for the matrices, > 0.
        adamw_lr: The same for what gets AdamW, > 0; empty means `lr`.
        momentum: Decay of the running mean of the gradient of a matrix, in [0, 1).
        nesterov: Look one step of the momentum ahead.
        num_iterations: Newton-Schulz iterations that orthogonalise, 1 to 99.
        adjust_lr: Factor of the rate of a matrix (rows x columns): `match_rms_adamw`, 0.2 sqrt(max(rows, columns)),
            takes the learning rates of AdamW (Liu et al. 2025, arXiv:2502.16982); `original`
            sqrt(max(1, rows / columns)).
        betas: Of AdamW, each in [0, 1).
        eps: Of AdamW, > 0.
        weight_decay: Of both, >= 0; never of biases and norms.
    """

    strategies: ClassVar[tuple[str, ...]] = ("auto", "ddp", "fsdp2")

    lr: float = 5e-5
    adamw_lr: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    num_iterations: int = 5
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_options(
            self,
            adamw_lr=(self.adamw_lr is None or self.adamw_lr > 0, "positive or null"),
            momentum=(0 <= self.momentum < 1, "in [0, 1)"),
            num_iterations=(1 <= self.num_iterations < 100, "1 to 99"),
            **adam_rules(self.lr, self.betas, self.eps, self.weight_decay),
        )

    @property
    def peak_rates(self) -> dict[str, float]:
        """Of the matrices, and of what gets AdamW."""
        return {"lr": self.lr} if self.adamw_lr is None else {"lr": self.lr, "adamw_lr": self.adamw_lr}

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> torch.optim.Optimizer:
        """A group of the matrices, then those of AdamW, decayed and not."""
        matrices = [each.parameter for each in trained if each.role == "linear"]
        if not matrices:
            raise InputError(f"{WHERE}.class_path: Muon trains linear layers, got none that train. Use AdamW.")
        inner = torch.optim.Muon(
            matrices,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            nesterov=self.nesterov,
            ns_steps=self.num_iterations,
            adjust_lr_fn=self.adjust_lr,
        )
        rest = decay_groups([each for each in trained if each.role != "linear"], self.weight_decay)
        if not rest:
            return inner
        outer = torch.optim.AdamW(rest, lr=self.adamw_lr or self.lr, betas=self.betas, eps=self.eps)
        return SeveralOptimizers([inner, outer])
