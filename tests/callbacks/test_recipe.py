"""A run from plain Python is the command line's run, and says so in a configuration that the command line takes."""

from pathlib import Path

import pytest
import yaml

from lf_lightning.__main__ import main
from lf_lightning.callbacks import last_checkpoint
from tests.callbacks.python_run import fit
from tests.cli.runs import config, lightning, log_rows, losses, weights


@pytest.fixture(scope="module")
def python_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    fit(folder)
    return folder / "run"


@pytest.fixture(scope="module")
def command_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    settings = config(folder / "run", data__datasets=[{"path": str(folder / "rows.json")}])
    assert lightning("fit", folder, settings) == 0
    return folder / "run"


def test_the_weights_and_losses_are_those_of_the_command_line_bit_for_bit(python_run: Path, command_run: Path):
    assert losses(python_run) == losses(command_run)
    for folder in ("checkpoints/step-00000002", "checkpoints/step-00000004", "final"):
        assert weights(python_run / folder) == weights(command_run / folder)


def test_the_folder_is_that_of_the_command_line(python_run: Path, command_run: Path):
    names = [
        {path.relative_to(run).as_posix() for path in run.rglob("*") if "lightning_logs" not in path.parts}
        for run in (python_run, command_run)
    ]
    assert names[0] == names[1]


def test_its_configuration_holds_what_was_given_from_python(python_run: Path):
    found = yaml.safe_load((python_run / "config.yaml").read_text())
    assert found["seed_everything"] == 7
    assert found["trainer"]["max_steps"] == 4
    assert found["model"]["class_path"] == "SFT"
    stage = found["model"]["init_args"]
    assert stage["tuning"]["class_path"] == "Full"
    assert stage["optimizer"]["init_args"]["lr"] == 0.01
    assert stage["schedule"]["kind"] == "constant"
    assert stage["backbone"]["architecture"]["hidden_size"] == 16
    assert found["data"]["global_batch_size"] == 4
    assert "backbone" not in found["data"]
    assert "task" not in found["data"]


def test_the_command_line_takes_its_configuration_and_gives_the_same_weights(python_run: Path, tmp_path: Path):
    arguments = ["--config", str(python_run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")]
    assert main(["fit", *arguments]) == 0
    assert weights(tmp_path / "again" / "final") == weights(python_run / "final")
    assert losses(tmp_path / "again") == losses(python_run)


def test_its_checkpoints_are_in_the_configuration_too(python_run: Path, tmp_path: Path):
    arguments = ["--config", str(python_run / "config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")]
    assert main(["fit", *arguments]) == 0
    assert sorted(path.name for path in (tmp_path / "again" / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000004",
    ]


def test_a_plain_trainer_keeps_lightnings_meaning_of_an_integer_interval_and_says_so(tmp_path: Path):
    fit(tmp_path, max_steps=6, val_size=2, val_check_interval=2)  # 10 rows in steps of 4: three steps an epoch
    steps = [row["current_steps"] for row in log_rows(tmp_path / "run") if "eval_loss" in row]
    assert steps == [2, 5]
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert found["trainer"]["val_check_interval"] == 2


def test_from_python_a_run_continues_from_the_last_checkpoint(python_run: Path, tmp_path: Path):
    fit(tmp_path, max_steps=2)
    assert losses(tmp_path / "run") == losses(python_run)[:2]
    fit(tmp_path, ckpt_path=last_checkpoint(tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(python_run)
    assert weights(tmp_path / "run" / "final") == weights(python_run / "final")


def test_the_plainest_trainer_brings_its_logger_and_bar_and_the_same_weights(python_run: Path, tmp_path: Path):
    trainer = fit(tmp_path, enable_progress_bar=True, log_every_n_steps=50)
    assert [type(callback).__name__ for callback in trainer.checkpoint_callbacks] == ["RunCheckpoint"]
    assert weights(tmp_path / "run" / "final") == weights(python_run / "final")
