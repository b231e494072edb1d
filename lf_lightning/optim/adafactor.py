"""Adafactor, as transformers has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lf_lightning.optim.parameters import Trained, decay_groups
from lf_lightning.optim.several import LayerwiseOptimizer
from lf_lightning.optim.spec import OptimizerSpec, check_options


@dataclass(frozen=True)
class Adafactor(OptimizerSpec):
    """Second moments of a matrix as a row and a column (Shazeer and Stern 2018, arXiv:1804.04235), of transformers.

    The learning rate is the schedule's alone: Adafactor's own relative step is off.

    Args:
        lr: Largest learning rate of the schedule, > 0.
        beta1: Decay of a running mean of the gradient, in [0, 1); empty keeps none, which saves its memory.
        decay_rate: Exponent of the growing memory of second moments, 1 - step^decay_rate, < 0.
        eps: Added to the squared gradient; and smallest scale of a parameter with `scale_parameter`. Both > 0.
        clip_threshold: Largest root mean square of the update of a parameter, > 0.
        scale_parameter: Multiply the rate of a parameter with the root mean square of its entries.
        weight_decay: As in AdamW, >= 0; never of biases and norms.
        layerwise: As in AdamW.
    """

    lr: float = 5e-5
    beta1: float | None = None
    decay_rate: float = -0.8
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    scale_parameter: bool = False
    weight_decay: float = 0.0
    layerwise: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_options(
            self,
            lr=(self.lr > 0, "positive"),
            beta1=(self.beta1 is None or 0 <= self.beta1 < 1, "in [0, 1) or null"),
            decay_rate=(self.decay_rate < 0, "negative"),
            eps=(all(value > 0 for value in self.eps), "two positive numbers"),
            clip_threshold=(self.clip_threshold > 0, "positive"),
            weight_decay=(self.weight_decay >= 0, "0 or more"),
        )

    @property
    def is_layerwise(self) -> bool:
        """As the option says."""
        return self.layerwise

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> torch.optim.Optimizer:
        """Two groups, decayed and not, in the order of the model."""
        from transformers.optimization import Adafactor as Factored

        if self.layerwise:
            single = replace(self, layerwise=False)
            return LayerwiseOptimizer([single.build([each], seed=seed + n) for n, each in enumerate(trained)])
        factored: torch.optim.Optimizer = Factored(
            decay_groups(trained, self.weight_decay),
            lr=self.lr,
            eps=self.eps,
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            beta1=self.beta1,
            scale_parameter=self.scale_parameter,
            relative_step=False,
            warmup_init=False,
        )
        return factored
