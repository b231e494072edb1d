"""FSDP2 against DDP in bfloat16 on one GPU, and a run that is killed and goes on there; skipped where there is none.

The same runs on a CPU, of a tiny model, show that the test itself works (`make test-long`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.runs import LLAMA, config, losses, weights, write

LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
"""Llama-3.2-1B but for its words: 0.97 billion parameters."""
PLACES = [
    pytest.param(
        "gpu",
        LLAMA_1B,
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
    ),
    pytest.param("cpu", LLAMA, marks=pytest.mark.slow),
]
ROUNDING = 2**-7
"""Relative difference of losses that products in bfloat16 (8 bits) may make."""
PATIENCE = 600
ROWS = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(20, 60)]


def command(here: Path, root: Path, name: str, settings: dict[str, Any], *more: str) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, with what it says in <name>.log."""
    arguments = [sys.executable, "-m", "lf_lightning", "fit", "--config", write(here, settings, f"{name}.yaml"), *more]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with (here / f"{name}.log").open("ab") as log:
        return subprocess.Popen(arguments, cwd=here, stdout=log, stderr=log, env=environment, start_new_session=True)


@pytest.mark.parametrize(("accelerator", "architecture"), PLACES)
def test_fsdp2_has_the_losses_of_ddp_and_goes_on_after_a_kill(
    accelerator: str, architecture: dict[str, Any], here: Path, root: Path
):
    (here / "rows.json").write_text(json.dumps(ROWS))

    def settings(name: str, strategy: str) -> dict[str, Any]:
        return config(
            name,
            trainer__accelerator=accelerator,
            trainer__strategy=strategy,
            trainer__precision="bf16-mixed",
            trainer__max_steps=12,
            checkpoint__every_n_steps=4,
            checkpoint__save_top_k=0,
            data__max_length=512,
            **{"model.init_args.backbone.architecture": architecture, "model.init_args.optimizer.init_args.lr": 1e-4},
        )

    def finish(name: str, strategy: str, *more: str) -> None:
        process = command(here, root, name, settings(name, strategy), *more)
        assert process.wait(PATIENCE) == 0, (here / f"{name}.log").read_text()[-3000:]

    finish("ddp", "ddp")
    finish("fsdp2", "fsdp2")
    assert losses(here / "fsdp2") == pytest.approx(losses(here / "ddp"), rel=ROUNDING)
    assert losses(here / "fsdp2")[-1] < losses(here / "fsdp2")[0]

    killed = command(here, root, "killed", settings("killed", "fsdp2"))
    deadline = time.monotonic() + PATIENCE
    while not (here / "killed" / "checkpoints" / "step-00000004" / "manifest.json").exists():
        assert killed.poll() is None, (here / "killed.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    finish("killed", "fsdp2", "--ckpt_path", "last")
    assert losses(here / "killed") == losses(here / "fsdp2")
    assert weights(here / "killed" / "final") == weights(here / "fsdp2" / "final")
