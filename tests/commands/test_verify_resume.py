"""`lf-lightning verify-resume`: equal where resume is exact, not equal where it is not; the user's folder stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lf_lightning.__main__ import main
from lf_lightning.commands import verify_resume
from lf_lightning.commands.phases import Moment
from tests.cli.runs import INIT, config, write
from tests.faults.forks import Fork, fit_in_fork
from tests.stages.judgement_runs import judged
from tests.stages.rollout_runs import rolled

USER_CODE = Path(__file__).with_name("user_code.py")
SLOW_STEPS = {"data__micro_batch_size": 1}
"""Long enough to be hit."""


def forked(command: list[str], *, output: Path, environment: dict[str, str]) -> Any:
    """Starts the same command as the package does, without the seconds that imports take."""
    assert command[:4] == [sys.executable, "-m", "lf_lightning", "fit"]
    return fit_in_fork(Path.cwd(), output, command[4:])()


@pytest.fixture
def scratch(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scratch folders are made; processes are forked."""
    monkeypatch.setattr(verify_resume, "started", forked)
    (here / "scratch").mkdir()
    return here / "scratch"


def verified(scratch: Path, settings: dict[str, Any], *arguments: str) -> int:
    path = write(scratch.parent, settings)
    return main(["verify-resume", "--config", path, "--scratch", str(scratch), *arguments])


def test_a_run_that_resumes_exactly_is_called_equal(scratch: Path, capsys: pytest.CaptureFixture[str]):
    settings = config(data__val_size=3, trainer__max_steps=2, trainer__max_time="00:00:00:01", **SLOW_STEPS)
    assert verified(scratch, settings, "--kills", "2") == 0
    *rows, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith("equal, bit for bit, after ")
    assert verdict.endswith(" kills in 9 steps")
    assert rows[0].split() == ["kill", "hit", "resumed", "from", "compared", "verdict"]
    assert [row.split()[0] for row in rows[1:]] == [*map(str, range(1, len(rows) - 1)), "end"]
    assert all(row.endswith("equal") for row in rows[1:])
    assert any(" save " in row for row in rows)
    assert "final weights (21 values, " in rows[-1]
    assert "log (" in rows[-1]
    assert list(scratch.iterdir()) == []
    assert not (scratch.parent / "run").exists()


COUNTING = {"class_path": "RewardFunction", "init_args": {"function": f"{USER_CODE}:counting"}}
NUDGE = {"trainer__callbacks": ["tests.commands.user_code.Nudge"]}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        pytest.param(config(**SLOW_STEPS, **NUDGE), 4, id="a callback that changes weights", marks=pytest.mark.slow),
        pytest.param(
            rolled("PPO", **{f"{INIT}.rewards": [COUNTING]}),
            18,
            id="a reward with hidden state",
        ),
    ],
)
def test_a_run_that_does_not_is_found_out(
    settings: dict[str, Any], steps: int, scratch: Path, capsys: pytest.CaptureFixture[str]
):
    assert verified(scratch, settings, "--kills", "1", "--steps", str(steps)) == 1
    *rows, verdict, kept = capsys.readouterr().out.splitlines()
    assert verdict.startswith("not equal after ")
    assert "final weights: model.safetensors: lm_head.weight: " in verdict
    assert " straight, " in verdict
    assert rows[-1].startswith("end ")
    (folder,) = scratch.iterdir()
    assert kept == f"both runs, and what they printed: {folder}"
    assert (folder / "straight" / "final").is_dir()
    assert (folder / "run" / "final").is_dir()
    assert f"step {steps}/{steps}" in (folder / "output.txt").read_text()


@pytest.mark.slow
def test_the_folder_of_the_user_is_left_alone_and_the_scratch_folder_kept_where_one_asks(
    here: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text("mine")
    settings = config(**SLOW_STEPS, trainer__logger={"class_path": "CSVLogger", "init_args": {"save_dir": "run"}})
    assert verified(scratch, settings, "--kills", "1", "--steps", "3", "--keep", "true") == 0
    (folder,) = scratch.iterdir()
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(folder))
    saved = sorted(path.name for path in (folder / "straight" / "checkpoints").iterdir())
    assert saved == ["step-00000001", "step-00000002", "step-00000003"]
    assert [path.name for path in (here / "run").iterdir()] == ["config.yaml"]
    assert (here / "run" / "config.yaml").read_text() == "mine"


