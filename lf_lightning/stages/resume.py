"""What a checkpoint remembers of a stage, and what it and the configuration that continues it must have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lf_lightning.models.export import save_named_weights, unnamed_weights
from lf_lightning.optim.state_files import whole_states
from lf_lightning.stages.row_files import SavesRows
from lf_lightning.types import InputError, Isolation

if TYPE_CHECKING:
    from pathlib import Path

    from lf_lightning.stages.base import Stage


def state_of(stage: Stage) -> dict[str, Any]:
    """What a resume needs beside weights, optimizer and cursor; tensors and plain Python."""
    return {
        "name": type(stage).__name__,
        "isolation": stage.isolation and tuple(stage.isolation),
        "num_trained": stage.backbone.num_parameters()[0],
        "total_tokens": stage.tokens.total,
        "num_skipped_steps": stage.guard.num_skipped_steps,
        "memory": dict(stage.memory),
        "own": stage.own_state(),
    }


def restore(stage: Stage, state: dict[str, Any]) -> None:
    """Give a stage back what `state_of` wrote.

    Raises:
        InputError: It is the state of another stage, or of other trained parameters.
    """
    check_same_stage(state, name=type(stage).__name__, num_trained=stage.backbone.num_parameters()[0])
    stage.isolation = Isolation(*state["isolation"]) if state["isolation"] else None
    stage.tokens.total, stage.guard.num_skipped_steps = state["total_tokens"], state["num_skipped_steps"]
    stage.memory = dict(state["memory"])
    stage.take_own_state(state["own"])


def save_unnamed_weights(stage: Stage, folder: Path) -> None:
    """Write to a checkpoint's trainer_state/ what its own files do not hold by our names; every rank must call."""
    writes = stage.trainer.is_global_zero
    names = unnamed_weights(stage.backbone, folder) if writes and (folder / "trainer_state").is_dir() else []
    names = stage.trainer.strategy.broadcast(names)
    save_named_weights(stage.backbone, names, folder, writes=writes)


def use_any_optimizer_state(stage: Stage, checkpoint: dict[str, Any], folder: Path) -> None:
    """Put together what ranks wrote in parts, where this run's optimizer has whole parameters."""
    if not isinstance(stage.trainer.strategy, SavesRows):
        checkpoint["optimizer_states"] = whole_states(checkpoint["optimizer_states"], folder)


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
