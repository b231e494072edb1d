"""Learning-rate schedules, counted in optimizer steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lf_lightning.types import InputError

WHERE = "model.init_args.schedule"
Kind = Literal["constant", "linear", "cosine", "polynomial", "inverse_sqrt", "warmup_stable_decay"]
OF_KIND: dict[str, tuple[Kind, ...]] = {
    "min_ratio": ("linear", "cosine", "polynomial", "warmup_stable_decay"),
    "power": ("polynomial",),
    "timescale": ("inverse_sqrt",),
    "stable_ratio": ("warmup_stable_decay",),
}
"""Option -> the kinds that it means something for."""


@dataclass(frozen=True)
class ScheduleSpec:
    """How the learning rate changes over the run, counted in optimizer steps; R steps are left after the warm-up.

    Args:
        kind: `constant`; `linear`; `cosine`, half a period; `polynomial`, (1 - t / R)^power; `inverse_sqrt`,
            sqrt(s / (s + t)), which never ends; `warmup_stable_decay`, constant and then half a cosine (Hu et al. 2024,
            arXiv:2404.06395).
        warmup_ratio: Share of all steps during which the rate rises linearly from zero, in [0, 1).
        warmup_steps: The same as a number of steps, >= 0; excludes `warmup_ratio`.
        min_ratio: Rate at the last step over the largest one, in [0, 1): of linear, cosine, polynomial and
            warmup_stable_decay.
        power: Of polynomial, > 0; empty means 2.
        timescale: s of inverse_sqrt in steps, > 0; empty means the steps of the warm-up, 10,000 where there is none.
        stable_ratio: Share of R during which the rate of warmup_stable_decay stays, in [0, 1]; empty means a third.
    """

    kind: Kind = "linear"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    min_ratio: float = 0.0
    power: float | None = None
    timescale: int | None = None
    stable_ratio: float | None = None

    def __post_init__(self) -> None:
        """Refuse two warm-ups, shares that are none, and options that the kind does not have.

        Raises:
            InputError: As said.
        """
        for name, holds, want in (
            ("warmup_ratio", 0 <= self.warmup_ratio < 1, "in [0, 1)"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("min_ratio", 0 <= self.min_ratio < 1, "in [0, 1)"),
            ("power", self.power is None or self.power > 0, "positive or null"),
            ("timescale", self.timescale is None or self.timescale > 0, "positive or null"),
            ("stable_ratio", self.stable_ratio is None or 0 <= self.stable_ratio <= 1, "in [0, 1] or null"),
        ):
            if not holds:
                raise InputError(f"{WHERE}.{name}: must be {want}, got {vars(self)[name]}. Correct it.")
        if self.warmup_ratio and self.warmup_steps:
            raise InputError(f"{WHERE}: warmup_ratio and warmup_steps exclude each other, got both. Remove one.")
        for name, kinds in OF_KIND.items():
            if vars(self)[name] != vars(type(self))[name] and self.kind not in kinds:
                raise InputError(
                    f"{WHERE}.{name}: must be left out unless kind is {' or '.join(kinds)}, "
                    f"got {vars(self)[name]} with kind: {self.kind}. Remove it, or change the kind."
                )

    def build(self, optimizer: Optimizer, num_steps: float) -> LRScheduler:
        """Make the schedule of a run of `num_steps` optimizer steps.

        Raises:
            InputError: The run has no end.
        """
        if math.isinf(num_steps):
            raise InputError(
                "trainer.max_steps: must say where the run ends, got no end. Set it, or trainer.max_epochs."
            )
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * num_steps)
        return self._of_library(optimizer, warmup, left=max(int(num_steps) - warmup, 1))

    def _of_library(self, optimizer: Optimizer, warmup: int, *, left: int) -> LRScheduler:
        """The schedule as transformers has it, with so many steps after the warm-up."""
        from transformers import optimization as known

        total, lr = warmup + left, float(optimizer.defaults["lr"])
        stable = left // 3 if self.stable_ratio is None else math.floor(self.stable_ratio * left)
        power = 1.0 if self.kind == "linear" else self.power or 2.0
        made: LRScheduler
        match self.kind:
            case "constant":
                made = known.get_constant_schedule_with_warmup(optimizer, warmup)
            case "linear" | "polynomial":
                made = known.get_polynomial_decay_schedule_with_warmup(
                    optimizer, warmup, total, lr_end=self.min_ratio * lr, power=power
                )
            case "cosine":
                made = known.get_cosine_with_min_lr_schedule_with_warmup(
                    optimizer, warmup, total, min_lr_rate=self.min_ratio
                )
            case "inverse_sqrt":
                made = known.get_inverse_sqrt_schedule(optimizer, warmup, timescale=self.timescale)
            case "warmup_stable_decay":
                made = known.get_wsd_schedule(
                    optimizer, warmup, left - stable, num_stable_steps=stable, min_lr_ratio=self.min_ratio
                )
        return made

    def rates(self, lr: float, num_steps: int) -> list[float]:
        """The learning rate of each step of a run, without a run."""
        schedule = self.build(torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=lr), num_steps)
        assert isinstance(schedule, LambdaLR)
        (factor,) = schedule.lr_lambdas
        return [lr * float(factor(step)) for step in range(num_steps)]


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