BAD: dict[str, list[str]] = {
    "--ckpt_path: must be left out, got one: both runs begin afresh.": ["--ckpt_path", "last"],
    "--overwrite: must be left out": ["--overwrite=true"],
    "verify-resume: argument --steps: must be a whole number of at least 3, got '2'": ["--steps", "2"],
    "verify-resume: argument --kills: must be a whole number of at least 1, got '0'": ["--kills", "0"],
    "verify-resume: argument --seed: must be a whole number of at least 0, got '-1'": ["--seed", "-1"],
    "verify-resume: argument --keep: invalid choice: 'yes'": ["--keep", "yes"],
    "data.global_batchsize: there is no such option.": ["--data.global_batchsize", "3"],
    "--scratch: must be a folder that can be written, got absent": ["--scratch", "absent"],
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_exit_code_2(line: str, here: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["verify-resume", "--config", write(here, config()), *BAD[line]]) == 2
    (shown,) = capsys.readouterr().err.splitlines()
    assert shown.startswith(f"lf-lightning: error: {line}")


def test_what_fit_refuses_is_bad_input_too(scratch: Path, capsys: pytest.CaptureFixture[str]):
    (scratch.parent / "rows.json").write_text("[]")
    assert verified(scratch, config()) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "rows.json" in last
    (folder,) = scratch.iterdir()
    assert last.endswith(f"The scratch folder is {folder}.")


def test_kills_wait_for_a_checkpoint():
    moments = [Moment("step", step) for step in (1, 2, 3, 4)] + [Moment("save", step) for step in (2, 4)]
    moments += [Moment("validation", 2), Moment("validation", 3), Moment("rollout", 3)]
    found = verify_resume.after_a_checkpoint(tuple(moments))
    assert found == (("step", 4), ("save", 4), ("validation", 3), ("rollout", 3))


def test_kills_leave_something_to_train():
    moments = [Moment("step", step) for step in range(1, 7)] + [Moment("save", step) for step in (2, 4, 6)]
    found = verify_resume.after_a_checkpoint((*moments, Moment("validation", 6)))
    assert found == (("step", 4), ("step", 5), ("save", 4), ("validation", 6))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        (config(), 9),
        (rolled("PPO"), 9),  # four steps a rollout
        (rolled("PPO", constants={"num_epochs": 3}), 18),  # six
        (rolled("GRPO", data__rollout_size=24), 27),  # twelve
    ],
)
def test_the_steps_cover_two_rollouts_and_more(settings: dict[str, Any], steps: int, here: Path):
    gate = verify_resume.build(["--config", write(here, settings)], "fit")
    assert verify_resume.default_steps(gate) == steps
    every = steps // 3
    given = verify_resume.overrides(gate, here / "scratch", steps)
    assert given[given.index("--checkpoint.every_n_steps") + 1] == str(every)
    assert "--trainer.val_check_interval" not in given


def test_validation_falls_on_one_checkpoint_and_not_on_the_last_step(here: Path):
    gate = verify_resume.build(["--config", write(here, config(data__val_size=3))], "fit")
    given = verify_resume.overrides(gate, here / "scratch", 9)
    assert given[given.index("--checkpoint.every_n_steps") + 1] == "3"
    assert given[given.index("--trainer.val_check_interval") + 1] == "2"


def test_the_help_names_our_own_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["verify-resume", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--steps", "--kills", "--seed", "--keep", "--scratch"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "two ranks", "kto", "ppo"])
def test_as_a_user_would(name: str, here: Path, root: Path, model: Path):
    settings = {
        "lora": lambda: config(lora=model, **SLOW_STEPS),
        "two ranks": lambda: config(trainer__devices=2, trainer__strategy="ddp", data__val_size=3, **SLOW_STEPS),
        "kto": lambda: judged(here, "KTO", **SLOW_STEPS),
        "ppo": lambda: rolled("PPO", data__val_size=3),
    }[name]()
    command = [sys.executable, "-m", "lf_lightning", "verify-resume", "--config", write(here, settings)]
    environment = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(here)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("equal, bit for bit, after ")
    assert not list(here.glob("lf-verify-resume-*"))


@pytest.mark.slow
def test_ranks_that_share_a_model_resume_exactly(here: Path, capsys: pytest.CaptureFixture[str]):
    settings = config(trainer__devices=2, trainer__strategy="fsdp2", data__val_size=3, **SLOW_STEPS)
    (here / "scratch").mkdir()
    assert verified(here / "scratch", settings, "--kills", "1", "--steps", "9") == 0, capsys.readouterr().out
    assert capsys.readouterr().out.splitlines()[-1].startswith("equal, bit for bit, after ")


def test_a_fork_is_the_first_of_its_group(here: Path):
    child = fit_in_fork(here, here / "out.txt", ["--nonsense"])()
    assert isinstance(child, Fork)
    child.process.join(60)
    assert child.poll() == 2
    assert "lf-lightning: error: " in (here / "out.txt").read_text()
