"""A run is one folder: how it begins, how it goes on, and what configuration it had."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import complete_checkpoints, put_back, remove_checkpoint, run_folder, step_of
from lf_lightning.callbacks.merged_base import BASE
from lf_lightning.callbacks.recipe import recipe_of
from lf_lightning.callbacks.run_log import CSV, JSONL, QUARANTINE, RESULTS, SAMPLES, cut_logs, last_values
from lf_lightning.callbacks.secrets import without_secrets
from lf_lightning.console import say
from lf_lightning.types import InputError

OF_A_RUN = (
    "config.yaml",
    JSONL,
    CSV,
    RESULTS,
    SAMPLES,
    "final",
    BASE,
    "generated_predictions.jsonl",
    "debug",
    QUARANTINE,
)


class RunFolder(Callback):
    """Begin a run in an empty folder, or continue the one that is there.

    Args:
        overwrite: Start afresh although the folder holds complete checkpoints, which are removed.
        config: Text of config.yaml; empty means what the trainer, the stage and the data say of themselves.
    """

    def __init__(self, *, overwrite: bool = False, config: str | None = None) -> None:
        self.overwrite, self.config = overwrite, config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear up: only now does a trainer say whether it continues.

        Raises:
            InputError: The folder holds checkpoints that a fresh start would mix with its own.
        """
        folder = run_folder(trainer)
        make_writable(folder)
        checkpoints = complete_checkpoints(folder)
        elsewhere = trainer.ckpt_path and Path(trainer.ckpt_path).resolve().parents[3] != folder.resolve()
        if elsewhere or (trainer.ckpt_path is None and not self.overwrite):
            refuse_mixing(folder)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            _remove_leftovers(folder)
            if trainer.ckpt_path is None:
                _move_previous(folder, checkpoints)
            else:
                _continue(folder, Path(trainer.ckpt_path))
            text = without_secrets(self.config or recipe_of(trainer, pl_module))
            (folder / "config.yaml").write_text(text)
            self._text = text
        trainer.strategy.barrier()

    def on_save_pretrained(self, trainer: Trainer, pl_module: LightningModule, folder: Path) -> None:
        """Put a model card beside the weights of final/."""
        if trainer.is_global_zero and not (folder / "trainer_state").exists():
            (folder / "README.md").write_text(without_secrets(model_card(trainer, pl_module, self._text)))


def make_writable(folder: Path) -> None:
    """Make the run folder.

    Raises:
        InputError: It cannot be made, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"trainer.default_root_dir: must be a folder that can be written, got {folder} ({error.strerror}). "
            "Choose another."
        ) from error


def refuse_mixing(folder: Path) -> None:
    """Refuse to start afresh where complete checkpoints lie.

    Raises:
        InputError: As said.
    """
    checkpoints = complete_checkpoints(folder)
    if checkpoints:
        raise InputError(
            f"{folder}: must be a new run folder, got one with {len(checkpoints)} complete checkpoints. "
            "Continue with --ckpt_path last, or start afresh with --overwrite true."
        )


def model_card(trainer: Trainer, stage: Any, config: str) -> str:
    """A model card in the hub's form: base model, data, last values, configuration."""
    spec = stage.backbone_spec
    data = trainer.datamodule  # type: ignore[attr-defined]
    names = [_shown(entry) for entry in data.names["train"]] if data is not None else []
    metrics = dict(sorted(last_values(trainer).items()))
    head = ["---", "library_name: " + ("peft" if stage.backbone.is_adapter else "transformers")]
    head += [f"base_model: {spec.path}"] if spec.path else []
    kind = "reward-model" if stage.task == "rm" else "text-generation"
    head += [f"tags: [lf-lightning, {kind}]", "---", ""]
    body = [f"# {run_folder(trainer).name}", "", f"Trained by lf_lightning's {type(stage).__name__} stage.", ""]
    body += [f"- base model: {spec.path or 'none, built from an architecture'}", f"- data: {', '.join(names)}"]
    body += [f"- optimizer steps: {trainer.global_step}", ""]
    table = ["| value | at the end |", "|---|---|"] + [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join([*head, *body, *table, "", "## Configuration", "", "```yaml", config.rstrip(), "```", ""])


def _shown(dataset: str | dict[str, Any]) -> str:
    """A dataset by its name or path; rows that stand in the configuration are not repeated."""
    if isinstance(dataset, str):
        return dataset
    return str(dataset.get("name") or dataset.get("path") or dataset.get("file_name") or "records")


def _remove_leftovers(folder: Path) -> None:
    """Remove what a kill has left unfinished; a final folder that it has caught between two names comes back."""
    put_back(folder / "final")
    for path in (*folder.glob(".*.tmp"), *folder.glob(".*.old"), *(folder / "checkpoints").glob(".*")):
        _remove(path)
    for path in (folder / "checkpoints").glob("step-*"):
        if step_of(path) is not None and path not in complete_checkpoints(folder):
            remove_checkpoint(path)


def _move_previous(folder: Path, checkpoints: list[Path]) -> None:
    """Move the files of an older run aside."""
    for checkpoint in checkpoints:
        remove_checkpoint(checkpoint)
    found = [folder / name for name in OF_A_RUN if (folder / name).exists()]
    found += [*folder.glob("config.*.yaml"), *folder.glob("training_*.png")]
    if not found:
        return
    previous = _next_previous(folder)
    previous.mkdir()
    for path in found:
        path.rename(previous / path.name)
    say(f"moved the files of an older run to {previous}")


def _next_previous(folder: Path) -> Path:
    number = 1 + max((int(path.name.split("-")[1]) for path in folder.glob("previous-[0-9]*")), default=0)
    return folder / f"previous-{number}"


def _continue(folder: Path, ckpt_path: Path) -> None:
    """Take the logs back to the checkpoint's step, and keep the configuration that led to it."""
    step = step_of(ckpt_path.parent.parent) or int(torch.load(ckpt_path, weights_only=True)["global_step"])
    cut_logs(folder, step)
    later = [path for path in complete_checkpoints(folder) if (step_of(path) or 0) > step]
    if later:
        previous = _next_previous(folder) / "checkpoints"
        previous.mkdir(parents=True)
        for path in later:
            path.rename(previous / path.name)
        say(f"moved {len(later)} checkpoints after step {step} to {previous}")
    if (folder / "config.yaml").is_file():
        (folder / "config.yaml").rename(folder / f"config.{step}.yaml")
    say(f"continuing at step {step} from {ckpt_path.parent.parent}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
