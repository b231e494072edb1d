"""Learning-rate schedules, counted in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lf_lightning.types import InputError


@dataclass(frozen=True)
class ScheduleSpec:
    """How the learning rate changes over the run.

    Args:
        kind: `constant`, `linear` (to zero at the last step), or `cosine` (half a period, to zero at the last step).
        warmup_ratio: Share of all steps during which the rate rises linearly from zero, in [0, 1).
        warmup_steps: The same as a number of steps, >= 0; excludes `warmup_ratio`.
    """

    kind: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse two warm-ups, and shares that are none.

        Raises:
            InputError: As said.
        """
        where = "model.init_args.schedule"
        if not 0 <= self.warmup_ratio < 1:
            raise InputError(f"{where}.warmup_ratio: must be in [0, 1), got {self.warmup_ratio}. Try 0.1.")
        if self.warmup_steps < 0:
            raise InputError(f"{where}.warmup_steps: must be 0 or more, got {self.warmup_steps}. Try 0.")
        if self.warmup_ratio and self.warmup_steps:
            raise InputError(f"{where}: warmup_ratio and warmup_steps exclude each other, got both. Remove one.")

    def build(self, optimizer: Optimizer, num_steps: float) -> LRScheduler:
        """Make the schedule of a run of `num_steps` optimizer steps.

        Raises:
            InputError: The run has no end.
        """
        from transformers import get_scheduler

        if math.isinf(num_steps):
            raise InputError(
                "trainer.max_steps: must say where the run ends, got no end. Set it, or trainer.max_epochs."
            )
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * num_steps)
        kind = "constant_with_warmup" if self.kind == "constant" else self.kind
        schedule: LRScheduler = get_scheduler(
            kind, optimizer, num_warmup_steps=warmup, num_training_steps=max(int(num_steps), 1)
        )
        return schedule


def group_options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each parameter group, as the configuration says them."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def trained_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def restate(optimizer: Optimizer, schedule: LRScheduler, configured: list[dict[str, Any]]) -> None:
    """Give a restored optimizer and schedule the configured options back; only their place in the run is restored.

    Args:
        optimizer: The optimizer; its moments stay.
        schedule: A schedule made by `ScheduleSpec.build`; its count of steps stays.
        configured: What `group_options` said before the restore.
    """
    assert isinstance(schedule, LambdaLR)
    schedule.base_lrs = [options["initial_lr"] for options in configured]
    rows = zip(optimizer.param_groups, configured, schedule.lr_lambdas, strict=True)
    for group, options, factor in rows:
        group.update(options)
        group["lr"] = options["initial_lr"] * factor(schedule.last_epoch)
