"""Progress as plain lines, where a bar would only make noise: in files and pipes."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer



class PlainProgress(Callback):
    """Print one line for each line of trainer_log.jsonl, and one for every tenth of a prediction."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the step where it was logged."""
        step = trainer.global_step
        due = step % trainer.log_every_n_steps == 0 or step == trainer.estimated_stepping_batches  # type: ignore[attr-defined]
        if due and trainer.is_global_zero:
            metrics = trainer.callback_metrics
            loss, speed = float(metrics["loss"]), float(metrics["tokens/s"])
            total = int(trainer.estimated_stepping_batches)
            print(f"step {step}/{total}  loss {loss:.4f}  {speed:,.0f} tokens/s", file=sys.stderr, flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the values of the set."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            line = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            print(f"step {trainer.global_step}  {line}", file=sys.stderr, flush=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print how far the prediction is."""
        total = int(trainer.num_predict_batches[0])
        if trainer.is_global_zero and ((batch_idx + 1) * 10 // total) > (batch_idx * 10 // total):
            print(f"batch {batch_idx + 1}/{total}", file=sys.stderr, flush=True)
