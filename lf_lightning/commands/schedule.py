"""`lf-lightning schedule`: the learning rate of every step of a run, before there is one."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from lf_lightning.cli import DEFAULT_EPOCHS, Gate, build
from lf_lightning.commands.prepare import ASSUMED, DataGate
from lf_lightning.commands.verify_resume import OneLineParser, at_least
from lf_lightning.types import InputError

ABOUT = (
    "Print the learning rate over the steps of a run, and draw it where a file is named. The model is not loaded; the "
    "data is encoded only where epochs decide how many steps there are."
)
ROWS = 11
"""Lines that are printed."""


def main(argv: list[str]) -> int:
    """Print and draw the schedule of a run."""
    options, rest = _parsed(argv)
    if options.help:
        print(options.text)
        return 0
    gate = build(rest, "schedule", DataGate)
    num_steps = options.steps or steps_of_run(gate)
    peaks = gate.model.optimizer_spec.peak_rates
    rates = {name: gate.model.schedule_spec.rates(peak, num_steps) for name, peak in peaks.items()}
    print(table(rates))
    if options.output is not None:
        draw(rates, options.output)
        print(f"drawn in {options.output}")
    return 0


def _parsed(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and those of `fit`."""
    parser = OneLineParser(
        prog="lf-lightning schedule",
        usage="lf-lightning schedule --config FILE [options of fit] [--steps N] [-o FILE.png]",
        description=ABOUT,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help")
    parser.add_argument("--steps", metavar="N", type=at_least(1), help="steps of the run, instead of counting them")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where it is drawn: a .png, .svg or .pdf")
    options, rest = parser.parse_known_args(argv)
    options.text = parser.format_help()
    if options.output is not None and options.output.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--output: must end in .png, .svg or .pdf, got {options.output}. Try schedule.png.")
    return options, rest


def steps_of_run(gate: Gate) -> int:
    """How many steps `fit` makes: `max_steps`, or as many as fit into the epochs.

    Raises:
        InputError: The run has no end, or a row cannot be used.
    """
    trainer = gate.config.trainer
    most, epochs = trainer.max_steps, trainer.max_epochs
    if epochs is None and most == -1:
        if trainer.max_time is not None:
            raise InputError("trainer.max_time: ends the run at an unknown step, got no other end. Give --steps N.")
        epochs = DEFAULT_EPOCHS
    if epochs in (None, -1):
        if most == -1:
            raise InputError("trainer.max_steps: must say where the run ends, got no end. Set it, or give --steps N.")
        return int(most)
    data = gate.datamodule
    data.open_sets("fit")
    data.resolve_layout(ASSUMED)
    in_all = int(epochs) * _limited(len(data.train_dataloader()), trainer.limit_train_batches)
    return in_all if most == -1 else min(in_all, int(most))


def _limited(num_steps: int, limit: Any) -> int:
    """The steps of an epoch under `trainer.limit_train_batches`: a number of steps, or a share."""
    if limit is None:
        return num_steps
    return min(limit, num_steps) if isinstance(limit, int) else int(limit * num_steps)


def table(rates: dict[str, list[float]]) -> str:
    """A few lines of the rates, the largest and the last step among them."""
    num_steps = len(next(iter(rates.values())))
    first = next(iter(rates.values()))
    shown = {round(index * (num_steps - 1) / max(min(ROWS, num_steps) - 1, 1)) for index in range(min(ROWS, num_steps))}
    shown.add(first.index(max(first)))
    lines = [f"{'step':>10}  " + "  ".join(f"{name:>14}" for name in rates)]
    lines += [f"{at + 1:>10,}  " + "  ".join(f"{each[at]:>14.4e}" for each in rates.values()) for at in sorted(shown)]
    return "\n".join(lines)


def draw(rates: dict[str, list[float]], path: Path) -> None:
    """Draw the rates over steps.

    Raises:
        InputError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in rates.items():
        every = math.ceil(len(values) / 2000)
        axes.plot(range(1, len(values) + 1, every), values[::every], label=name)
    axes.set(xlabel="optimizer step", ylabel="learning rate")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise InputError(f"--output: {path} cannot be written, got {error.strerror}. Choose another place.") from error
