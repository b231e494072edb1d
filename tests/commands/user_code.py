"""What a user might bring, with state that no checkpoint holds."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning import SFT
from lf_lightning.types import LossSums


class Nudge(Callback):
    """Changes a weight where a run begins later than at its start."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step > 0:
            next(pl_module.parameters()).data.mul_(1 + 1e-6)


class Counting(SFT):
    """Scales its loss by what it has seen in this process."""

    num_seen = 0

    def micro_batch_loss(self, micro_batch: Any) -> LossSums:
        self.num_seen += 1
        found = super().micro_batch_loss(micro_batch)
        return found._replace(terms={name: term * (1 + 1e-4 * self.num_seen) for name, term in found.terms.items()})
