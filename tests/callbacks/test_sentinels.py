"""Each sentinel speaks when what it looks for is there, and is silent when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lf_lightning import RunCheckpoint
from lf_lightning.callbacks import ChangedWeights, GradientReach, LaggingRank, Quarantine
from lf_lightning.types import InputError, TrainingStopped
from tests.callbacks.python_run import fit
from tests.cli.runs import losses


class Breaks(Callback):
    """Make the second step's loss or gradient a NaN, and keep its rows."""

    def __init__(self, what: str) -> None:
        self.what, self.rows = what, ()

    def on_train_batch_start(self, trainer: Trainer, stage: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            self.rows = batch.rows()
            if self.what == "loss":
                self.parameter = next(stage.parameters())
                self.kept = self.parameter.detach().clone()
                with torch.no_grad():
                    self.parameter.fill_(torch.nan)

    def on_before_optimizer_step(self, trainer: Trainer, stage: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            if self.what == "loss":
                with torch.no_grad():
                    self.parameter.copy_(self.kept)
            elif self.what == "gradient":
                next(stage.parameters()).grad.fill_(torch.nan)


def quarantined(folder: Path) -> list[dict[str, Any]]:
    path = folder / "run" / "quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_the_rows_of_a_step_that_is_not_finite_are_quarantined(what: str, policy: str, tmp_path: Path):
    breaks = Breaks(what)
    if policy == "stop":
        with pytest.raises(TrainingStopped, match=f"step 2: the {what} is not finite"):
            fit(tmp_path, breaks, non_finite=policy)
    else:
        fit(tmp_path, breaks, non_finite=policy)
    (line,) = quarantined(tmp_path)
    assert (line["step"], line["rank"]) == (2, 0)
    assert line["found"].startswith(f"{what}: ")
    assert [(row["dataset"], row["row"]) for row in line["rows"]] == list(breaks.rows)
    assert len(breaks.rows) == 4


def test_a_resume_takes_the_quarantine_back_to_its_step(tmp_path: Path):
    fit(tmp_path, Breaks("gradient"), RunCheckpoint(every_n_steps=1), non_finite="skip")
    before = quarantined(tmp_path)
    with (tmp_path / "run" / "quarantine.jsonl").open("a") as handle:
        handle.write('{"step": 3, "ra')  # torn by a kill
    for step in (2, 1):  # after the step that was skipped, then before it: made anew, it is found anew
        state = tmp_path / "run" / "checkpoints" / f"step-{step:08d}" / "trainer_state" / "state.ckpt"
        fit(tmp_path, Breaks("gradient"), RunCheckpoint(every_n_steps=1), ckpt_path=state, non_finite="skip")
        assert quarantined(tmp_path) == before
    assert len(before) == 1


def test_what_is_switched_off_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(tmp_path, Apart(), Breaks("loss"), Quarantine(enabled=False), GradientReach(num_steps=None), non_finite="skip")
    assert quarantined(tmp_path) == []
    assert "got no gradient" not in capsys.readouterr().err


def test_a_run_of_finite_steps_leaves_no_quarantine(tmp_path: Path):
    fit(tmp_path, Breaks("nothing"))
    assert quarantined(tmp_path) == []
    assert len(losses(tmp_path / "run")) == 4


class Apart(Callback):
    """Give the stage a trained parameter that the loss does not depend on."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.apart = nn.Parameter(torch.ones(3))


def test_a_parameter_that_no_gradient_reaches_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(tmp_path, Apart(), GradientReach(num_steps=2))
    lines = [line for line in capsys.readouterr().err.splitlines() if "gradient" in line]
    assert lines == ["1 trained parameters (apart) got no gradient in 2 steps and learn nothing"]


def test_parameters_that_gradients_reach_are_not_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(tmp_path, GradientReach(num_steps=2))
    assert "got no gradient" not in capsys.readouterr().err


class Skips(Callback):
    """Take the gradients of a step away."""

    def on_before_optimizer_step(self, trainer: Trainer, stage: Any, optimizer: Any) -> None:
        if trainer.global_step >= 1:
            for parameter in stage.parameters():
                parameter.grad = None


def test_steps_without_any_gradient_are_not_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fit(tmp_path, Skips(), Apart(), GradientReach(num_steps=2))
    assert "got no gradient" not in capsys.readouterr().err


class Lowers(Callback):
    """Hold the weights in another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def on_fit_start(self, trainer: Trainer, stage: Any) -> None:
        stage.backbone.to(self.dtype)


@pytest.mark.parametrize(("dtype", "speaks"), [(torch.bfloat16, True), (torch.float32, False)])
def test_weights_that_a_step_is_too_small_to_change_are_told(
    dtype: torch.dtype, speaks: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shares = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            shares.append(float(trainer.callback_metrics["train/changed_weights"]))

    fit(tmp_path, Lowers(dtype), ChangedWeights(at_least=0.3), Reads(), lr=1e-5)
    told = [line for line in capsys.readouterr().err.splitlines() if "of the weights have changed" in line]
    assert len(told) == int(speaks)
    assert all(share < 0.3 for share in shares) if speaks else all(share > 0.7 for share in shares)


def test_a_sentinel_changes_no_number(tmp_path: Path):
    for name, callbacks in (("with", [ChangedWeights()]), ("without", [])):
        (tmp_path / name).mkdir()
        fit(tmp_path / name, *callbacks)
    assert losses(tmp_path / "with" / "run") == losses(tmp_path / "without" / "run")


SLOW_COMPUTING = [[0.1, 1.0], [0.1, 2.0], [0.1, 1.0]]
SLOW_DATA = [[0.1, 2.0], [1.1, 1.0], [0.1, 2.0]]
"""The others wait a second for the batch of rank 1, inside what they measure of their own."""
EVEN = [[0.1, 1.0], [0.1, 1.2], [0.2, 0.9]]


@pytest.mark.parametrize(("times", "speaks"), [(SLOW_COMPUTING, True), (SLOW_DATA, True), (EVEN, False)])
def test_a_rank_that_lags_several_intervals_in_a_row_is_named(
    times: list[list[float]], speaks: bool, capsys: pytest.CaptureFixture[str]
):
    sentinel = LaggingRank(ratio=1.5, intervals=3)
    for step in (10, 20):
        sentinel.compare(times, step)
    assert capsys.readouterr().err == ""
    for step in (30, 40):
        sentinel.compare(times, step)
    lines = capsys.readouterr().err.splitlines()
    assert [line[:34] for line in lines] == (["step 30: rank 1 takes 2.1 s for it"] if speaks else [])


def test_a_rank_that_catches_up_is_not_named(capsys: pytest.CaptureFixture[str]):
    sentinel = LaggingRank(ratio=1.5, intervals=2)
    for times in (SLOW_COMPUTING, EVEN, SLOW_COMPUTING, EVEN):
        sentinel.compare(times, 1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradientReach(num_steps=0),
        lambda: ChangedWeights(at_least=1.5),
        lambda: ChangedWeights(sample=0),
        lambda: LaggingRank(ratio=1.0),
        lambda: LaggingRank(intervals=0),
    ],
)
def test_options_out_of_range_are_refused(make: Any):
    with pytest.raises(InputError, match=r"must be .*, got .*\. Try"):
        make()
