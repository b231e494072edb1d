"""The optimizer's part of a step: clip, look at the norm, step; by the stage itself or by DeepSpeed's engine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lf_lightning.lightning_private import count_step
from lf_lightning.optim import trained_parameters
from lf_lightning.stages.deepspeed import ZeroStrategy
from lf_lightning.stages.non_finite import is_scaled
from lf_lightning.stages.optimization import clipped_norm

if TYPE_CHECKING:
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

    from lf_lightning.stages.base import Stage


def step_optimizer(
    stage: Stage, optimizer: LightningOptimizer, means: dict[str, float], *, has_gradient: bool, is_kept: bool
) -> None:
    """Step the optimizer with the gradient of the step.

    Args:
        stage: Its gradient is that of the whole step.
        optimizer: Of the stage.
        means: Loss, terms and metrics of the step.
        has_gradient: Whether there was a backward.
        is_kept: Otherwise weights and moments stay as they are.
    """
    strategy = stage.trainer.strategy
    if not isinstance(strategy, ZeroStrategy):
        if not is_kept:
            optimizer.zero_grad(set_to_none=True)
        optimizer.step()
        return
    if not has_gradient:
        count_step(optimizer)
        return
    is_finite = all(map(math.isfinite, means.values()))
    if not (is_kept and is_finite):
        strategy.drop_step()
    optimizer.step()
    stage.grad_norm = strategy.finish_step()  # where it is not finite the engine has left weights and moments alone
    stage.guard.check_gradient(stage.trainer.global_step, stage.grad_norm, [], scaled=False, seen=not is_finite)


def clip(stage: Stage, optimizer: Optimizer, *, loss: float) -> None:
    """Clip the gradient that an optimizer is about to use, and look at its norm; DeepSpeed does so in its own step.

    Args:
        stage: Of the optimizer.
        optimizer: Its parameters hold the gradient of the whole step, no longer scaled.
        loss: Of the step.

    Raises:
        TrainingStopped: The norm is not finite and the policy is to stop.
    """
    if isinstance(stage.trainer.strategy, ZeroStrategy):
        return
    parameters = trained_parameters(optimizer)
    stage.grad_norm = clipped_norm(optimizer, stage.max_grad_norm)
    scaled, seen, step = is_scaled(stage.trainer), not math.isfinite(loss), stage.trainer.global_step + 1
    stage.guard.check_gradient(step, stage.grad_norm, parameters, scaled=scaled, seen=seen)
