"""What a checkpoint and the configuration that continues it must have in common."""

from __future__ import annotations

from typing import Any

from lf_lightning.types import InputError


def check_same_stage(state: dict[str, Any], *, name: str, num_trained: int) -> None:
    """Refuse to continue a checkpoint of another stage, or of other trained parameters.

    Args:
        state: What the stage wrote into the checkpoint.
        name: The stage that continues.
        num_trained: Parameters that it trains.

    Raises:
        InputError: As said.
    """
    if state["name"] != name:
        raise InputError(
            f"model.class_path: must be {state['name']}, the stage of this checkpoint, got {name}. "
            "Change it, or start without --ckpt_path."
        )
    if state["num_trained"] != num_trained:
        raise InputError(
            f"model.init_args.tuning: must train {state['num_trained']:,} parameters as the checkpoint does, "
            f"got {num_trained:,}. Use the run's own backbone and tuning."
        )
