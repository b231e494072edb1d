"""Makes the quickstarts' data: four tasks for a tiny model, little stories to read, and words in the right voice.

python -m lf_lightning.quickstart.make_tasks FOLDER
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

SEED = 7
NUM_STORIES, NUM_HELDOUT_STORIES = 400, 40
NUM_PAIRS, NUM_HELDOUT_PAIRS = 380, 100

CONSONANTS, VOWELS = "bcdfghjklmnprstvwyz", "aeiou"
WORD_LENGTHS = (3, 4, 5, 6)
FIRST_SUMMANDS, SECOND_SUMMANDS = range(10, 90), range(1, 6)  # their sum has two digits, too

NAMES = ("Mia", "Tom", "Ada", "Ben", "Lea", "Max", "Zoe", "Sam", "Ida", "Leo", "Eva", "Jon")
ANIMALS = ("cat", "dog", "fox", "hen", "bear", "frog", "goat", "mouse", "duck", "pony")
PLACES = ("forest", "river", "garden", "market", "castle", "beach", "farm", "village")
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
THINGS = ("ball", "hat", "key", "book", "kite", "cup", "shoe", "drum", "lamp", "boat")
WEATHERS = ("sunny", "rainy", "windy", "snowy", "foggy")
FEELINGS = ("happy", "sleepy", "hungry", "proud", "brave")


class Dice:
    """Random choices that are the same in every Python: of `random`, only `random()` keeps its sequence by promise.

    Args:
        seed: Start of the sequence.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, end: int) -> int:
        """A number from 0 to `end` - 1."""
        return int(self._random.random() * end)

    def one_of(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.below(len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in a random order."""
        keys = [self._random.random() for _ in items]
        return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]


class Task(NamedTuple):
    """Something that can be asked of a word or of two numbers."""

    instruction: str
    num_questions: int  # to train on
    num_heldout: int
    num_copies: int  # rows of each question to train on: the hardest task is shown most often
    ask: Callable[[Dice], str]  # makes what is asked about
    answer: Callable[[str], str]


def word(dice: Dice) -> str:
    """A word that can be spoken: consonants and vowels take turns."""
    letters = (CONSONANTS, VOWELS) if dice.below(4) else (VOWELS, CONSONANTS)
    return "".join(dice.one_of(letters[place % 2]) for place in range(dice.one_of(WORD_LENGTHS)))


def summands(dice: Dice) -> str:
    """Two numbers to add."""
    return f"{dice.one_of(FIRST_SUMMANDS)} + {dice.one_of(SECOND_SUMMANDS)}"


TASKS = (
    Task("Upper-case", 600, 70, 1, word, str.upper),
    Task("Reverse", 900, 70, 1, word, lambda text: text[::-1]),
    Task("Repeat", 600, 70, 1, word, lambda text: f"{text} {text}"),
    Task("Add", 370, 30, 3, summands, lambda text: str(sum(int(part) for part in text.split(" + ")))),
)


def task_rows(task: Task, dice: Dice) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows to train on and held-out rows of a task; no held-out question is trained on."""
    questions: dict[str, None] = {}  # a dict, because a set has no order
    while len(questions) < task.num_questions + task.num_heldout:
        questions[task.ask(dice)] = None
    rows = [{"instruction": task.instruction, "input": text, "output": task.answer(text)} for text in questions]
    return rows[task.num_heldout :] * task.num_copies, rows[: task.num_heldout]


def story(dice: Dice) -> str:
    """A story in which somebody looks for a thing and finds it."""
    name, friend = dice.shuffled(NAMES)[:2]
    animal, place, weather = dice.one_of(ANIMALS), dice.one_of(PLACES), dice.one_of(WEATHERS)
    thing, feeling = f"{dice.one_of(COLOURS)} {dice.one_of(THINGS)}", dice.one_of(FEELINGS)
    middle = dice.one_of(
        (
            f"{friend} had lost a {thing}. {name} looked behind a tree, and there was the {thing}.",
            f"There {name} met {friend}, who gave {name} a {thing}. They played with the {thing} all day.",
            f"{name} found a {thing} and asked {friend}: is this your {thing}? Yes, said {friend}, thank you.",
        )
    )
    start = f"One {weather} day {name} the {animal} went to the {place}."
    return f"{start} {middle} Then {name} the {animal} went home and was {feeling}."


VOICES: dict[str, Callable[[str], str]] = {"loudly": lambda text: f"{text.upper()}!", "softly": lambda text: f"{text}."}
"""How something is to be said -> how that looks."""


def pair(text: str, dice: Dice) -> dict[str, str]:
    """A word to be said in one voice: rightly, and in the other voice. No response is right or wrong by itself."""
    right, wrong = dice.shuffled(list(VOICES))
    answers = {"chosen": VOICES[right](text), "rejected": VOICES[wrong](text)}
    return {"instruction": f"Say it {right}", "input": text, **answers}


def pair_rows(dice: Dice) -> list[dict[str, str]]:
    """Pairs about different words, the held-out ones first."""
    words: dict[str, None] = {}
    while len(words) < NUM_PAIRS + NUM_HELDOUT_PAIRS:
        words[word(dice)] = None
    return [pair(text, dice) for text in words]


def feedback(pair: dict[str, str], dice: Dice) -> dict[str, Any]:
    """One response of a pair, with what a reader thought of it."""
    liked = dice.below(2) == 1
    output = pair["chosen"] if liked else pair["rejected"]
    return {"instruction": pair["instruction"], "input": pair["input"], "output": output, "liked": liked}


def make_tasks(folder: Path) -> None:
    """Write tasks, stories, pairs, feedback, the held-out part of each, and dataset_info.json.

    Args:
        folder: Where to write; made if it does not exist.
    """
    dice = Dice(SEED)
    train: list[dict[str, str]] = []
    heldout: list[dict[str, str]] = []
    for task in TASKS:
        rows, held = task_rows(task, dice)
        train, heldout = train + rows, heldout + held
    texts = dict.fromkeys(story(dice) for _ in range(NUM_STORIES + NUM_HELDOUT_STORIES))
    stories = [{"text": text} for text in texts]
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(folder / "tasks.json", dice.shuffled(train), brackets=True)
    _write_rows(folder / "tasks_heldout.json", dice.shuffled(heldout), brackets=True)
    _write_rows(folder / "stories.jsonl", stories[NUM_HELDOUT_STORIES:], brackets=False)
    _write_rows(folder / "stories_heldout.jsonl", stories[:NUM_HELDOUT_STORIES], brackets=False)
    pairs = pair_rows(dice)
    opinions = [feedback(each, dice) for each in pairs]
    for name, rows in (("pairs", pairs), ("feedback", opinions)):
        _write_rows(folder / f"{name}.json", rows[NUM_HELDOUT_PAIRS:], brackets=True)
        _write_rows(folder / f"{name}_heldout.json", rows[:NUM_HELDOUT_PAIRS], brackets=True)
    info: dict[str, Any] = {name: {"file_name": f"{name}.json"} for name in ("tasks", "tasks_heldout")}
    info |= {name: {"file_name": f"{name}.jsonl", "formatting": "text"} for name in ("stories", "stories_heldout")}
    ranked = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    liked = {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "liked"}
    for name in ("pairs", "pairs_heldout"):
        info[name] = {"file_name": f"{name}.json", "ranking": True, "columns": ranked}
    info |= {name: {"file_name": f"{name}.json", "columns": liked} for name in ("feedback", "feedback_heldout")}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8", newline="\n")


def _write_rows(path: Path, rows: Sequence[dict[str, Any]], *, brackets: bool) -> None:
    """One row a line: as a JSON array in brackets, or as JSON lines."""
    lines = [json.dumps(row) for row in rows]
    text = "[\n" + ",\n".join(lines) + "\n]\n" if brackets else "\n".join(lines) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data into the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m lf_lightning.quickstart.make_tasks", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write into")
    make_tasks(parser.parse_args(argv).folder)


if __name__ == "__main__":
    main()
