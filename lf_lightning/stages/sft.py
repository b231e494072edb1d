"""Supervised fine-tuning on conversations."""

from __future__ import annotations

from typing import final

from lf_lightning.stages.causal_lm import CausalLMStage


@final
class SFT(CausalLMStage):
    """Supervised fine-tuning: the answers of conversations are learned, their prompts are read."""

    task = "sft"
