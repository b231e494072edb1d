"""Signals to real processes: where they arrive, what is saved, with which code the run ends, and how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lf_lightning.callbacks.folder import complete_checkpoints
from tests.cli.runs import config, lightning, losses, steps, weights, write
from tests.stages.rollout_runs import fit as roll
from tests.stages.rollout_runs import rolled

LONG: dict[str, Any] = {"trainer__max_steps": 400, "checkpoint__every_n_steps": None}
TWO = {"trainer__devices": 2, "trainer__strategy": "ddp"}
PATIENCE = 240
"""Seconds for a step that takes one on a quiet machine."""


@contextmanager
def fit(here: Path, root: Path, settings: dict[str, Any], *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A fit in a process group of its own, with what it says in out.txt; no process of it is left behind."""
    command = [sys.executable, "-m", "lf_lightning", "fit", "--config", write(here, settings), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with (here / "out.txt").open("wb") as out:
        process = subprocess.Popen(command, cwd=here, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.005)


def has_logged(here: Path, step: int) -> Callable[[], bool]:
    log = here / "run" / "trainer_log.jsonl"
    return lambda: log.is_file() and log.read_text().count('"loss"') >= step


def said(here: Path) -> list[str]:
    return (here / "out.txt").read_text().splitlines()


def children(process: subprocess.Popen[bytes]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def has_begun(pid: int) -> bool:
    """Whether a process is on its way: it has loaded torch."""
    with suppress(OSError):
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    return False


def is_gone(pid: int) -> bool:
    with suppress(OSError):
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_gone(pid):
        assert time.monotonic() < deadline, "the second rank lives on"
        time.sleep(0.05)


def last_step(here: Path) -> int:
    (newest,) = complete_checkpoints(here / "run")
    step = int(newest.name.removeprefix("step-"))
    assert f"interrupted after step {step}: saved run/checkpoints/{newest.name}" in said(here)[-1]
    assert said(here)[-1].endswith("continue with --ckpt_path last")
    assert not (here / "run" / "final").exists()
    assert "Traceback" not in "".join(said(here))
    return step


@pytest.mark.slow
def test_a_run_that_was_interrupted_twice_ends_with_the_weights_of_one_that_was_not(here: Path, root: Path):
    assert lightning("fit", here, config("straight", trainer__max_steps=40, checkpoint__every_n_steps=None)) == 0
    settings = config(trainer__max_steps=40, checkpoint__every_n_steps=None)
    for number in (1, 2):
        with fit(here, root, settings, "--ckpt_path", "last") as process:
            wait_for(has_logged(here, 6 * number), process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 143
    assert len(steps(here / "run")) == 2
    assert lightning("fit", here, settings, "--ckpt_path", "last") == 0
    assert weights(here / "run" / "final") == weights(here / "straight" / "final")
    assert losses(here / "run") == losses(here / "straight")


RECEIVERS = [
    ("group", signal.SIGTERM, 143),
    pytest.param("second", signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param("first", signal.SIGTERM, 143, marks=pytest.mark.slow),
    pytest.param("group", signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param("second", signal.SIGUSR1, 138, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("receiver", "number", "code"), RECEIVERS)
def test_of_two_ranks_all_end_when_any_gets_a_signal(
    receiver: str, number: signal.Signals, code: int, here: Path, root: Path
):
    with fit(here, root, config(**LONG, **TWO)) as process:
        wait_for(has_logged(here, 3), process)
        (other,) = children(process)
        if receiver == "group":
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if receiver == "first" else other, number)
        assert process.wait(PATIENCE) == code
        wait_until_gone(other)
    assert last_step(here) == len(losses(here / "run"))
    assert len([line for line in said(here) if "interrupted" in line]) == 1


def test_a_signal_in_the_midst_of_a_rollout_waits_for_the_step_on_it(here: Path):
    whole = roll(here, "PPO", "straight")
    (here / "rule.py").write_text(
        "import signal\n"
        "from tests.stages.contract_rewards import spread\n"
        "from pathlib import Path\n"
        "def rule(prompts, responses, batch):\n"
        "    if not Path('sent').exists():\n"
        "        Path('sent').touch()\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "    return spread(prompts, responses, batch)\n"
    )
    reward = {"class_path": "RewardFunction", "init_args": {"function": "rule.py:rule"}}
    settings = rolled("PPO", **{"model.init_args.rewards": [reward], "checkpoint__every_n_steps": None})
    assert lightning("fit", here, settings) == 143
    assert steps(here / "run") == ["step-00000001"]
    assert lightning("fit", here, settings, "--ckpt_path", "last") == 0
    assert weights(here / "run" / "final") == weights(whole / "final")


def test_before_training_a_signal_ends_the_run_with_one_line(here: Path, root: Path):
    with fit(here, root, config(**LONG, **TWO)) as process:
        wait_for(lambda: any(map(has_begun, children(process))), process)
        (other,) = children(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 143
        wait_until_gone(other)
    assert said(here) == ["lf-lightning: ended by SIGTERM"]


def test_before_training_ctrl_c_ends_the_run_with_one_line(here: Path, root: Path):
    with fit(here, root, config(**LONG)) as process:
        wait_for(lambda: has_begun(process.pid), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    assert said(here) == ["lf-lightning: interrupted"]
