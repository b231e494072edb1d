"""What a loss or gradient that is not finite does: the run stops, or the step counts and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from lightning.pytorch import Trainer
from torch import nn

from lf_lightning.console import say
from lf_lightning.types import TrainingStopped

PATIENCE_WITH_THE_SCALER = 20
"""Steps in a row that 16-mixed may skip for a gradient that overflows, before it counts as non-finite."""


def is_scaled(trainer: Trainer) -> bool:
    """Whether a GradScaler is at work."""
    return trainer.precision == "16-mixed"


class NonFinite:
    """The policy of a run, and how often it acted.

    Args:
        policy: `stop` raises, `skip` takes the gradients away.
    """

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        self.policy = policy
        self.num_skipped_steps = 0
        self.found: tuple[int, str] | None = None
        """The last step that was given up, and what was not finite there; for callbacks to read and to clear."""
        self._overflows_in_a_row = 0

    def check_loss(
        self, step: int, means: dict[str, float], parameters: Iterable[nn.Parameter], *, scaled: bool
    ) -> None:
        """Look at the reduced loss and metrics of a step; equal on all ranks, so that all decide alike.

        Args:
            step: Number of the step, from 1.
            means: Loss, terms and metrics.
            parameters: Those that the optimizer is about to step.
            scaled: A GradScaler is at work; it is made to skip the step itself, since it refuses one without gradients.

        Raises:
            TrainingStopped: One is not finite and the policy is to stop.
        """
        if all(map(math.isfinite, means.values())):
            return
        self._stop_or_count(step, "loss", ", ".join(f"{name} {value}" for name, value in means.items()))
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, torch.inf) if scaled else None

    def check_gradient(
        self, step: int, norm: float, parameters: Iterable[nn.Parameter], *, scaled: bool, seen: bool
    ) -> None:
        """Look at the norm of the gradient, just before the optimizer.

        Args:
            step: Number of the step, from 1.
            norm: Global norm before clipping.
            parameters: Those that the optimizer is about to step.
            scaled: A GradScaler is at work: it skips an overflow by itself, and lowers its scale.
            seen: `check_loss` has given this step up already.

        Raises:
            TrainingStopped: It is not finite and the policy is to stop.
        """
        if math.isfinite(norm) or seen:
            self._overflows_in_a_row = 0
            return
        self._overflows_in_a_row += 1
        if scaled and (self.policy == "skip" or self._overflows_in_a_row < PATIENCE_WITH_THE_SCALER):
            self.num_skipped_steps += 1
            say(f"step {step}: the GradScaler skips it, the gradient overflows; {self.num_skipped_steps} so far")
            return
        self._stop_or_count(step, "gradient", f"norm {norm}")
        for parameter in parameters:
            parameter.grad = None

    def _stop_or_count(self, step: int, what: str, found: str) -> None:
        self.found = step, f"{what}: {found}"
        if self.policy == "stop":
            raise TrainingStopped(
                f"step {step}: the {what} is not finite, got {found}. Lower the learning rate or look at the rows of "
                "this step, or set model.init_args.non_finite: skip."
            )
        self.num_skipped_steps += 1
        say(f"step {step}: skipped, the {what} is not finite ({found}); {self.num_skipped_steps} so far")
