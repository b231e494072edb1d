"""What a user might bring, with state that no checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Nudge(Callback):
    """Changes a weight where a run begins later than at its start."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0:
            next(pl_module.parameters()).data.mul_(1 + 1e-6)


NUM_CALLS = [0]


def counting(prompts: Sequence[str], responses: Sequence[str], batch: Any) -> list[float]:
    """Scores by how often it was asked in this process."""
    NUM_CALLS[0] += 1
    return [number % 3 + 0.1 * NUM_CALLS[0] for number in range(len(responses))]
