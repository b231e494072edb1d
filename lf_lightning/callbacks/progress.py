"""Progress as plain lines, where a bar would only make noise: in files and pipes."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.run_log import log_is_due
from lf_lightning.console import say


class PlainProgress(Callback):
    """Print one line for each line of trainer_log.jsonl, and one for every tenth of a prediction."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the step where it was logged."""
        if log_is_due(trainer):
            metrics = trainer.callback_metrics
            reward = f"  reward {float(metrics['reward']):.4f}" if "reward" in metrics else ""
            loss, speed = float(metrics["loss"]), float(metrics["tokens/s"])
            total = int(trainer.estimated_stepping_batches)
            say(f"step {trainer.global_step}/{total}  loss {loss:.4f}{reward}  {speed:,.0f} tokens/s")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the values of the set."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            line = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            say(f"step {trainer.global_step}  {line}")

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
        if (batch_idx + 1) * 10 // total > batch_idx * 10 // total:
            say(f"batch {batch_idx + 1}/{total}")
