"""`lf-lightning verify-resume`: whether one's own run, killed and resumed, is the run that never stopped."""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

from lf_lightning.cli import Gate, build
from lf_lightning.commands.kills import (
    Kill,
    Line,
    run_straight,
    run_to_end,
    run_with_kills,
    saves_of,
    started,
    wanted_kills,
)
from lf_lightning.commands.phases import PHASES, Moment
from lf_lightning.commands.run_compare import Comparison, compare_runs
from lf_lightning.console import say
from lf_lightning.stages.rollout import RolloutStage
from lf_lightning.types import InputError, TrainingStopped

ABOUT = """Train a few steps straight, then train them again with kills (SIGKILL) and resumes in between, some of them
in the midst of a save, and compare both runs bit for bit. All other options are those of `fit`. Nothing is written into
the run folder of the configuration."""
EQUAL = "equal"


class Row(NamedTuple):
    """One line of the table."""

    name: str
    hit: str  # phase that the kill hit, and the step
    resumed_from: str  # the newest complete checkpoint that it left
    compared: str
    verdict: str  # equal, or the first difference


def main(argv: list[str]) -> int:
    """Prove exact resume on a configuration.

    Args:
        argv: Arguments after the name of the command.

    Returns:
        0 where both runs are equal, 1 where they are not.

    Raises:
        InputError: An argument or the configuration is wrong.
        TrainingStopped: A run failed by itself.
    """
    options, rest = parsed(argv)
    environment = dict(os.environ)  # before a seed is set here: the runs set their own
    gate = build(rest, "fit")
    steps = options.steps or default_steps(gate)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no child outlives this process
    with scratch_folder(options.scratch) as scratch:
        run, output = scratch / "run", scratch / "output.txt"
        command = [sys.executable, "-m", "lf_lightning", "fit", *rest, *overrides(gate, run, steps)]
        say(f"verify-resume: {steps} steps straight, then with kills, in {scratch}")
        line = Line(lambda: started(command, output=output, environment=environment), run, output)
        rows = verify(line, options)
    print(table(rows))
    num_kills, different = len(rows) - 1, [row for row in rows if row.verdict != EQUAL]
    if different:
        print(f"not equal after {num_kills} kills: {different[0].verdict}\nboth runs, and what they printed: {scratch}")
        return 1
    print(f"equal, bit for bit, after {num_kills} kills in {steps} steps")
    if options.keep == "true":
        print(f"both runs, and what they printed: {scratch}")
    else:
        shutil.rmtree(scratch)
    return 0


# ---------------------------------------------------------------------- options


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Hand the message to the gate."""
        command = self.prog.rpartition(" ")[2]
        raise InputError(f"{command}: {message}. `lf-lightning {command} --help` shows the arguments.")


def parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those of `fit`.

    Raises:
        InputError: One of ours is wrong, or one of `fit` says where a run begins.
    """
    parser = OneLineParser(
        prog="lf-lightning verify-resume",
        usage="lf-lightning verify-resume --config FILE [options of fit] [--steps N] [--kills K] [--seed S]",
        description=ABOUT,
        allow_abbrev=False,
    )
    whole = at_least(1)
    parser.add_argument("--steps", metavar="N", type=at_least(3), help="optimizer steps, at least 3; 9 unless said")
    parser.add_argument("--kills", metavar="K", type=whole, help="kills; one in each phase and one more unless said")
    parser.add_argument("--seed", metavar="S", type=at_least(0), default=0, help="of the instants of the kills")
    parser.add_argument("--keep", choices=("true", "false"), default="false", help="keep the scratch folder")
    parser.add_argument(
        "--scratch", metavar="DIR", type=Path, help="where it is made; the temporary folder unless said"
    )
    options, rest = parser.parse_known_args(argv)
    for name in ("--ckpt_path", "--overwrite"):
        if any(argument.split("=")[0] == name for argument in rest):
            raise InputError(f"{name}: must be left out, got one: both runs begin afresh. Remove it.")
    return options, rest


def at_least(least: int) -> Callable[[str], int]:
    """A whole number from the command line."""

    def whole_number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
        return int(text)

    return whole_number


def default_steps(gate: Gate) -> int:
    """Three checkpoints; with rollouts enough for two of them and a step of the third. A multiple of 9."""
    if not isinstance(gate.model, RolloutStage):
        return 9
    data: dict[str, int] = gate.datamodule.arguments
    size = data["rollout_size"] or data["global_batch_size"]
    per_rollout = int(gate.model.num_epochs) * math.ceil(size / data["global_batch_size"])
    return 9 * math.ceil((2 * per_rollout + 1) / 9)


