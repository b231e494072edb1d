"""Optimizers and schedules."""

from lf_lightning.optim.optimizers import AdamW, OptimizerSpec
from lf_lightning.optim.schedules import ScheduleSpec, group_options, restate, trained_parameters

__all__ = ["AdamW", "OptimizerSpec", "ScheduleSpec", "group_options", "restate", "trained_parameters"]
