"""Responses to validation prompts: to a file, and to loggers that show text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.callbacks.predictions import Sample
from lf_lightning.callbacks.run_log import SAMPLES

COLUMNS = ("prompt", "response", "reward", "kl")


class WriteSamples(Callback):
    """Append the responses to the validation prompts to samples.jsonl, and show some where a logger takes text.

    Args:
        num_shown: Most responses of a validation that TensorBoard or Weights & Biases shows; the file has all.
    """

    def __init__(self, num_shown: int = 16) -> None:
        self.num_shown = num_shown

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the samples of the set, where the stage made any."""
        samples: list[Sample] = vars(pl_module).get("samples", [])
        if not samples or trainer.sanity_checking or not trainer.is_global_zero:
            return
        step, path = trainer.global_step, run_folder(trainer) / SAMPLES
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as handle:
            for sample in samples:
                handle.write(json.dumps({"current_steps": step, **sample._asdict()}, ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            show_samples(logger, samples[: self.num_shown], step=step)

    on_test_end = on_validation_end


def show_samples(logger: Logger, samples: Sequence[Sample], *, step: int) -> None:
    """Show samples in a logger that takes text; the others have the file.

    Args:
        logger: One of the trainer's.
        samples: What to show.
        step: Optimizer step.
    """
    rows: list[list[Any]] = [[vars_of[name] for name in COLUMNS] for vars_of in (each._asdict() for each in samples)]
    if isinstance(logger, WandbLogger):
        logger.log_text("samples", columns=list(COLUMNS), data=rows, step=step)
    elif isinstance(logger, TensorBoardLogger):
        lines = ["|".join(COLUMNS), "|".join("---" for _ in COLUMNS)]
        lines += ["|".join(_cell(value) for value in row) for row in rows]
        logger.experiment.add_text("samples", "\n".join(f"|{line}|" for line in lines), step)


def _cell(value: Any) -> str:
    """A value in a Markdown table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", "<br>")
