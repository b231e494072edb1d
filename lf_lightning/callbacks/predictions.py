"""Writes what `predict` generated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.console import say
from lf_lightning.types import Answer, PairScore


class Sample(NamedTuple):
    """A response to a validation prompt, with what was made of it."""

    row: int  # position in its set
    prompt: str
    response: str
    reference: str  # the answer that the data gives, "" where it gives none
    reward: float
    kl: float | None  # summed log policy - log reference, in nats; None where there is no reference
    length: int  # tokens
    is_stopped: bool


Prediction = TypeVar("Prediction", Answer, PairScore, Sample)
Value = TypeVar("Value")

PREDICTIONS = "generated_predictions.jsonl"


class WritePredictions(Callback):
    """Write generated_predictions.jsonl in the order of the set.

    One line a prompt: prompt, predict, label; of a reward model one line a pair: chosen, rejected, at full precision.
    """

    def __init__(self) -> None:
        self._found: list[Any] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what this rank has predicted."""
        self._found.extend(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the predictions of all ranks and write them."""
        predictions = gather_predictions(self._found)
        self._found = []
        if trainer.is_global_zero:
            path = run_folder(trainer) / PREDICTIONS
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = []
            for prediction in predictions:
                fields = prediction._asdict()
                del fields["row"]  # the number of the line says it
                lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
            path.write_text("".join(lines))
            say(f"wrote {len(lines)} predictions to {path}")


def gather_predictions(predictions: Sequence[Prediction]) -> list[Prediction]:
    """The predictions of all ranks in the order of the set."""
    return sorted((each for part in from_all_ranks(list(predictions)) for each in part), key=lambda each: each.row)


def from_all_ranks(value: Value) -> list[Value]:
    """The value of every rank, in their order; every rank must call, and all get all."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [value]
    everyone = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone
