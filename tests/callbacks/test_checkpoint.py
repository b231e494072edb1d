"""What is saved when, by whom, and under which name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lf_lightning import RunCheckpoint
from lf_lightning.callbacks import RunFolder, SaveProcessorCallback
from lf_lightning.types import InputError
from tests.callbacks.python_run import fit
from tests.cli.runs import steps


class AddsFiles(Callback):
    """A user's callback that adds a file to every checkpoint."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, bool, bool]] = []

    def on_save_pretrained(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        name = folder.name.removeprefix(".").removesuffix(".tmp")
        weights = (folder / "model.safetensors").is_file()
        self.seen.append((name, (folder.parent / name).exists(), weights))
        (folder / "card.txt").write_text(f"step {trainer.global_step}")


class Breaks(Callback):
    """A user's callback that fails while a checkpoint is written."""

    def on_save_pretrained(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        if trainer.global_step == 4:
            raise RuntimeError("the user's own mistake")


def test_a_callback_adds_its_files_before_the_folder_gets_its_name(tmp_path: Path):
    adds = AddsFiles()
    fit(tmp_path, adds)
    assert adds.seen == [("step-00000002", False, True), ("step-00000004", False, True), ("final", False, True)]
    for folder, text in (("checkpoints/step-00000002", "step 2"), ("final", "step 4")):
        assert (tmp_path / "run" / folder / "card.txt").read_text() == text
        manifest = json.loads((tmp_path / "run" / folder / "manifest.json").read_text())
        assert manifest["files"]["card.txt"]["size"] == 6


def test_a_callback_that_fails_leaves_no_checkpoint_of_this_step(tmp_path: Path):
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        fit(tmp_path, Breaks())
    assert [name for name in steps(tmp_path / "run") if not name.startswith(".")] == ["step-00000002"]
    assert not (tmp_path / "run" / "final").exists()


def test_a_trainer_without_our_callbacks_gets_them_once(tmp_path: Path):
    trainer = fit(tmp_path)
    names = [type(callback).__name__ for callback in trainer.callbacks]
    ours = {"RunFolder", "RunLog", "PlotLoss", "WritePredictions", "SaveProcessorCallback", "RunCheckpoint"}
    assert ours <= set(names)
    assert len(names) == len(set(names))
    assert [type(callback) for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)] == [
        RunCheckpoint
    ]


def test_the_callbacks_of_the_trainer_are_kept(tmp_path: Path):
    mine = RunCheckpoint(every_n_steps=3), RunFolder(overwrite=True), SaveProcessorCallback()
    trainer = fit(tmp_path, *mine)
    assert steps(tmp_path / "run") == ["step-00000003"]
    for callback in mine:
        assert [other for other in trainer.callbacks if type(other) is type(callback)] == [callback]


def test_without_an_interval_only_the_final_folder_is_written(tmp_path: Path):
    fit(tmp_path, RunCheckpoint(every_n_steps=None))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert (tmp_path / "run" / "final" / "manifest.json").is_file()


def test_from_python_too_a_fresh_run_does_not_mix_with_checkpoints(tmp_path: Path):
    fit(tmp_path)
    with pytest.raises(InputError, match="must be a new run folder, got one with 2 complete checkpoints"):
        fit(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "checkpoint.every_n_steps: must be at least 1 or null, got 0"),
        ({"save_top_k": -2}, r"checkpoint.save_top_k: must be -1 \(all\), 0 or more, got -2"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, int], message: str):
    with pytest.raises(InputError, match=message):
        RunCheckpoint(**options)


def test_the_values_of_older_checkpoints_are_part_of_the_state():
    first, second = RunCheckpoint(monitor="val/loss"), RunCheckpoint(every_n_steps=7)
    first.values = {2: 0.5, 4: 0.25}
    second.load_state_dict(first.state_dict())
    assert second.values == {2: 0.5, 4: 0.25}
    assert second.state_key == first.state_key  # whatever the options are
