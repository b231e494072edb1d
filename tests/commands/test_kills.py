"""Where a run is, as seen from outside; kills that hit the whole group; which kills are wanted."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import pytest

from lf_lightning.commands.kills import check_code, group_of, kill_in, started, wait_for, wanted_kills, wrong_begin
from lf_lightning.commands.phases import Moment, begun_at, moment_of
from lf_lightning.types import InputError, TrainingStopped
from tests.cli.runs import config, lightning
from tests.stages.rollout_runs import rolled

MARKS = {"trainer__callbacks": [{"class_path": "lf_lightning.commands.phases.MarkPhases"}]}
VALIDATED = {**MARKS, "data__val_size": 3, "trainer__val_check_interval": 2}


def test_a_run_marks_its_steps_and_validations(here: Path):
    assert lightning("fit", here, config(trainer__max_steps=3, **VALIDATED)) == 0
    lines = (here / "run" / "phases.txt").read_text().splitlines()
    assert list(dict.fromkeys(lines)) == ["step 1", "step 2", "step 3", "validation 2", "step 4", "end 3"]
    assert lines.index("validation 2") < len(lines) - lines[::-1].index("step 3")
    assert begun_at(here / "run") == 0
    (here / "run" / "phases.txt").unlink()
    assert lightning("fit", here, config(trainer__max_steps=4, **VALIDATED), "--ckpt_path", "last") == 0
    assert begun_at(here / "run") == 2


def test_a_run_marks_its_rollouts_too(here: Path):
    assert lightning("fit", here, rolled("PPO", trainer__max_steps=5, **MARKS)) == 0
    lines = (here / "run" / "phases.txt").read_text().splitlines()
    assert [line for line in lines if "rollout" in line] == ["rollout 1", "rollout 5"]  # four steps on each


def test_a_hidden_folder_is_a_save_once_the_run_has_begun(tmp_path: Path):
    (tmp_path / "checkpoints" / ".step-00000006.tmp").mkdir(parents=True)
    assert moment_of(tmp_path) == Moment("start", 0)  # of an earlier kill
    (tmp_path / "phases.txt").write_text("step 6\nstep 7\n")
    assert moment_of(tmp_path) == Moment("save", 6)
    (tmp_path / "checkpoints" / ".step-00000006.tmp").rename(tmp_path / "checkpoints" / "step-00000006")
    assert moment_of(tmp_path) == Moment("step", 7)
    (tmp_path / ".final.tmp").mkdir()
    assert moment_of(tmp_path) == Moment("save", 7)


CHILD = "import time; print('child', flush=True); time.sleep(60)"
PARENT = f"""import subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
Path("child.txt").write_text(str(child.pid))
time.sleep(0.2)
Path("phases.txt").write_text("step 2\\n")
Path("phases.txt").write_text("step 3\\n")
time.sleep(60)
"""


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True


def test_a_kill_waits_for_its_phase_and_takes_the_whole_group(here: Path):
    with group_of(
        started([sys.executable, "-c", PARENT], output=here / "out.txt", environment=dict(os.environ))
    ) as process:
        assert kill_in(process, here, Moment("step", 3), after=0.0)
        assert process.poll() == -9
    child = int((here / "child.txt").read_text())
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)
    assert moment_of(here) == Moment("step", 3)


def test_a_process_that_ends_before_its_phase_was_not_killed(here: Path):
    with group_of(
        started([sys.executable, "-c", "print('done')"], output=here / "out.txt", environment=dict(os.environ))
    ) as process:
        assert not kill_in(process, here, Moment("step", 3), after=0.0)
        assert wait_for(process) == 0
    assert (here / "out.txt").read_text() == "done\n"


def test_the_block_of_a_process_leaves_none_behind(here: Path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with group_of(started(command, output=here / "out.txt", environment=dict(os.environ))) as process:
        assert process.poll() is None
    assert process.poll() == -9


MOMENTS = tuple(
    Moment(phase, step)
    for step in range(1, 10)
    for phase in ("step", "save", "validation")
    if phase == "step" or step % 3 == 0
)


@pytest.mark.parametrize("seed", range(5))
def test_the_wanted_kills_are_one_of_each_phase_and_another_save_in_the_order_of_steps(seed: int):
    wanted = wanted_kills(MOMENTS, None, random.Random(seed))
    assert sorted(at.phase for at in wanted) == ["save", "save", "step", "validation"]
    assert [at.step for at in wanted] == sorted(at.step for at in wanted)
    assert set(wanted) <= set(MOMENTS)
    assert [at.phase for at in wanted_kills(MOMENTS, 1, random.Random(seed))] == ["save"]
    assert wanted == wanted_kills(MOMENTS, None, random.Random(seed))


def test_other_seeds_kill_at_other_steps():
    assert len({tuple(wanted_kills(MOMENTS, None, random.Random(seed))) for seed in range(8)}) > 4


def test_a_process_that_began_elsewhere_than_at_the_newest_checkpoint_is_found(tmp_path: Path):
    (tmp_path / "phases.txt").write_text("step 4\nvalidation 4\nstep 5\n")
    assert wrong_begin(tmp_path, 3) is None
    assert wrong_begin(tmp_path, 6) == "began at step 3, where the newest complete checkpoint had step 6"
    (tmp_path / "phases.txt").unlink()
    assert wrong_begin(tmp_path, 6) is None  # nothing was left to train


def test_a_run_that_fails_by_itself_is_told_with_its_own_last_line(tmp_path: Path):
    output = tmp_path / "out.txt"
    check_code(0, output)
    output.write_text("model: 12 parameters\nlf-lightning: error: data.datasets: must be a list. Write one.\n")
    with pytest.raises(InputError, match=r"^data\.datasets: must be a list\. Write one\.$"):
        check_code(2, output)
    with pytest.raises(TrainingStopped, match=r"a run ended with exit code 1: data\.datasets"):
        check_code(1, output)
