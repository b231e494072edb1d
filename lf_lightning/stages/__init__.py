"""One LightningModule per algorithm."""

from lf_lightning.stages.base import Stage
from lf_lightning.stages.pt import PT
from lf_lightning.stages.sft import SFT

__all__ = ["PT", "SFT", "Stage"]
