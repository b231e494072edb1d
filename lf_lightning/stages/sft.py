"""Supervised fine-tuning on conversations."""

from __future__ import annotations

from typing import final

from lf_lightning.stages.causal_lm import CausalLMStage


@final
class SFT(CausalLMStage):
    """Supervised fine-tuning: the answers of conversations are learned, their prompts are read.

    Args:
        backbone: The language model.
        tuning: Which parameters train; LoRA on every linear layer unless given.
        optimizer: The optimizer and its constants.
        schedule: How the learning rate changes.
        max_grad_norm: Largest global norm of the gradient, > 0; larger ones are scaled down to it. Empty: no limit.
        non_finite: A loss or gradient that is not finite: `stop` the run, or `skip` the step and count it.
        generation: How `predict` and callbacks generate answers.
    """

    task = "sft"
