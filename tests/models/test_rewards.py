"""Rewards put together: a column of finite float64 numbers each, or training stops with one line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lf_lightning import InputError
from lf_lightning.data.tokenizer import byte_tokenizer
from lf_lightning.models import Reward, RewardAdapter, RewardFunction, RewardModel, RewardService
from lf_lightning.models.rewards import RewardBatch, combined_scores
from lf_lightning.types import TrainingStopped

PROMPTS, RESPONSES = ("1+1=", "2+2=", "3+3="), ("2", "five", "6 of course")
BATCH = RewardBatch(
    prompt_ids=((1,), (2,), (3,)),
    response_ids=((4,), (5, 6), (7, 8, 9)),
    is_stopped=(True, True, False),
    references=("2", "4", "6"),
    tokenizer=byte_tokenizer(),
)


def length(prompts: Any, responses: Any, batch: Any) -> list[int]:
    return [len(response) for response in responses]


class Fixed(Reward):
    """Gives what it was made with."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def score(self, prompts: Any, responses: Any, batch: RewardBatch) -> Any:
        return self.scores


def scored(*rewards: Reward) -> list[list[float]]:
    found = combined_scores(rewards, PROMPTS, RESPONSES, BATCH)
    assert found.dtype == torch.float64
    assert found.device.type == "cpu"
    return [list(row) for row in found.tolist()]


def stopped(*rewards: Reward) -> str:
    with pytest.raises(TrainingStopped) as caught:
        combined_scores(rewards, PROMPTS, RESPONSES, BATCH)
    message = str(caught.value)
    assert "\n" not in message
    assert "--ckpt_path last" in message
    return message


def test_each_reward_is_a_column_before_its_weight() -> None:
    doubled = RewardFunction(length, weight=2.0)
    assert scored(doubled, Fixed([0.5, -1.0, 3.0])) == [[1.0, 0.5], [4.0, -1.0], [11.0, 3.0]]


@pytest.mark.parametrize(
    "given",
    [
        [1, 0, 2],
        (1.0, 0.0, 2.0),
        torch.tensor([1, 0, 2]),
        torch.tensor([1.0, 0.0, 2.0]).numpy(),
        torch.tensor([1.0, 0.0, 2.0], dtype=torch.bfloat16),
        torch.tensor([1.0, 0.0, 2.0], requires_grad=True),
    ],
    ids=["list", "tuple", "integers", "array", "bfloat16", "with a graph"],
)
def test_scores_may_be_a_list_an_array_or_a_tensor_of_any_type(given: Any) -> None:
    found = combined_scores([Fixed(given)], PROMPTS, RESPONSES, BATCH)
    assert found.tolist() == [[1.0], [0.0], [2.0]]
    assert not found.requires_grad


def test_a_score_is_not_rounded_to_float32() -> None:
    fine = torch.tensor([1 + 2**-40, 0, 0], dtype=torch.float64)
    assert scored(Fixed(fine))[0][0] == 1 + 2**-40


def test_a_number_of_python_is_not_rounded_to_float32() -> None:
    assert scored(Fixed([0.1, 1e-300, 1e300])) == [[0.1], [1e-300], [1e300]]


def test_a_reward_sees_prompts_responses_and_the_rest_and_builds_no_graph() -> None:
    seen: list[Any] = []

    def watch(prompts: Any, responses: Any, batch: Any) -> Tensor:
        seen.extend([prompts, responses, batch, torch.is_grad_enabled()])
        return torch.zeros(3)

    scored(RewardFunction(watch))
    assert seen == [PROMPTS, RESPONSES, BATCH, False]


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ([1.0, 2.0], "(2,)"),
        ([1.0, 2.0, 3.0, 4.0], "(4,)"),
        ([[1.0], [2.0], [3.0]], "(3, 1)"),
        (1.0, "()"),
        ([], "(0,)"),
    ],
)
def test_another_number_of_scores_stops_training(given: Any, shape: str) -> None:
    message = stopped(Fixed([1.0, 2.0, 3.0]), Fixed(given))
    assert f"Fixed: must give one score to each response, (3,), got {shape}." in message


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_stops_training_and_names_the_response(bad: float) -> None:
    message = stopped(Fixed([1.0, bad, bad]))
    assert f"must give finite scores, got {bad} for response 2 of 3, 'five'." in message


def test_something_that_is_no_score_stops_training() -> None:
    assert "must not fail, got" in stopped(Fixed(None))
    assert "must not fail, got" in stopped(Fixed(["good", "bad", "good"]))


def test_an_error_inside_score_stops_training_with_its_type_message_and_line() -> None:
    def broken(prompts: Any, responses: Any, batch: Any) -> list[float]:
        raise KeyError("no\n  such answer")

    message = stopped(RewardFunction(broken))
    line = broken.__code__.co_firstlineno + 1
    assert message.startswith("model.init_args.rewards: broken: must not fail, got KeyError: ")
    assert f"({__file__}:{line})" in message
    assert r"no\n such answer" in message  # a KeyError shows its key as Python writes it


def test_an_error_of_several_lines_is_said_in_one() -> None:
    def broken(prompts: Any, responses: Any, batch: Any) -> list[float]:
        raise ValueError("first\n\tsecond\n" + "x" * 1000)

    message = stopped(RewardFunction(broken))
    assert "ValueError: first second xxx" in message
    assert len(message) < 600


@pytest.mark.parametrize("error", [TrainingStopped("enough."), InputError("mend it."), KeyboardInterrupt()])
def test_our_own_errors_and_interrupts_pass_as_they_are(error: BaseException) -> None:
    def broken(prompts: Any, responses: Any, batch: Any) -> list[float]:
        raise error

    with pytest.raises(type(error)) as caught:
        combined_scores([RewardFunction(broken)], PROMPTS, RESPONSES, BATCH)
    assert caught.value is error


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (RewardFunction, {"function": length}),
        (RewardService, {"url": "http://127.0.0.1:1"}),
        (RewardModel, {"path": "judge"}),
        (RewardAdapter, {"path": "judge"}),
    ],
)
def test_a_weight_that_is_no_number_is_refused(kind: Any, options: dict[str, Any], weight: float) -> None:
    with pytest.raises(InputError, match=rf"rewards: {kind.__name__}\.weight: must be a finite number, got {weight}\."):
        kind(**options, weight=weight)
    assert kind(**options, weight=-0.5).weight == -0.5
