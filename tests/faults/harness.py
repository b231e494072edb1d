"""Kill a run again and again, resume it every time, and hold what it becomes against the run without kills."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from lf_lightning.commands.kills import Kill, Line, run_straight, run_to_end, run_with_kills, wanted_kills
from lf_lightning.commands.run_compare import Comparison, compare_runs
from tests.cli.runs import write
from tests.faults.forks import fit_in_fork
from tests.faults.stages import EVERY, Case, settings


class Hammered(NamedTuple):
    """A run that was killed and resumed until it ended."""

    kills: tuple[Kill, ...]
    wrong_end: str | None  # the last process began elsewhere than at the newest checkpoint
    found: tuple[Comparison, ...]  # the finished run against the run without kills

    @property
    def weights_differ(self) -> str | None:
        """The first difference of the final weights, by name; None where there is none."""
        return next((each.difference for each in self.found if each.part == "final weights"), None)

    @property
    def faults(self) -> list[str]:
        """All that is wrong."""
        of_kills = [kill.difference for kill in self.kills]
        of_kills += [f"{lost_steps(kill)} steps lost" for kill in self.kills if lost_steps(kill)]
        of_end = [f"{each.part}: {each.difference}" for each in self.found if each.difference]
        return [text for text in (*of_kills, self.wrong_end, *of_end) if text]


def hammer(
    folder: Path, case: Case, *, seed: int, num_kills: int, phases: tuple[str, ...] | None = None, tries: int = 4
) -> Hammered:
    """Run a case without kills, then with them.

    Args:
        folder: An empty folder for both.
        case: What is run.
        seed: Of the steps and instants of the kills.
        num_kills: How many.
        phases: Those to kill in; all that the run has unless given.
        tries: Starts that a wanted kill may take, on average.
    """
    draw = random.Random(seed)
    path, output = write(folder, settings(folder, case)), folder / "output.txt"
    start = fit_in_fork(folder, output, ["--config", path, "--ckpt_path", "last"])
    line = Line(start, folder / "run", output)
    seen = run_straight(line)
    straight = line.run.rename(folder / "straight")
    moments = tuple(at for at in seen.moments if phases is None or at.phase in phases)
    kills = tuple(run_with_kills(line, straight, wanted_kills(moments, num_kills, draw), seen, draw, tries=tries))
    wrong_end = run_to_end(line)
    return Hammered(kills, wrong_end, tuple(compare_runs(straight, line.run)))


def lost_steps(kill: Kill) -> int:
    """Steps between the newest complete checkpoint that a kill has left and the one that was complete by then.

    While a step is made the checkpoint of the step before may not be begun yet; a validation comes after the save.
    """
    behind = {"step": 2, "rollout": 2, "save": 1, "validation": 0}
    if kill.hit.phase not in behind:
        return 0
    complete = max(kill.hit.step - behind[kill.hit.phase], 0) // EVERY * EVERY
    return max(complete - kill.newest, 0)
