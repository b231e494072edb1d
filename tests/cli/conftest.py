"""Places where commands run."""

import sys
from pathlib import Path

import pytest

from tests.cli.runs import build_model, config, lightning


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; what a command adds to the import path goes with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with the byte tokenizer; copy it before changing it."""
    return build_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of every weight, with checkpoints at steps 2 and 4; copy it before changing it."""
    folder = tmp_path_factory.mktemp("full")
    assert (
        lightning("fit", folder, config(data__datasets=[{"path": str(folder / "rows.json")}], run=folder / "run")) == 0
    )
    return folder / "run"


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The same of a LoRA of rank 2 on the folder of `model`."""
    folder = tmp_path_factory.mktemp("lora")
    settings = config(data__datasets=[{"path": str(folder / "rows.json")}], run=folder / "run", lora=model)
    assert lightning("fit", folder, settings) == 0
    return folder / "run"
