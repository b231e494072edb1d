"""Pre-training on plain text."""

from __future__ import annotations

from typing import final

from lf_lightning.stages.causal_lm import CausalLMStage


@final
class PT(CausalLMStage):
    """Pre-training: every token of every text is learned, and the end of each text."""

    task = "pt"
