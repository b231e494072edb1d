"""A few kills of the fault harness; `make faults` has the long form."""

from __future__ import annotations

from pathlib import Path

import pytest

from lf_lightning.commands.kills import Kill
from lf_lightning.commands.phases import PHASES, Moment
from tests.faults.harness import Hammered, hammer, lost_steps
from tests.faults.run import Outcome, report, too_few
from tests.faults.stages import CASES


@pytest.mark.parametrize(
    ("stage", "number", "phases"),
    [("sft", 1, ("save", "validation")), ("ppo", 0, ("rollout", "step"))],
)
def test_a_run_that_is_killed_and_resumed_is_the_run_that_never_stopped(
    stage: str, number: int, phases: tuple[str, ...], tmp_path: Path
):
    run = hammer(tmp_path, CASES[stage][number], seed=1, num_kills=3, phases=phases, tries=1)
    assert run.faults == []
    assert 1 <= len(run.kills) <= 3
    assert [each.part for each in run.found if each.num_values] == [each.part for each in run.found]


def killed(phase: str, step: int, newest: int, torn: str | None = None) -> Kill:
    return Kill(Moment(phase, step), Moment(phase, step), newest, torn, None, ())


@pytest.mark.parametrize(
    ("phase", "step", "newest", "lost"),
    [
        ("step", 7, 6, 0),
        ("step", 7, 3, 0),  # the checkpoint of step 6 may not be begun yet
        ("step", 8, 3, 3),
        ("save", 6, 3, 0),
        ("save", 6, 0, 3),
        ("validation", 6, 6, 0),
        ("validation", 6, 3, 3),
        ("rollout", 1, 0, 0),
        ("start", 0, 0, 0),
    ],
)
def test_lost_steps_are_counted_from_the_checkpoint_that_was_complete(phase: str, step: int, newest: int, lost: int):
    assert lost_steps(killed(phase, step, newest)) == lost


def test_the_report_counts_what_went_wrong_and_what_was_not_covered():
    kills = (killed("save", 6, 3), killed("step", 8, 3, torn="step-00000003/model.safetensors: has another hash"))
    text = report([Outcome("sft", "LoRA", 4, Hammered(kills, None, ()))], minutes=2.0)
    assert "| in phase: save | 1 |" in text
    assert "| that left a torn checkpoint which calls itself complete | 1 |" in text
    assert "| steps lost beyond the last complete checkpoint | 3 |" in text
    assert "| sft | LoRA | 4 | step | 8 | 3 | torn | 3 | none yet | equal | equal |" in text
    missing = too_few([Outcome("sft", "LoRA", 4, Hammered(kills, None, ()))])
    assert [f"{kills} kills in phase {phase}" for phase, kills in zip(PHASES, (1, 1, 0, 0), strict=True)] == missing[:4]
    assert "0 kills of grpo" in missing
    assert missing[-1] == "2 kills in all"
