"""Habits around a run: they look, save and report, and never change the numbers of training."""

from lightning.pytorch import Callback

from lf_lightning.callbacks.answers import AnswersTable
from lf_lightning.callbacks.checkpoint import RunCheckpoint
from lf_lightning.callbacks.debug_bundle import DebugBundle
from lf_lightning.callbacks.folder import last_checkpoint
from lf_lightning.callbacks.merged_base import SaveMergedBase
from lf_lightning.callbacks.pissa import PissaConvertCallback
from lf_lightning.callbacks.plots import PlotLoss
from lf_lightning.callbacks.predictions import WritePredictions
from lf_lightning.callbacks.processor import SaveProcessorCallback
from lf_lightning.callbacks.progress import PlainProgress
from lf_lightning.callbacks.random_state import RandomState
from lf_lightning.callbacks.run_folder import RunFolder
from lf_lightning.callbacks.run_log import RunLog
from lf_lightning.callbacks.samples import WriteSamples
from lf_lightning.callbacks.sentinels import ChangedWeights, GradientReach, LaggingRank, Quarantine
from lf_lightning.callbacks.signals import GracefulStop, Interrupted
from lf_lightning.callbacks.value_head import FixValueHeadModelCallback

__all__ = [
    "AnswersTable",
    "ChangedWeights",
    "DebugBundle",
    "FixValueHeadModelCallback",
    "GracefulStop",
    "GradientReach",
    "Interrupted",
    "LaggingRank",
    "PissaConvertCallback",
    "PlainProgress",
    "PlotLoss",
    "Quarantine",
    "RandomState",
    "RunCheckpoint",
    "RunFolder",
    "RunLog",
    "SaveMergedBase",
    "SaveProcessorCallback",
    "WritePredictions",
    "WriteSamples",
    "default_callbacks",
    "last_checkpoint",
]


def default_callbacks() -> list[Callback]:
    """What every run has; the order matters: PiSSA before the head, logs before plots, the model card last."""
    saves: list[Callback] = [PissaConvertCallback(), SaveMergedBase(), SaveProcessorCallback()]
    saves += [FixValueHeadModelCallback(), RunFolder()]
    watches = [Quarantine(), GradientReach(), LaggingRank(), DebugBundle(), GracefulStop()]
    logs = [RandomState(), RunLog(), PlotLoss(), WritePredictions(), WriteSamples()]
    return [*saves, *logs, *watches, RunCheckpoint()]
