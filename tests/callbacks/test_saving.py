"""A checkpoint that cannot be written, or that does not hold what was trained, stops the run in one line."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file, save_file

from lf_lightning import SFT, AdamW, BackboneSpec, DataModule, LoRA, RunCheckpoint, ScheduleSpec
from lf_lightning.callbacks.folder import check_whole, complete_checkpoints
from lf_lightning.callbacks.saving import reason
from lf_lightning.types import TrainingStopped
from tests.callbacks.python_run import fit
from tests.cli.runs import ROWS, build_model, steps

GOOD = "step-00000002"


class At(Callback):
    """Does something at a step, before the checkpoint of the step is written or while it is."""

    def __init__(self, act: Callable[[Trainer, Path], Any], *, step: int = 4, within: bool = True) -> None:
        self.act, self.step, self.within = act, step, within

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not self.within and trainer.global_step == self.step:
            self.act(trainer, Path(trainer.default_root_dir))

    def on_save_pretrained(self, trainer: Trainer, pl_module: Any, folder: Path) -> None:
        if self.within and trainer.global_step == self.step:
            self.act(trainer, folder)


@contextmanager
def files_of_any_size() -> Iterator[None]:
    """Put the limit of the process back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full_at(size: int) -> Callable[[Trainer, Path], None]:
    """A disk on which no file grows beyond a size."""
    return lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def stopped(folder: Path, *callbacks: Callback, **options: Any) -> str:
    with files_of_any_size(), pytest.raises(TrainingStopped) as caught:
        fit(folder, *callbacks, **options)
    return str(caught.value)


def check_that_the_good_one_stays(run: Path) -> None:
    assert steps(run) == [GOOD], "nothing half made is left"
    check_whole(run / "checkpoints" / GOOD)
    assert not (run / "final").exists()


# ---------------------------------------------------------------------- what cannot be written


@pytest.mark.parametrize("size", [20_000, 60_000], ids=["weights", "state"])
def test_a_full_disk_stops_with_the_last_good_checkpoint_named(tmp_path: Path, size: int):
    run = tmp_path / "run"
    line = stopped(tmp_path, At(full_at(size), within=False))
    files = [path.stat().st_size for path in (run / "checkpoints" / GOOD).rglob("*") if path.is_file()]
    assert any(bytes_ > size for bytes_ in files)
    assert line.startswith(f"{run}/checkpoints/step-00000004: cannot be saved, got ")
    assert "File too large" in line
    assert f"The last good checkpoint is {run}/checkpoints/{GOOD}. Make room or mend the folder" in line
    check_that_the_good_one_stays(run)


def test_a_folder_that_has_become_a_file_stops_in_one_line(tmp_path: Path):
    def replace(trainer: Trainer, run: Path) -> None:
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("")

    line = stopped(tmp_path, At(replace, within=False))
    assert "cannot be saved, got " in line
    assert line.endswith("There is no checkpoint yet. Make room or mend the folder, and start again.")


@pytest.mark.parametrize(
    ("every", "want"), [(1, "cannot be written, got No such file"), (100, "a run folder that somebody has emptied")]
)
def test_a_run_folder_that_is_removed_is_not_begun_again_in_silence(every: int, want: str, tmp_path: Path):
    removes = At(lambda _, run: shutil.rmtree(run), step=3, within=False)
    line = stopped(tmp_path, removes, log_every_n_steps=every, max_steps=6)
    assert want in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_log_that_cannot_be_written_stops_with_the_last_good_checkpoint_named(tmp_path: Path):
    def fill(trainer: Trainer, run: Path) -> None:
        (run / "trainer_log.jsonl").unlink()
        (run / "trainer_log.jsonl").symlink_to("/dev/full")

    line = stopped(tmp_path, At(fill, step=3, within=False))
    assert "trainer_log.jsonl: cannot be written, got No space left on device" in line
    assert f"The last good checkpoint is {tmp_path}/run/checkpoints/{GOOD}." in line


def test_an_error_of_a_library_is_said_in_one_line():
    assert reason(OSError(28, "No space left on device", "a/b")) == "No space left on device (a/b)"
    assert reason(RuntimeError("two\n  lines.")) == "two lines"


# ---------------------------------------------------------------------- what does not hold what was trained


def without_one(_: Trainer, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_shape(_: Trainer, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_short(_: Trainer, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def not_finite(trainer: Trainer, run: Path) -> None:
    with torch.no_grad():
        trainer.lightning_module.backbone.causal_lm.lm_head.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("harm", "within", "want"),
    [
        (without_one, True, "a folder without the trained parameter model.layers.1.mlp.up_proj.weight"),
        (of_another_shape, True, "model.norm.weight of shape (3,) instead of (16,)"),
        (cut_short, True, "a folder that cannot be read again: "),
        (not_finite, False, "numbers that are not finite in lm_head.weight"),
    ],
)
def test_a_folder_that_does_not_hold_what_was_trained_gets_no_name(
    harm: Callable[..., None], within: bool, want: str, tmp_path: Path
):
    line = stopped(tmp_path, At(harm, within=within))
    assert f"step-00000004: cannot be saved, got {want}" in line
    assert f"The last good checkpoint is {tmp_path}/run/checkpoints/{GOOD}." in line
    check_that_the_good_one_stays(tmp_path / "run")


class PutsBack(Callback):
    """Gives the adapter its first weights back after every step."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.first = {name: each.detach().clone() for name, each in pl_module.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        for name, each in pl_module.named_parameters():
            each.copy_(self.first[name])


def fit_adapter(folder: Path, *callbacks: Callback, lr: float = 1e-2) -> Trainer:
    backbone = BackboneSpec(path=str(build_model(folder / "model")))
    stage = SFT(backbone, LoRA(rank=2), AdamW(lr=lr), ScheduleSpec(kind="linear", warmup_steps=2))
    data = DataModule(backbone, datasets=[{"records": ROWS}], max_length=96, global_batch_size=4, cache_dir=None)
    saves = RunCheckpoint(every_n_steps=1)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "devices": 1}
    trainer = Trainer(max_steps=3, default_root_dir=folder / "run", callbacks=[*callbacks, saves], **quiet)
    trainer.fit(stage, data)
    return trainer


def test_an_adapter_that_training_does_not_reach_is_not_saved(tmp_path: Path):
    with pytest.raises(TrainingStopped, match="an adapter that 1 steps with a gradient have not changed since step 0"):
        fit_adapter(tmp_path, PutsBack())
    # the learning rate of the first step is 0: an adapter that has not changed yet is as it must be
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["step-00000001"]


def test_an_adapter_that_learns_is_saved(tmp_path: Path):
    fit_adapter(tmp_path)
    assert len(complete_checkpoints(tmp_path / "run")) == 3
