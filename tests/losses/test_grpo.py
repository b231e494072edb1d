"""Grpo's formulas: worked out by hand, and again in plain Python on random groups."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest
import torch

from lf_lightning.losses.grpo import GRPOConstants, group_advantages, importance_log_ratios, token_weights
from lf_lightning.types import InputError
from tests.losses.test_ppo import close, row


@pytest.mark.parametrize(
    ("scale", "want"),
    [
        # groups 1, 3 (mean 2, deviation sqrt 2) and 0, 6 (mean 3, deviation sqrt 18); of all: mean 2.5, 21 / 3 = 7
        ("none", [-1, 1, -3, 3]),
        ("group", [n / (math.sqrt(2) + 1e-4) for n in (-1, 1)] + [n / (math.sqrt(18) + 1e-4) for n in (-3, 3)]),
        ("batch", [n / (math.sqrt(7) + 1e-4) for n in (-1, 1, -3, 3)]),
    ],
)
def test_advantages_within_groups_by_hand(scale: Any, want: list[float]):
    assert close(group_advantages(row(1, 3, 0, 6), 2, scale=scale), want)


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_equal_scores_of_a_group_give_exactly_nothing(scale: Any):
    found = group_advantages(row(0.1, 0.1, 0.1, 1.0, 2.0, 6.0), 3, scale=scale)
    assert found[:3].tolist() == [0, 0, 0]
    assert found[3:].all()
    assert group_advantages(row(0.1, 0.1), 2, scale=scale).tolist() == [0, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_advantages_are_those_of_plain_numbers(seed: int, scale: Any):
    draw = random.Random(seed)
    size, scores = draw.randint(2, 6), list[float]()
    for _ in range(5):
        scores += [draw.gauss(3, 2) for _ in range(size)]
    want = []
    for start in range(0, len(scores), size):
        group = scores[start : start + size]
        divisor = {"none": 1.0, "group": statistics.stdev(group) + 1e-4, "batch": statistics.stdev(scores) + 1e-4}[
            scale
        ]
        want += [(score - statistics.mean(group)) / divisor for score in group]
    assert group_advantages(row(*scores), size, scale=scale).tolist() == pytest.approx(want, abs=1e-9)


def test_the_ratio_of_a_sequence_is_the_mean_of_its_log_ratios():
    log_ratios, sequences = row(1, 2, 5, 3, -1).requires_grad_(), torch.tensor([0, 0, 2, 0, 2])
    assert importance_log_ratios(log_ratios, sequences, 3, importance="token") is log_ratios
    found = importance_log_ratios(log_ratios, sequences, 3, importance="sequence")
    assert found.tolist() == [2, 2, 2, 2, 2]  # (1 + 2 + 3) / 3 and (5 - 1) / 2
    found[0].backward()
    assert log_ratios.grad is not None
    assert close(log_ratios.grad, [1 / 3, 1 / 3, 0, 1 / 3, 0])


@pytest.mark.parametrize(
    ("loss", "want"), [("grpo", [1 / 2, 1 / 4, 1]), ("dr_grpo", [1 / 8] * 3), ("dapo", [1.0, 1.0, 1.0])]
)
def test_the_weight_of_a_token(loss: Any, want: list[float]):
    assert close(token_weights(torch.tensor([2, 4, 1]), loss=loss, max_new_tokens=8), want)


def test_auto_divides_by_nothing_with_dr_grpo_alone():
    assert GRPOConstants().scales == "group"
    assert GRPOConstants(loss="dapo").scales == "group"
    assert GRPOConstants(loss="dr_grpo").scales == "none"
    assert GRPOConstants(loss="dr_grpo", scale_rewards="batch").scales == "batch"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("group_size", 1),
        ("num_epochs", 0),
        ("clip_range_low", 0.0),
        ("clip_range_low", 1.5),
        ("clip_range_high", 0.0),
        ("kl_coef", -0.1),
        ("entropy_coef", math.nan),
        ("missing_eos_penalty", -1.0),
        ("score_clip", 0.0),
        ("target_kl", 0.0),
        ("ratio_threshold", 0.9),
    ],
)
def test_a_constant_out_of_its_range_is_refused(name: str, wrong: Any):
    with pytest.raises(
        InputError, match=rf"^model\.init_args\.constants\.{name}: must be .*, got {wrong}\. Correct it"
    ):
        GRPOConstants(**{name: wrong})
