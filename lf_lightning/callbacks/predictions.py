"""Writes what `predict` generated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.console import say
from lf_lightning.types import Answer

PREDICTIONS = "generated_predictions.jsonl"


class WritePredictions(Callback):
    """Write generated_predictions.jsonl, one line a prompt in the order of the set: prompt, predict, label."""

    def __init__(self) -> None:
        self._answers: list[Answer] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the answers of this rank."""
        self._answers.extend(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the answers of all ranks and write them."""
        answers = gather_answers(self._answers)
        self._answers = []
        if trainer.is_global_zero:
            path = run_folder(trainer) / PREDICTIONS
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = ({"prompt": answer.prompt, "predict": answer.predict, "label": answer.label} for answer in answers)
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            say(f"wrote {len(answers)} answers to {path}")


def gather_answers(answers: Sequence[Answer]) -> list[Answer]:
    """The answers of all ranks in the order of the set."""
    everyone: list[Sequence[Answer]] = [list(answers)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(everyone, list(answers))
    return sorted((answer for part in everyone for answer in part), key=lambda answer: answer.row)
