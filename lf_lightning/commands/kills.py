"""Killing a run in a chosen phase, again and again, and what each kill has left of it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from lf_lightning.callbacks.folder import complete_checkpoints, step_of
from lf_lightning.commands.phases import MARKS, PHASES, Moment, begun_at, moment_of
from lf_lightning.commands.run_compare import Comparison, compare_checkpoints, torn
from lf_lightning.types import InputError, TrainingStopped

POLL_SECONDS = 0.0005


class Child(Protocol):
    """A process that trains, first of its own process group."""

    @property
    def pid(self) -> int | None:
        """Its number."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""


class Line(NamedTuple):
    """How a run is started, and where it lies."""

    start: Callable[[], Child]  # begins the run, or continues it with --ckpt_path last
    run: Path
    output: Path  # what its processes print


class Straight(NamedTuple):
    """What was seen of a run that nobody killed."""

    moments: tuple[Moment, ...]  # of PHASES, in their order
    seconds: dict[str, float]  # phase -> mean time spent in it at a time


class Kill(NamedTuple):
    """A kill, and what was found afterwards."""

    wanted: Moment
    hit: Moment
    newest: int  # step of the newest complete checkpoint, from which the next process goes on; 0 for the start
    torn: str | None  # what is wrong with a checkpoint that calls itself complete
    wrong_begin: str | None  # the killed process began elsewhere than at the newest checkpoint that it found
    found: tuple[Comparison, ...]  # the newest checkpoint against the straight run's of that step
    is_late: bool = False  # meant for an earlier step, it came in the last one, which leaves nothing to train

    @property
    def has_hit(self) -> bool:
        """Whether it came in the phase that was wanted."""
        return self.hit.phase == self.wanted.phase

    @property
    def difference(self) -> str | None:
        """What is wrong, None where nothing is."""
        of_found = (f"{each.part}: {each.difference}" for each in self.found if each.difference)
        return self.torn or self.wrong_begin or next(of_found, None)


def run_straight(line: Line) -> Straight:
    """Run once to the end, and look on.

    Raises:
        InputError: `fit` refuses the configuration, or the run is too short for a checkpoint.
        TrainingStopped: The run failed by itself.
    """
    seen: list[Moment] = []
    times: dict[str, list[float]] = defaultdict(list)
    with group_of(line.start()) as child:
        last, since = moment_of(line.run), time.monotonic()
        while (code := child.poll()) is None:
            now = moment_of(line.run)
            if now != last:
                times[last.phase].append(time.monotonic() - since)
                last, since = now, time.monotonic()
                seen += [now] if now.phase in PHASES else []
            time.sleep(POLL_SECONDS)
    check_code(code, line.output)
    if not complete_checkpoints(line.run):
        raise InputError("--steps: must leave room for a checkpoint, got a run that ends before the first. Lower it.")
    return Straight(tuple(dict.fromkeys(seen)), {name: sum(found) / len(found) for name, found in times.items()})


def saves_of(run: Path) -> list[Moment]:
    """The saves of a run that kept all its checkpoints, those too that were too short to be seen."""
    return [Moment("save", step) for path in complete_checkpoints(run) if (step := step_of(path))]


def run_to_end(line: Line) -> str | None:
    """Continue a run to its end.

    Returns:
        What is wrong with where it began, None where nothing is.

    Raises:
        TrainingStopped: The run failed by itself.
    """
    newest = start_over(line)
    with group_of(line.start()) as child:
        code = wait_for(child)
    check_code(code, line.output)
    return wrong_begin(line.run, newest)


def run_with_kills(
    line: Line,
    straight: Path,
    wanted: list[Moment],
    seen: Straight,
    draw: random.Random,
    *,
    tries: int = 4,
    again_if_late: bool = False,
) -> Iterator[Kill]:
    """Start, kill, look at what is left, start again; a kill that misses its phase is tried again.

    The run stays as the last kill leaves it.

    Args:
        line: The run.
        straight: Folder of the run without kills.
        wanted: Phases and steps, in the order of the steps.
        seen: What the run without kills went through.
        draw: Chooses the instants.
        again_if_late: Whether a kill that leaves nothing to train is tried again, as one that misses is.
        tries: Starts that a wanted kill may take, on average; kills that were still not hit then are left out.

    Raises:
        TrainingStopped: The run failed by itself.
    """
    queue, num_missed = list(wanted), 0
    for _ in range(tries * len(wanted)):
        if not queue:
            return
        newest = start_over(line)
        # a part of it: a phase is not always equally long, and the shorter the pause the surer the hit
        pause = draw.random() * seen.seconds.get(queue[0].phase, 0.0) / 2 ** (1 + num_missed)
        with group_of(line.start()) as child:
            was_killed = kill_in(child, line.run, queue[0], after=pause)
            code = wait_for(child)
        if was_killed:
            kill = left_by_kill(line.run, straight, queue[0], newest)
            yield kill
            is_done = kill.has_hit and not (again_if_late and kill.is_late)
            queue, num_missed = (queue[1:], 0) if is_done else (queue, num_missed + 1)
        else:  # it was past that phase before anyone looked
            check_code(code, line.output)
            shutil.rmtree(line.run)
            num_missed += 1


