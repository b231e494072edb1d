"""AdamW as PyTorch has it, and with two learning rates for the two matrices of a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from lf_lightning.optim.bfloat16 import Bfloat16AdamW
from lf_lightning.optim.parameters import Trained, decay_groups
from lf_lightning.optim.several import LayerwiseOptimizer
from lf_lightning.optim.spec import WHERE, OptimizerSpec, adam_rules, check_options
from lf_lightning.types import InputError


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
        weights: With Full tuning and `backbone.dtype: bfloat16`: `float32` holds the weights that train in float32.
            `kahan` and `stochastic` leave them in bfloat16 (4 bytes a weight and its gradient instead of 8); `kahan`
            keeps beside each what rounding left over (2 bytes), `stochastic` rounds at random. Our own step: torch's
            rounds to the nearest, and most weights then never move at a small learning rate.
        layerwise: Step each parameter as its gradient arrives, and let the gradient go; needs one device, one
            micro-batch a step and `max_grad_norm: null`.
    """

    strategies: ClassVar[tuple[str, ...]] = ("auto", "ddp", "fsdp2", "deepspeed")

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    fused: bool = False
    weights: Literal["float32", "kahan", "stochastic"] = "float32"
    layerwise: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_options(self, **adam_rules(self.lr, self.betas, self.eps, self.weight_decay))
        if self.fused and self.weights != "float32":
            raise InputError(f"{WHERE}.init_args.fused: must be false with weights: {self.weights}. Set it so.")

    @property
    def is_layerwise(self) -> bool:
        """As the option says."""
        return self.layerwise

    @property
    def keeps_bfloat16(self) -> bool:
        """As `weights` says."""
        return self.weights != "float32"

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> torch.optim.Optimizer:
        """Two groups, decayed and not, in the order of the model."""
        if self.weights != "float32":
            _check_bfloat16(trained, self.weights)
        if self.layerwise:
            return LayerwiseOptimizer([self._build([each], seed + number) for number, each in enumerate(trained)])
        return self._build(trained, seed)

    def _build(self, trained: Sequence[Trained], seed: int) -> torch.optim.Optimizer:
        groups = decay_groups(trained, self.weight_decay)
        if self.weights != "float32":
            seeds = {each.parameter: seed + number for number, each in enumerate(trained)}
            return Bfloat16AdamW(groups, rounding=self.weights, seeds=seeds, lr=self.lr, betas=self.betas, eps=self.eps)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=self.fused or None)


@dataclass(frozen=True)
class LoRAPlus(OptimizerSpec):
    """AdamW with a larger learning rate for the matrices B of a LoRA (Hayou et al. 2024, arXiv:2402.12354).

    Args:
        lr: Largest learning rate of the matrices A and of everything that is no matrix B, > 0.
        ratio: Learning rate of the matrices B over `lr`, > 0.
        embedding_lr: Largest learning rate of embeddings, an adapter's and whole ones, > 0.
        betas: Decay of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: As in AdamW, >= 0; never of biases, norms and magnitudes, whose rate is `lr`.
        fused: As in AdamW.
    """

    strategies: ClassVar[tuple[str, ...]] = ("auto", "ddp", "fsdp2")

    lr: float = 5e-5
    ratio: float = 16.0
    embedding_lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    fused: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_options(
            self,
            ratio=(self.ratio > 0, "positive"),
            embedding_lr=(self.embedding_lr > 0, "positive"),
            **adam_rules(self.lr, self.betas, self.eps, self.weight_decay),
        )

    @property
    def peak_rates(self) -> dict[str, float]:
        """Of the matrices A and the rest, of B, and of embeddings."""
        return {"lr": self.lr, "matrices B": self.lr * self.ratio, "embedding_lr": self.embedding_lr}

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> torch.optim.Optimizer:
        """Groups of A and the rest, of B, and of embeddings, each decayed and not; the first has the rate `lr`."""
        embeddings = [each for each in trained if each.role == "embedding"]
        second = [each for each in trained if each.is_decayed and "lora_B" in each.name.split(".")]
        if not second:
            raise InputError(f"{WHERE}.class_path: LoRAPlus needs a LoRA, got a tuning without one. Use AdamW.")
        taken = {id(each.parameter) for each in (*embeddings, *second)}
        rest = [each for each in trained if id(each.parameter) not in taken]
        groups = [
            *decay_groups(rest, self.weight_decay, lr=self.lr),
            *decay_groups(second, self.weight_decay, lr=self.lr * self.ratio),
            *decay_groups(embeddings, self.weight_decay, lr=self.embedding_lr),
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=self.fused or None)


def _check_bfloat16(trained: Sequence[Trained], weights: str) -> None:
    """Refuse an option for bfloat16 weights where none trains.

    Raises:
        InputError: As said.
    """
    if not any(each.parameter.dtype == torch.bfloat16 for each in trained):
        raise InputError(
            f"{WHERE}.init_args.weights: {weights} is for bfloat16 weights that train, got none. "
            "Set backbone.dtype: bfloat16 with Full tuning, or weights: float32."
        )
