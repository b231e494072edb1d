"""The exact-match score of a file of predictions: the one number that a quickstart is judged by."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn


class Prediction(NamedTuple):
    """One line of generated_predictions.jsonl, without its prompt."""

    predict: str  # the model's answer
    label: str  # the answer that the data gives


class ExactMatch(NamedTuple):
    """How many answers are right."""

    num_right: int
    num_rows: int  # > 0

    @property
    def ratio(self) -> float:
        """Share of right answers, in [0, 1]."""
        return self.num_right / self.num_rows


def exact_match(rows: Iterable[Prediction]) -> ExactMatch:
    """Count the answers that equal their label, outer whitespace aside; case and inner whitespace matter.

    Args:
        rows: Predictions, at least one.
    """
    hits = [row.predict.strip() == row.label.strip() for row in rows]
    assert hits, "a score needs at least one row"
    return ExactMatch(num_right=sum(hits), num_rows=len(hits))


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file that `lf-lightning predict` wrote: one object a line, with the strings prompt, predict and label.

    Raises:
        InputError: The file cannot be read or is empty, or a line is not such an object; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        refuse(f"{path}: cannot be read ({error.strerror}). Give the generated_predictions.jsonl of a predict run.")
    except UnicodeDecodeError as error:
        refuse(f"{path}: must be UTF-8 text, got byte {error.object[error.start]:#04x} at {error.start}. Save it so.")
    if lines[-1] == "":
        lines.pop()
    if not lines:
        refuse(f"{path}: must hold one JSON object a line, got an empty file. Run `lf-lightning predict` again.")
    return [parse_line(line, place=f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def parse_line(line: str, *, place: str) -> Prediction:
    """One line of the file as a prediction; `place` names file and line in the error."""
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        refuse(f"{place}: is not JSON ({error.msg}, column {error.colno}). Fix or remove the line.")
    if not isinstance(row, dict):
        refuse(f"{place}: must be a JSON object, got {line.strip()[:40]!r}. Fix or remove the line.")
    for key in ("prompt", "predict", "label"):
        if not isinstance(row.get(key), str):
            got = f"got {row[key]!r}" if key in row else f"got only the keys {', '.join(row) or 'of an empty object'}"
            refuse(f"{place}: key {key!r} must be a string, {got}. Write prompt, predict and label in each line.")
    return Prediction(predict=row["predict"], label=row["label"])


def main(argv: list[str]) -> int:
    """Print the exact-match score of a predictions file.

    Args:
        argv: Arguments after the name of the command: FILE, and optionally `--at-least RATIO`.

    Returns:
        0, or 1 where the score is below `--at-least`.

    Raises:
        InputError: An argument or the file is wrong.
    """
    parser = OneLineParser(
        prog="lf-lightning score",
        description="Exact-match score: the share of answers that equal their label, outer whitespace aside.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="generated_predictions.jsonl of a predict run")
    parser.add_argument(
        "--at-least", metavar="RATIO", type=ratio, help="exit with 1 where the score is below this, in [0, 1]"
    )
    arguments = parser.parse_args(argv)
    score = exact_match(read_predictions(arguments.file))
    print(f"exact match: {score.ratio:.3f} ({score.num_right} of {score.num_rows})")
    if arguments.at_least is None or score.ratio >= arguments.at_least:
        return 0
    print(f"lf-lightning: {score.ratio:.6g} is below --at-least {arguments.at_least:g}", file=sys.stderr)
    return 1


def ratio(text: str) -> float:
    """A number in [0, 1], from the command line."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:  # also true of nan
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}. Write for example 0.9")
    return value


def refuse(message: str) -> NoReturn:
    """Raise the gate's InputError. Imported here, because it brings torch, which scoring does not need."""
    from lf_lightning.types import InputError

    raise InputError(message)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        """Hand the message to the gate."""
        refuse(f"score: {message}. `lf-lightning score --help` shows the arguments.")
