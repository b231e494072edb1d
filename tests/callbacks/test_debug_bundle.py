"""What is left behind when an error ends training, and that the error itself comes out unchanged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.types import InputError
from tests.callbacks.python_run import fit

SECRETS = {"HF_TOKEN": "hf_planted_1", "WANDB_API_KEY": "planted-2-wandb", "REWARD_TOKEN": "planted3reward"}


class Fails(Callback):
    """Raise an error at a step, with every secret of the environment in its text."""

    def __init__(self, hook: str = "on_before_optimizer_step", error: type[BaseException] = ZeroDivisionError) -> None:
        self.error = error
        setattr(self, hook, self.fail)

    def fail(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            raise self.error(f"the reason {[os.environ.get(name) for name in SECRETS]}")


def bundle(folder: Path) -> Path:
    return folder / "run" / "debug" / "step-00000003"


def test_the_bundle_names_rows_metrics_configuration_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ZeroDivisionError, match="the reason") as raised:
        fit(tmp_path, Fails())
    assert raised.value.__notes__ == [f"What it was doing is in {bundle(tmp_path)}."]
    rows = json.loads((bundle(tmp_path) / "rows.json").read_text())
    assert [row["dataset"] for row in rows] == ["rows"] * 4
    assert len({row["row"] for row in rows}) == 4
    metrics = json.loads((bundle(tmp_path) / "metrics.json").read_text())
    assert 3 < metrics["train/loss"] < 7
    assert (bundle(tmp_path) / "config.yaml").read_text() == (tmp_path / "run" / "config.yaml").read_text()
    text = (bundle(tmp_path) / "traceback.txt").read_text()
    assert "ZeroDivisionError: the reason" in text
    assert "<HF_TOKEN>" in text
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert not [name for name, value in SECRETS.items() if value.encode() in path.read_bytes()], path


def test_the_rows_are_those_of_the_step(tmp_path: Path):
    seen: list[tuple[str, int]] = []

    class Looks(Fails):
        def on_train_batch_start(self, trainer: Trainer, stage: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                seen.extend(batch.rows())

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Looks())
    rows = json.loads((bundle(tmp_path) / "rows.json").read_text())
    assert [(row["dataset"], row["row"]) for row in rows] == seen


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_no_bundle_is_left_by_what_is_no_error(error: type[BaseException], tmp_path: Path):
    with pytest.raises(SystemExit):
        fit(tmp_path, Fails(error=error))
    assert not (tmp_path / "run" / "debug").exists()


def test_no_bundle_is_left_by_input_that_is_refused_before_the_first_step(tmp_path: Path):
    class Refuses(Callback):
        def on_train_start(self, *_: Any) -> None:
            raise InputError("no")

    with pytest.raises(InputError):
        fit(tmp_path, Refuses())
    assert not (tmp_path / "run" / "debug").exists()


def test_an_error_comes_out_where_the_bundle_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Blocks(Fails):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            (run_folder(trainer) / "debug").touch()

    with pytest.raises(ZeroDivisionError) as raised:
        fit(tmp_path, Blocks())
    assert "cannot be written" in capsys.readouterr().err
    assert not hasattr(raised.value, "__notes__")


def test_an_error_of_validation_names_the_rows_that_are_validated(tmp_path: Path):
    options = {"val_size": 3, "val_check_interval": 2, "check_val_every_n_epoch": None}
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, Fails("on_validation_batch_end"), **options)
    assert len(json.loads((bundle(tmp_path) / "rows.json").read_text())) == 3
