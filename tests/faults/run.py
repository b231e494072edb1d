"""The long form of the fault harness, `make faults`: every stage, every phase, and a table of what each kill left."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from lf_lightning.commands.kills import Kill
from lf_lightning.commands.phases import PHASES
from lf_lightning.types import TrainingStopped
from tests.faults.harness import Hammered, hammer, lost_steps
from tests.faults.stages import CASES, EVERY, STEPS

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results" / "faults.md"
ROLLOUT_STAGES = ("ppo", "grpo")
NUM_KILLS, NUM_KILLS_OF_ROLLOUTS = 4, 6
"""Kills of a run: at least one in each of its phases."""
LEAST_IN_ALL, LEAST_PER_PHASE, LEAST_PER_STAGE = 60, 5, 6
HEAD = ("stage", "trained", "seed", "phase hit", "killed at step", "resumed from step", "checkpoints", "steps lost")
HEAD += ("newest checkpoint", "final weights", "state and logs")

ABOUT = f"""\
Each run makes 9 or {STEPS} steps, with a checkpoint every {EVERY} and a validation every 2. It is killed with
SIGKILL, resumed with `--ckpt_path last`, killed again, and at last left alone; the same run without kills
stands beside it. After each kill every complete checkpoint is opened and held against its manifest (names,
sizes, SHA-256), and the newest one against that of the run without kills: weights, and all that a resume
continues from. At the end: the weights of final/, the last state, and every line of the logs.
"""


class Outcome(NamedTuple):
    """A run that was killed and resumed to its end."""

    stage: str
    trained: str  # LoRA or every weight
    seed: int
    run: Hammered


def row(outcome: Outcome, kill: Kill) -> list[str]:
    """What is said of a kill."""
    newest = "equal" if not any(each.difference for each in kill.found) else "differs"
    others = "equal" if not any(each.difference for each in outcome.run.found) else "differ"
    cells = [outcome.stage, outcome.trained, outcome.seed, kill.hit.phase, kill.hit.step, kill.newest]
    cells += ["torn" if kill.torn else "whole", lost_steps(kill), newest if kill.found else "none yet"]
    return [str(cell) for cell in (*cells, "differ" if outcome.run.weights_differ else "equal", others)]


def report(outcomes: list[Outcome], minutes: float) -> str:
    """The page of results."""
    pairs = [(outcome, kill) for outcome in outcomes for kill in outcome.run.kills]
    phases = Counter(kill.hit.phase for _, kill in pairs)
    stages = Counter(outcome.stage for outcome, _ in pairs)
    torn = sum(kill.torn is not None for _, kill in pairs)
    lost = sum(lost_steps(kill) for _, kill in pairs)
    elsewhere = sum(kill.wrong_begin is not None for _, kill in pairs)
    elsewhere += sum(outcome.run.wrong_end is not None for outcome in outcomes)
    different = sum(outcome.run.weights_differ is not None for outcome, _ in pairs)
    rest = sum(any(each.difference for each in outcome.run.found) for outcome, _ in pairs)
    lines = ["# Kills and resumes", "", ABOUT]
    lines += ["Made by `make faults`:", "", "    python -m tests.faults.run", ""]
    lines += [f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, one thread a"]
    lines += [f"process, {minutes:.0f} minutes.", ""]
    lines += [f"| {len(pairs)} kills | count |", "|---|---|"]
    lines += [f"| in phase: {phase} | {phases[phase]} |" for phase in (*PHASES, *sorted(phases.keys() - set(PHASES)))]
    lines += [f"| of {stage} | {number} |" for stage, number in stages.items()]
    lines += [f"| that left a torn checkpoint which calls itself complete | {torn} |"]
    lines += [f"| steps lost beyond the last complete checkpoint | {lost} |"]
    lines += [f"| resumes that began elsewhere than at the newest complete checkpoint | {elsewhere} |"]
    lines += [f"| after which the final weights differ in a bit | {different} |"]
    lines += [f"| after which weights, last state or a line of the logs differ | {rest} |", ""]
    table = [HEAD, ["---"] * len(HEAD), *(row(outcome, kill) for outcome, kill in pairs)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in table)]) + "\n"


def too_few(outcomes: list[Outcome]) -> list[str]:
    """What the kills do not cover."""
    pairs = [(outcome, kill) for outcome in outcomes for kill in outcome.run.kills]
    phases = Counter(kill.hit.phase for _, kill in pairs)
    stages = Counter(outcome.stage for outcome, _ in pairs)
    found = [f"{phases[phase]} kills in phase {phase}" for phase in PHASES if phases[phase] < LEAST_PER_PHASE]
    found += [f"{stages[stage]} kills of {stage}" for stage in CASES if stages[stage] < LEAST_PER_STAGE]
    return found + ([f"{len(pairs)} kills in all"] if len(pairs) < LEAST_IN_ALL else [])


def main() -> int:
    """Run all stages and write the table, or some and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", choices=[*CASES, []], help="all unless given; only all are written")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no run is left behind
    begin, outcomes, failures = time.monotonic(), [], []
    for stage in options.stages or CASES:
        for number, case in enumerate(CASES[stage]):
            seed = options.seed + 10 * list(CASES).index(stage) + number
            num_kills = NUM_KILLS_OF_ROLLOUTS if stage in ROLLOUT_STAGES else NUM_KILLS
            try:
                with TemporaryDirectory() as folder:
                    run = hammer(Path(folder), case, seed=seed, num_kills=num_kills)
            except TrainingStopped as error:
                failures.append(f"{stage}, seed {seed}: {error}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            outcomes.append(Outcome(stage, "LoRA" if case.on_folder else "every weight", seed, run))
            failures += [f"{stage}, seed {seed}: {fault}" for fault in run.faults]
            print(f"{stage}, seed {seed}: {len(run.kills)} kills, {run.faults or 'equal'}", file=sys.stderr, flush=True)
    text = report(outcomes, (time.monotonic() - begin) / 60)
    if options.stages:
        print(text)
    else:
        failures += too_few(outcomes)
        RESULTS.write_text(text)
    print("\n".join(failures) or "all equal", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