def left_by_kill(run: Path, straight: Path, wanted: Moment, newest: int) -> Kill:
    """What a kill has left of a run.

    Args:
        run: The killed run.
        straight: The run without kills.
        wanted: What the kill was aimed at.
        newest: Step of the newest complete checkpoint when the killed process began.
    """
    checkpoints = complete_checkpoints(run)
    faults = [f"{path.name}/{fault}" for path in checkpoints if (fault := torn(path))]
    twin = [straight / "checkpoints" / path.name for path in checkpoints[-1:]]
    found = compare_checkpoints(twin[0], checkpoints[-1]) if twin and not faults else []
    first_fault = faults[0] if faults else None
    hit, wrong = moment_of(run), wrong_begin(run, newest)
    is_late = hit.step >= newest_step(straight) > wanted.step
    return Kill(wanted, hit, newest_step(run), first_fault, wrong, tuple(found), is_late)


def wanted_kills(moments: tuple[Moment, ...], number: int | None, draw: random.Random) -> list[Moment]:
    """Phases and steps to kill in, in the order of the steps; a save first of all.

    Args:
        moments: What the straight run went through.
        number: How many; None for one in each phase and one more.
        draw: Chooses the steps.
    """
    present = [phase for phase in ("save", "rollout", "step", "validation") if any(at.phase == phase for at in moments)]
    number = number or len(present) + 1
    places = [
        draw.choice([at for at in moments if at.phase == present[index % len(present)]]) for index in range(number)
    ]
    return sorted(places, key=lambda at: at.step)


# ---------------------------------------------------------------------- a process


def start_over(line: Line) -> int:
    """Take away the marks of the process before; the step of the newest complete checkpoint, 0 where there is none."""
    (line.run / MARKS).unlink(missing_ok=True)
    return newest_step(line.run)


def newest_step(run: Path) -> int:
    """Step of the newest complete checkpoint, 0 where there is none."""
    checkpoints = complete_checkpoints(run)
    return (step_of(checkpoints[-1]) or 0) if checkpoints else 0


def wrong_begin(run: Path, newest: int) -> str | None:
    """Whether a process began to train elsewhere than at the newest checkpoint that it found, in words."""
    began = begun_at(run)
    if began in (None, newest):  # None: there was nothing left to train
        return None
    return f"began at step {began}, where the newest complete checkpoint had step {newest}"


def kill_in(child: Child, run: Path, target: Moment, *, after: float) -> bool:
    """Kill a run, the whole process group, in the first phase of a kind at a step or later.

    Args:
        child: Its first process.
        run: Its folder.
        target: The phase, and the first step that counts.
        after: Seconds between the begin of the phase and the kill.

    Returns:
        Whether it was killed: it may have ended before.
    """

    def is_there() -> bool:
        now = moment_of(run)
        return now.phase == target.phase and now.step >= target.step

    while child.poll() is None:
        if is_there():
            time.sleep(after)
            if is_there():  # a save may have come between a step and the next, whose mark stood there already
                break
        time.sleep(POLL_SECONDS)
    kill_group(child)
    return wait_for(child) == -signal.SIGKILL


@contextmanager
def group_of(child: Child) -> Iterator[Child]:
    """A process that ends, with all that it started, at the latest with the block."""
    try:
        yield child
    finally:
        kill_group(child)
        wait_for(child)


def kill_group(child: Child) -> None:
    """Send SIGKILL to a process and all that it started, unless it has ended."""
    if child.poll() is None and child.pid is not None:
        os.killpg(child.pid, signal.SIGKILL)


def wait_for(child: Child) -> int:
    """Wait for the end of a process; its exit code."""
    while (code := child.poll()) is None:
        time.sleep(0.01)
    return code


def started(command: list[str], *, output: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that is the first of its own group; what it prints is added to a file."""
    with output.open("ab") as handle:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=handle, stderr=handle, env=environment, start_new_session=True
        )


def check_code(code: int, output: Path) -> None:
    """Refuse to go on after a run that failed by itself.

    Raises:
        InputError: `fit` has refused the configuration.
        TrainingStopped: It has failed.
    """
    if code == 0:
        return
    lines = output.read_text(errors="replace").strip().splitlines() if output.is_file() else []
    last = lines[-1].removeprefix("lf-lightning: error: ") if lines else "it printed nothing."
    if code == 2:
        raise InputError(last)
    raise TrainingStopped(f"verify-resume: a run ended with exit code {code}: {last}")
