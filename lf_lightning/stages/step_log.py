"""What is logged of an optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lf_lightning.callbacks.run_log import log_is_due

if TYPE_CHECKING:
    from lf_lightning.stages.base import Stage

HEADLINES = ("loss", "reward")
"""What the progress bar shows, where a stage reports it."""


def log_step(stage: Stage, means: dict[str, float], num_tokens: int, *, learning_rate: float) -> None:
    """Log the step just made where it is due: the loss of this very step, so that a resumed run logs the same.

    Args:
        stage: The stage.
        means: Loss, terms and metrics of the step, over all ranks.
        num_tokens: Tokens of the step, over all ranks.
        learning_rate: That the step had.
    """
    stage.tokens.add(num_tokens)
    if not log_is_due(stage.trainer):
        return
    exact, speed = stage.ranks.exact, stage.tokens.per_second()
    reported = stage.reported(means)
    values = {f"train/{name}": value for name, value in reported.items()}
    values["train/grad_norm"] = stage.grad_norm
    values["train/skipped_steps"] = stage.guard.num_skipped_steps
    values["train/learning_rate"] = learning_rate
    stage.log_dict({name: torch.tensor(value, dtype=exact) for name, value in values.items()})
    stage.log("tokens/s", torch.tensor(speed, dtype=exact), prog_bar=True)
    for name in HEADLINES:
        if name in reported:
            stage.log(name, torch.tensor(reported[name], dtype=exact), prog_bar=True, logger=False)
