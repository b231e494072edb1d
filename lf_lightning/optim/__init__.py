"""Optimizers and schedules."""

from lf_lightning.optim.adafactor import Adafactor
from lf_lightning.optim.adam_mini import AdamMini
from lf_lightning.optim.adamw import AdamW, LoRAPlus
from lf_lightning.optim.apollo import APOLLO
from lf_lightning.optim.badam import BAdam, BAdamRatio, PartialOptimizer
from lf_lightning.optim.galore import GaLore
from lf_lightning.optim.muon import Muon
from lf_lightning.optim.parameters import describe, group_options, trained_parameters
from lf_lightning.optim.quantized import AdamW8bit, PagedAdamW
from lf_lightning.optim.schedules import ScheduleSpec, restate
from lf_lightning.optim.several import LayerwiseOptimizer
from lf_lightning.optim.spec import OptimizerSpec

__all__ = [
    "APOLLO",
    "Adafactor",
    "AdamMini",
    "AdamW",
    "AdamW8bit",
    "BAdam",
    "BAdamRatio",
    "GaLore",
    "LayerwiseOptimizer",
    "LoRAPlus",
    "Muon",
    "OptimizerSpec",
    "PagedAdamW",
    "PartialOptimizer",
    "ScheduleSpec",
    "describe",
    "group_options",
    "restate",
    "trained_parameters",
]
