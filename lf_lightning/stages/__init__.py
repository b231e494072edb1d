"""One LightningModule per algorithm."""

from lf_lightning.stages.base import Stage
from lf_lightning.stages.dpo import DPO
from lf_lightning.stages.kto import KTO
from lf_lightning.stages.pt import PT
from lf_lightning.stages.rm import RM
from lf_lightning.stages.sft import SFT

STAGES: tuple[type[Stage], ...] = (PT, SFT, RM, DPO, KTO)

__all__ = ["DPO", "KTO", "PT", "RM", "SFT", "STAGES", "Stage"]
