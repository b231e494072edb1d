"""The reward that is a Python function or class of the user: where it is found, and what is refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from lf_lightning import InputError
from lf_lightning.data.tokenizer import byte_tokenizer
from lf_lightning.models import Reward, RewardFunction
from lf_lightning.models.rewards import RewardBatch, combined_scores

PROMPTS, RESPONSES = ("1+1=", "2+2=", "3+3="), ("2", "five", "6 of course")
BATCH = RewardBatch(
    prompt_ids=((1,), (2,), (3,)),
    response_ids=((4,), (5, 6), (7, 8, 9)),
    is_stopped=(True, True, False),
    references=("2", "4", "6"),
    tokenizer=byte_tokenizer(),
)
RULES = '''
"""Rewards of a user."""
PASSES = 0.5
def length(prompts, responses, batch):
    return [len(response) for response in responses]
def exact(prompts, responses, batch, *, right=1.0, wrong=0.0):
    return [right if each == want else wrong for each, want in zip(responses, batch.references)]
class Scorer:
    def __init__(self, factor=1):
        self.factor = factor
    def score(self, prompts, responses, batch):
        return [self.factor * len(prompt) for prompt in prompts]
class Called:
    def __init__(self, factor=1):
        self.factor = factor
    def __call__(self, prompts, responses, batch):
        return [self.factor * len(ids) for ids in batch.response_ids]
class Mute:
    pass
class Odd:
    score = 3
class Few:
    def score(self, prompts):
        return []
class Fails:
    def __init__(self):
        raise OSError("no\\nsuch judge")
class Outer:
    @staticmethod
    def first(prompts, responses, batch):
        return [1.0, 0.0, 0.0]
'''


def length(prompts: Any, responses: Any, batch: Any) -> list[int]:
    return [len(response) for response in responses]


def scored(*rewards: Reward) -> list[list[float]]:
    return [list(row) for row in combined_scores(rewards, PROMPTS, RESPONSES, BATCH).tolist()]


def refusal(function: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        RewardFunction(function, **options)
    message = str(caught.value)
    assert message.startswith("model.init_args.rewards: RewardFunction.function: "), message
    assert "\n" not in message
    return message


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with rewards, importable as house_rules too."""
    path = tmp_path / "house_rules.py"
    path.write_text(RULES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "house_rules", raising=False)
    return path


# ---------------------------------------------------------------------- where a function lies


@pytest.mark.parametrize(
    ("text", "arguments", "want"),
    [
        ("house_rules:length", {}, [1, 4, 11]),
        ("house_rules.length", {}, [1, 4, 11]),
        ("FILE:length", {}, [1, 4, 11]),
        ("house_rules:exact", {}, [1.0, 0.0, 0.0]),
        ("FILE:exact", {"right": 3.0, "wrong": -1.0}, [3.0, -1.0, -1.0]),
        ("house_rules.Scorer", {}, [4, 4, 4]),
        ("FILE:Scorer", {"factor": 3}, [12, 12, 12]),
        ("house_rules:Called", {}, [1, 2, 3]),
        ("FILE:Called", {"factor": 2}, [2, 4, 6]),
        ("FILE:Outer.first", {}, [1.0, 0.0, 0.0]),
    ],
)
def test_a_function_or_class_is_found_and_called(
    rules: Path, text: str, arguments: dict[str, Any], want: list[float]
) -> None:
    reward = RewardFunction(text.replace("FILE", str(rules)), arguments=arguments)
    assert scored(reward) == [[float(score)] for score in want]
    assert reward.name == text.replace(":", ".").split(".")[-1]


def test_a_function_a_class_and_an_object_may_be_given_as_they_are() -> None:
    class Half:
        def __init__(self, start: float = 0.0) -> None:
            self.start = start

        def __call__(self, prompts: Any, responses: Any, batch: Any) -> list[float]:
            return [self.start + len(response) / 2 for response in responses]

    assert scored(RewardFunction(length)) == [[1.0], [4.0], [11.0]]
    assert scored(RewardFunction(Half, arguments={"start": 1.0})) == [[1.5], [3.0], [6.5]]
    assert scored(RewardFunction(Half(2.0))) == [[2.5], [4.0], [7.5]]
    assert [RewardFunction(given).name for given in (length, Half, Half())] == ["length", "Half", "Half"]


def test_a_class_is_built_once(rules: Path) -> None:
    rules.write_text(
        "class Counts:\n"
        "    calls = built = 0\n"
        "    def __init__(self):\n"
        "        Counts.built += 1\n"
        "    def score(self, prompts, responses, batch):\n"
        "        self.calls += 1\n"
        "        return [self.built, self.calls, 0]\n"
    )
    reward = RewardFunction(f"{rules}:Counts")
    assert scored(reward) == [[1.0], [1.0], [0.0]]
    assert scored(reward) == [[1.0], [2.0], [0.0]]


