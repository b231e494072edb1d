"""AdamW of bitsandbytes: moments in 8 bits, or in memory that is paged to the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lf_lightning.optim.parameters import Trained, decay_groups
from lf_lightning.optim.several import SeveralOptimizers
from lf_lightning.optim.spec import OptimizerSpec, adam_rules, check_options, check_package


@dataclass(frozen=True)
class AdamW8bit(OptimizerSpec):
    """AdamW with block-wise quantized moments (Dettmers et al. 2022, arXiv:2110.02861), of bitsandbytes.

    Embeddings keep moments of 32 bits, as the paper asks for.

    Args:
        lr: Largest learning rate of the schedule, > 0.
        betas: Decay of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: As in AdamW, >= 0; never of biases and norms.
        min_8bit_size: Parameters with fewer entries keep moments of 32 bits, > 0.
        paged: Hold the moments in memory that the GPU may page out to the CPU; needs a GPU.
    """

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    min_8bit_size: int = 4096
    paged: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range, and a package that is not there.

        Raises:
            InputError: As said.
        """
        check_package(self, "bitsandbytes")
        check_options(
            self,
            min_8bit_size=(self.min_8bit_size > 0, "positive"),
            **adam_rules(self.lr, self.betas, self.eps, self.weight_decay),
        )

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> torch.optim.Optimizer:
        """Two groups, decayed and not; those of embeddings last, in an AdamW of their own."""
        from bitsandbytes.optim.adamw import AdamW8bit as Quantized

        options: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps}
        groups = decay_groups([each for each in trained if each.role != "embedding"], self.weight_decay)
        embeddings = decay_groups([each for each in trained if each.role == "embedding"], self.weight_decay)
        parts: list[torch.optim.Optimizer] = []
        if groups:
            parts.append(Quantized(groups, min_8bit_size=self.min_8bit_size, is_paged=self.paged, **options))
        if embeddings:
            parts.append(torch.optim.AdamW(embeddings, **options))
        return parts[0] if len(parts) == 1 else SeveralOptimizers(parts)


@dataclass(frozen=True)
class PagedAdamW(OptimizerSpec):
    """AdamW with moments of 32 bits in memory that the GPU may page out to the CPU, of bitsandbytes; needs a GPU.

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
        """Refuse values outside their range, and a package that is not there.

        Raises:
            InputError: As said.
        """
        check_package(self, "bitsandbytes")
        check_options(self, **adam_rules(self.lr, self.betas, self.eps, self.weight_decay))

    @property
    def paged(self) -> bool:
        """Always."""
        return True

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> torch.optim.Optimizer:
        """Two groups, decayed and not."""
        from bitsandbytes.optim.adamw import PagedAdamW32bit

        groups = decay_groups(trained, self.weight_decay)
        paged: torch.optim.Optimizer = PagedAdamW32bit(groups, lr=self.lr, betas=self.betas, eps=self.eps)
        return paged
