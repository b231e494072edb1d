import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from lf_lightning.quickstart.make_tasks import TASKS, Dice, main

SHIPPED = resources.files("lf_lightning.quickstart")
FILES = (
    "dataset_info.json",
    "feedback.json",
    "feedback_heldout.json",
    "pairs.json",
    "pairs_heldout.json",
    "stories.jsonl",
    "stories_heldout.jsonl",
    "tasks.json",
    "tasks_heldout.json",
)


def rows(name: str) -> list[dict[str, Any]]:
    text = (SHIPPED / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def questions(name: str) -> set[tuple[str, str]]:
    return {(row["instruction"], row["input"]) for row in rows(name)}


def test_the_script_makes_the_shipped_files_again_byte_for_byte(tmp_path: Path):
    main([str(tmp_path / "made")])
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / "made" / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_the_files_are_small_together():
    assert sum(len((SHIPPED / name).read_bytes()) for name in FILES) < 400_000


def test_the_held_out_tasks_are_enough_differ_from_each_other_and_are_never_trained_on():
    assert len(questions("tasks_heldout.json")) == len(rows("tasks_heldout.json")) >= 200
    assert not questions("tasks_heldout.json") & questions("tasks.json")


def test_the_held_out_stories_are_never_trained_on():
    held, train = ({row["text"] for row in rows(name)} for name in ("stories_heldout.jsonl", "stories.jsonl"))
    assert len(held) == 40
    assert not held & train


def test_every_task_is_trained_and_held_out():
    asked = {task.instruction for task in TASKS}
    for name in ("tasks.json", "tasks_heldout.json"):
        assert {row["instruction"] for row in rows(name)} == asked


ANSWERS = [
    ("Upper-case", "lamp", "LAMP"),
    ("Reverse", "lamp", "pmal"),
    ("Repeat", "lamp", "lamp lamp"),
    ("Add", "38 + 4", "42"),
]


@pytest.mark.parametrize(("instruction", "question", "answer"), ANSWERS)
def test_an_answer_is_right(instruction: str, question: str, answer: str):
    (task,) = [task for task in TASKS if task.instruction == instruction]
    assert task.answer(question) == answer


def test_every_answer_of_the_files_is_that_of_its_task():
    answer = {task.instruction: task.answer for task in TASKS}
    for row in rows("tasks.json") + rows("tasks_heldout.json"):
        assert row["output"] == answer[row["instruction"]](row["input"])


def test_the_dice_fall_the_same_way_in_every_python():
    dice = Dice(7)
    assert [dice.below(100) for _ in range(5)] == [32, 15, 65, 7, 53]
    assert dice.shuffled("abcdef") == ["d", "b", "f", "a", "e", "c"]