def test_a_file_is_run_once_and_its_namesake_elsewhere_is_another(tmp_path: Path) -> None:
    paths = [tmp_path / name / "rule.py" for name in "ab"]
    for path, last in zip(paths, ("len(runs)", "7"), strict=True):
        path.parent.mkdir()
        path.write_text(f"runs = [1]\ndef rule(*_):\n    runs.append(1)\n    return [{last}] * 3\n")
    first, second, other = (RewardFunction(f"{path}:rule") for path in (paths[0], paths[0], paths[1]))
    assert scored(first, second, other)[0] == [2.0, 3.0, 7.0]


@pytest.mark.parametrize("text", ["house_rules:exact", "house_rules.exact", "FILE:exact"])
def test_a_reward_is_made_again_from_its_options(rules: Path, text: str) -> None:
    options = {"function": text.replace("FILE", str(rules)), "arguments": {"right": 7.0}, "weight": 0.25}
    assert RewardFunction(**options).option_values() == options
    again = RewardFunction(**RewardFunction(**options).option_values())
    assert scored(again) == [[7.0], [0.0], [0.0]]
    assert again.weight == 0.25


@pytest.mark.parametrize("name", ["exact", "Scorer", "Outer.first"])
def test_a_function_that_was_given_as_an_object_is_written_as_text(rules: Path, name: str) -> None:
    import house_rules

    found = house_rules
    for part in name.split("."):
        found = vars(found)[part]
    found = found.__func__ if isinstance(found, staticmethod) else found
    reward = RewardFunction(found, weight=3.0)
    assert reward.option_values() == {"function": f"house_rules:{name}", "arguments": {}, "weight": 3.0}
    assert scored(RewardFunction(**reward.option_values())) == scored(reward)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length", "must be package.module:name or path/to/file.py:name, got 'length'"),
        (":length", "must be package.module:name"),
        ("house_rules:", "must be package.module:name"),
        ("no_such_rules:length", "no_such_rules: must not fail, got ModuleNotFoundError: No module named"),
        ("no_such_rules.length", "no_such_rules: must not fail, got ModuleNotFoundError: No module named"),
        ("absent/rules.py:length", "absent/rules.py: must not fail, got FileNotFoundError: no file"),
        ("house_rules:lenght", "house_rules must define lenght, got none. Did you mean length?"),
        ("FILE:Scorrer", "must define Scorrer, got none. Did you mean Scorer?"),
        ("house_rules:zzzzzzzz", "house_rules must define zzzzzzzz, got none. Correct the name."),
        ("house_rules:Outer.frist", "must define Outer.frist, got none. Did you mean first?"),
        ("house_rules:PASSES", "must be a function or a class, got 'house_rules:PASSES'"),
        ("house_rules:Mute", "a class must have score or __call__, got house_rules:Mute"),
        ("house_rules:Odd", "a class must have score or __call__, got house_rules:Odd"),
        ("house_rules:Few", "must take (prompts, responses, batch), got (prompts)"),
        ("house_rules:Fails", "must not fail, got OSError: no such judge (FILE:27)"),
    ],
)
def test_what_cannot_be_called_is_refused(rules: Path, text: str, message: str) -> None:
    assert message.replace("FILE", str(rules)) in refusal(text.replace("FILE", str(rules)))


@pytest.mark.parametrize("function", [3, None, [length]])
def test_an_object_that_cannot_be_called_is_refused(function: Any) -> None:
    assert "must be a function or a class, got" in refusal(function)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("house_rules:length", {"factor": 2}, "must take (prompts, responses, batch, factor=...), got (prompts,"),
        ("house_rules:exact", {"rihgt": 2.0}, "got an unexpected keyword argument 'rihgt'. Correct arguments."),
        ("house_rules:exact", {"batch": 2.0}, "multiple values for argument 'batch'"),
        ("house_rules:Scorer", {"faktor": 2}, "must take (faktor=...), got (factor=1)"),
        ("builtins:len", {}, "must take (prompts, responses, batch), got (obj, /)"),
    ],
)
def test_arguments_that_a_function_does_not_take_are_refused(
    rules: Path, text: str, arguments: dict[str, Any], message: str
) -> None:
    assert message in refusal(text, arguments=arguments)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library' (FILE:1)"),
        ("x = 1\n\nx / 0\n", "ZeroDivisionError: division by zero (FILE:3)"),
        ("def rule(:\n", "SyntaxError: invalid syntax"),
    ],
)
def test_a_file_that_fails_is_refused_with_its_line_and_read_again_once_mended(
    rules: Path, source: str, message: str
) -> None:
    rules.write_text(source)
    found = refusal(f"{rules}:length")
    assert found.startswith(f"model.init_args.rewards: RewardFunction.function: {rules}: must not fail, got ")
    assert message.replace("FILE", str(rules)) in found
    rules.write_text(RULES + "\n# mended, and of another size than before\n")
    assert scored(RewardFunction(f"{rules}:length")) == [[1.0], [4.0], [11.0]]


def test_a_name_below_something_without_names_is_refused(rules: Path) -> None:
    assert "house_rules must define PASSES.first, got none" in refusal("house_rules:PASSES.first")


def test_a_method_that_a_class_inherits_is_found(rules: Path) -> None:
    rules.write_text(RULES + "class Inner(Outer):\n    pass\n")
    assert scored(RewardFunction(f"{rules}:Inner.first")) == [[1.0], [0.0], [0.0]]
