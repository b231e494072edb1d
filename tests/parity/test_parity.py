"""Our runs of LlamaFactory's recorded files log its losses, step by step."""

import json
import shutil
from pathlib import Path

import pytest

from lf_lightning.__main__ import main
from tests.cli.runs import log_rows
from tests.conftest import ROOT

FACTORS = {"pt": 256 / 255, **dict.fromkeys(("sft", "sft_lora", "sft_freeze", "rm", "dpo", "dpo_lora", "kto"), 1.0)}
"""LlamaFactory divides loss and gradient of pt by 256 labels a block, of which 255 are predicted."""


@pytest.mark.parametrize("name", FACTORS)
def test_each_step_is_the_recorded_one(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: Path):
    for folder in ("model", "model-vh", "adapter", "data"):
        shutil.copytree(parity / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    settings = ROOT / "tests" / "parity" / f"{name}.yaml"
    assert main(["fit", "--config", str(settings), "--data.cache_dir", "null"]) == 0
    got, want = log_rows(tmp_path / "runs" / name), json.loads((parity / f"{name}.json").read_text())
    assert len(want) == 8
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] * FACTORS[name] for row in want], abs=1e-3)
    assert [row["lr"] for row in got] == pytest.approx([row["learning_rate"] for row in want], rel=1e-9)
    norms = [row["grad_norm"] * FACTORS[name] for row in want]
    assert [row["grad_norm"] for row in got] == pytest.approx(norms, rel=1e-3)
