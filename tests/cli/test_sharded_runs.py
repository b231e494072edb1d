"""Runs over two ranks that share one model, as a user starts, kills and continues them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lf_lightning.__main__ import main
from tests.cli.runs import config, lightning, losses, steps, weights, write
from tests.ranks import fork_ranks

LIMIT = 400
"""Seconds that a run may take on a busy machine."""


def start(folder: Path, settings: dict[str, Any], *arguments: str) -> subprocess.Popen[bytes]:
    """The command in a process group of its own."""
    path = write(folder, settings, f"{Path(settings['trainer']['default_root_dir']).name}.yaml")
    command = [sys.executable, "-m", "lf_lightning", "fit", "--config", path, *arguments]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)


def run(folder: Path, settings: dict[str, Any], *arguments: str) -> None:
    """The command on two ranks that a launcher has started; both end well."""
    command = ["fit", "--config", write(folder, settings), *arguments]

    def on_a_rank() -> None:
        assert main(command) == 0

    fork_ranks(on_a_rank, 2, folder)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End both ranks at once, as a power cut would."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def shared(run: Path, strategy: str = "fsdp2", **changes: Any) -> dict[str, Any]:
    """A run over two ranks."""
    more = {"trainer__devices": 2, "trainer__strategy": strategy, "trainer__max_steps": 6, **changes}
    return config(run, checkpoint__every_n_steps=2, **more)


def furthest(one: Path, other: Path) -> float:
    """Largest difference of a weight of two final folders, relative to the largest of its tensor."""
    got, want = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want)


def test_a_run_that_shares_its_model_is_killed_and_continued_on_any_ranks(here: Path) -> None:
    run(here, shared(here / "straight"))
    killed = start(here, shared(here / "killed"))
    try:
        manifest = here / "killed" / "checkpoints" / "step-00000002" / "manifest.json"
        end = time.monotonic() + LIMIT
        while not manifest.exists() and killed.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
    finally:
        kill(killed)
    assert manifest.exists(), (here / "log").read_text()[-3000:]
    shutil.copytree(here / "killed", here / "others")
    run(here, shared(here / "killed"), "--ckpt_path", "last")
    assert weights(here / "killed" / "final") == weights(here / "straight" / "final")
    assert losses(here / "killed") == losses(here / "straight")

    for later in steps(here / "others")[1:]:  # where the kill came late
        shutil.rmtree(here / "others" / "checkpoints" / later)
    alone = config(here / "others", trainer__max_steps=4, checkpoint__every_n_steps=2)
    assert lightning("fit", here, alone, "--ckpt_path", "last") == 0
    run(here, shared(here / "others", "ddp"), "--ckpt_path", "last")
    assert steps(here / "others") == [f"step-{step:08d}" for step in (2, 4, 6)]
    assert furthest(here / "others" / "final", here / "straight" / "final") < 1e-4
    names = [sorted(path.name for path in (here / run / "final").iterdir()) for run in ("others", "straight")]
    assert names[0] == names[1], "the same files whatever the strategy"
    state = torch.load(here / "straight/checkpoints/step-00000002/trainer_state/state.ckpt", weights_only=True)
    assert state["state_dict"] == {}


def test_bf16_mixed_trains_where_the_model_is_shared(here: Path) -> None:
    settings = shared(here / "run", trainer__precision="bf16-mixed", trainer__max_steps=3)
    run(here, settings)
    found = losses(here / "run")
    assert len(found) == 3
    assert found[2] < found[0] - 0.2
