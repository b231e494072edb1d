"""One LightningModule per algorithm."""

from lf_lightning.stages.base import Stage
from lf_lightning.stages.dpo import DPO
from lf_lightning.stages.grpo import GRPO
from lf_lightning.stages.kto import KTO
from lf_lightning.stages.ppo import PPO
from lf_lightning.stages.pt import PT
from lf_lightning.stages.rm import RM
from lf_lightning.stages.sft import SFT

STAGES: tuple[type[Stage], ...] = (PT, SFT, RM, DPO, KTO, PPO, GRPO)

__all__ = ["DPO", "GRPO", "KTO", "PPO", "PT", "RM", "SFT", "STAGES", "Stage"]
