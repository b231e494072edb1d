"""Draws the curves of a run, raw and smoothed."""

from __future__ import annotations

import math
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.callbacks.run_log import read_log

CURVES = (
    "loss",
    "eval_loss",
    "eval_accuracy",
    "rewards/accuracies",
    "rewards/chosen",
    "reward",
    "eval_reward",
    "objective/kl",
    "eval_kl",
)
"""Fields of trainer_log.jsonl that are drawn, as LlamaFactory's users know them."""


class PlotLoss(Callback):
    """Draw training_loss.png at the end of a run, and the other curves of `CURVES` where they were logged."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw from trainer_log.jsonl."""
        if trainer.is_global_zero:
            for key in CURVES:
                plot_curve(run_folder(trainer), key)


def plot_curve(folder: Path, key: str) -> Path | None:
    """Draw one field of trainer_log.jsonl over optimizer steps.

    Returns:
        The picture, or None where fewer than two points were logged.
    """
    points = [(row["current_steps"], row[key]) for row in read_log(folder) if isinstance(row.get(key), float)]
    if len(points) < 2:
        return None
    from matplotlib.figure import Figure

    steps, values = zip(*points, strict=True)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.4, label="logged")
    axes.plot(steps, smoothed(values), color="tab:blue", label="smoothed")
    axes.set(xlabel="optimizer step", ylabel=key, title=f"{key} of {folder.name}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    path = folder / f"training_{key.replace('/', '_')}.png"
    figure.savefig(path, dpi=100)
    return path


def smoothed(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average whose weight grows with the number of points, as LlamaFactory draws it.

    s_0 = x_0;  s_i = w s_(i-1) + (1 - w) x_i,  w = 1.8 (1 / (1 + exp(-0.05 n)) - 0.5)
    """
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    result = [values[0]]
    for value in values[1:]:
        result.append(weight * result[-1] + (1 - weight) * value)
    return result