def overrides(gate: Gate, run: Path, steps: int) -> list[str]:
    """The options that both runs get after the user's own.

    Checkpoints at a third of the steps, validations at two ninths: one of them falls on the step of a checkpoint, the
    others do not, and the last step has none.
    """
    every = max(steps // 3, 1)
    options = {
        "trainer.default_root_dir": run,
        "trainer.max_steps": steps,
        "trainer.max_time": "null",
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "false",
        "checkpoint.every_n_steps": every,
        "checkpoint.save_top_k": -1,
        "ckpt_path": "last",
        "overwrite": "false",
    }
    if "val" in gate.datamodule.sets:
        options["trainer.val_check_interval"] = max(2 * every // 3, 1)
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [*given, "--trainer.callbacks+=lf_lightning.commands.phases.MarkPhases"]


@contextmanager
def scratch_folder(parent: Path | None) -> Iterator[Path]:
    """A folder for both runs; named where something goes wrong, since it holds the evidence.

    Raises:
        InputError: It cannot be made.
    """
    try:
        scratch = Path(tempfile.mkdtemp(prefix="lf-verify-resume-", dir=parent))
    except OSError as error:
        raise InputError(
            f"--scratch: must be a folder that can be written, got {parent} ({error.strerror})."
        ) from error
    try:
        yield scratch
    except (InputError, TrainingStopped) as error:
        raise type(error)(f"{error} The scratch folder is {scratch}.") from error


# ---------------------------------------------------------------------- the two runs


def verify(line: Line, options: argparse.Namespace) -> list[Row]:
    """Run straight, then with kills, and compare; a row for each kill and one for the end.

    Raises:
        InputError: `fit` refuses the configuration.
        TrainingStopped: A run failed by itself.
    """
    draw = random.Random(options.seed)
    seen = run_straight(line)
    straight = line.run.rename(line.run.with_name("straight"))  # both runs have the same path while they run
    moments = sorted({*seen.moments, *saves_of(straight)}, key=lambda at: (at.step, PHASES.index(at.phase)))
    wanted = wanted_kills(after_a_checkpoint(tuple(moments)), options.kills, draw)
    rows: list[Row] = []
    missed = {at.phase for at in wanted}
    for kill in run_with_kills(line, straight, wanted, seen, draw, again_if_late=True):
        missed -= {kill.hit.phase} if kill.has_hit and not kill.is_late else set()
        rows.append(row_of(str(len(rows) + 1), kill))
        say(f"verify-resume: kill {rows[-1].name} in {rows[-1].hit}: {rows[-1].verdict}")
    if missed:
        phases = ", ".join(sorted(missed))
        raise TrainingStopped(f"verify-resume: no kill hit {phases}, which is too short here. Try another --seed.")
    fault = run_to_end(line)
    compared, verdict = said(compare_runs(straight, line.run))
    return [*rows, Row("end", "", "", compared, fault or verdict)]


def after_a_checkpoint(moments: tuple[Moment, ...]) -> tuple[Moment, ...]:
    """The moments between a complete checkpoint and the last step, but for phases that come nowhere else.

    A kill before would only show that a run can start again, one at the end that there is nothing left to do.
    """
    first = min((at.step for at in moments if at.phase == "save"), default=0)
    later = tuple(at for at in moments if at.step > first + (at.phase == "step"))
    last = max((at.step for at in later), default=0)
    inside = {at.phase for at in later if at.step < last}
    return tuple(at for at in later if at.step < last or at.phase not in inside)


def row_of(name: str, kill: Kill) -> Row:
    """A kill as a line of the table."""
    compared, _ = said(kill.found)
    resumed_from = f"step {kill.newest}" if kill.newest else "the start"
    return Row(name, f"{kill.hit.phase} {kill.hit.step}", resumed_from, compared, kill.difference or EQUAL)


def said(found: Sequence[Comparison]) -> tuple[str, str]:
    """What was compared, and `equal` or the first difference."""
    compared = ", ".join(f"{each.part} ({each.num_values} values, {each.digest[:8]})" for each in found)
    different = (f"{each.part}: {each.difference}" for each in found if each.difference)
    return compared or "nothing saved yet", next(different, EQUAL)


def table(rows: Sequence[Row]) -> str:
    """The rows as text, in columns."""
    lines: list[tuple[str, ...]] = [("kill", "hit", "resumed from", "compared", "verdict"), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(Row._fields))]
    padded = ((text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join("  ".join(texts).rstrip() for texts in padded)
