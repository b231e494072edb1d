"""Optimizers and schedules."""

from lf_lightning.optim.optimizers import AdamW, OptimizerSpec
from lf_lightning.optim.schedules import ScheduleSpec

__all__ = ["AdamW", "OptimizerSpec", "ScheduleSpec"]
