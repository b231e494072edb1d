"""Ppo's formulas: worked out by hand, and again in plain Python on random ragged rollouts."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lf_lightning.losses.masked import flattened, mask_of, masked_mean, masked_var, padded, whiten
from lf_lightning.losses.ppo import (
    PPOConstants,
    ScoreMoments,
    adaptive_kl_coef,
    approximate_kl,
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    kl_estimate,
    normalized_scores,
    shaped_rewards,
)
from lf_lightning.types import InputError


def row(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(tensor: Tensor, want: Any, tolerance: float = 1e-12) -> bool:
    return bool(torch.allclose(tensor, torch.as_tensor(want, dtype=torch.float64), rtol=0, atol=tolerance))


def ragged(seed: int) -> list[list[float]]:
    """Up to nine responses of up to seven numbers, one of them alone."""
    draw = random.Random(seed)
    return [[draw.gauss(0, 1) for _ in range(draw.randint(1, 7))] for _ in range(draw.randint(2, 9))] + [[0.5]]


def whole(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Rows as a padded tensor, and their lengths."""
    lengths = torch.tensor([len(each) for each in rows])
    return padded(row(*[number for each in rows for number in each]), lengths), lengths


def rows_of(tensor: Tensor, lengths: Tensor) -> list[list[float]]:
    return [each[:length].tolist() for each, length in zip(tensor, lengths.tolist(), strict=True)]


# ---------------------------------------------------------------------- masks


def test_padding_and_back_by_hand():
    lengths = torch.tensor([2, 1, 3])
    assert mask_of(lengths).tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    table = padded(row(1, 2, 3, 4, 5, 6), lengths)
    assert table.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert flattened(table, lengths).tolist() == [1, 2, 3, 4, 5, 6]


def test_masked_whitening_by_hand():
    # 1, 3, 5 count: mean 3, unbiased variance (4 + 0 + 4) / 2 = 4
    values, mask = row(1, 100, 3, 5), torch.tensor([True, False, True, True])
    assert float(masked_mean(values, mask)) == 3
    assert float(masked_var(values, mask)) == 4
    assert close(whiten(values, mask, shift_mean=True), [-1, 0, 0, 1], 1e-8)
    assert close(whiten(values, mask, shift_mean=False), [2, 0, 3, 4], 1e-8)


def test_one_number_alone_and_none_at_all_stay_finite():
    one, none = torch.tensor([True, False]), torch.tensor([False, False])
    assert whiten(row(7, 9), one, shift_mean=True).tolist() == [0, 0]
    assert whiten(row(7, 9), one, shift_mean=False).tolist() == [7, 0]
    assert whiten(row(7, 9), none, shift_mean=True).tolist() == [0, 0]
    assert float(masked_var(row(7, 9), one)) == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_is_that_of_plain_numbers(seed: int, shift_mean: bool):
    rows = ragged(seed)
    numbers = [number for each in rows for number in each]
    mean = sum(numbers) / len(numbers)
    scale = math.sqrt(sum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1) + 1e-8)
    want = [[(number - mean) / scale + (0 if shift_mean else mean) for number in each] for each in rows]
    table, lengths = whole(rows)
    found = rows_of(whiten(table, mask_of(lengths), shift_mean=shift_mean), lengths)
    assert [number for each in found for number in each] == pytest.approx([n for each in want for n in each], abs=1e-9)


# ---------------------------------------------------------------------- rewards and advantages


@pytest.mark.parametrize(
    ("estimator", "want"),
    [("k1", [0.5, -1.0, 0.0]), ("k2", [0.125, 0.5, 0.0]), ("k3", [math.exp(-0.5) - 0.5, math.e - 2, 0.0])],
)
def test_the_three_estimates_of_the_kl_by_hand(estimator: Any, want: list[float]):
    # d = 0.5, -1, 0;  k1 = d;  k2 = d^2 / 2;  k3 = e^-d - 1 + d
    assert close(kl_estimate(row(-1.0, -3.0, -2.0), row(-1.5, -2.0, -2.0), estimator=estimator), want)


def test_k1_and_k3_are_unbiased_under_the_policy_and_k2_is_near():
    policy, reference = row(0.5, 0.3, 0.2).log(), row(0.4, 0.35, 0.25).log()
    kl = float((policy.exp() * (policy - reference)).sum())
    means = {
        name: float((policy.exp() * kl_estimate(policy, reference, estimator=name)).sum())
        for name in ("k1", "k2", "k3")
    }
    assert means["k1"] == pytest.approx(kl, abs=1e-12)
    assert means["k3"] == pytest.approx(kl, abs=1e-12)
    assert means["k2"] == pytest.approx(kl, rel=0.1)


def test_rewards_are_the_price_of_the_kl_with_the_score_at_the_last_token():
    kl, lengths = torch.stack([row(1, 2), row(3, 0)]), torch.tensor([2, 1])
    found = shaped_rewards(kl, row(10, -4), lengths, kl_coef=0.5)
    assert found.tolist() == [[-0.5, 9.0], [-5.5, 0.0]]


def test_advantages_of_a_three_step_episode_by_hand():
    # gamma 0.9, lambda 0.5; r = 1, 0, 2; V = 0.5, 1, 1.5
    # delta_3 = 2 - 1.5 = 0.5;  delta_2 = 0 + 0.9 * 1.5 - 1 = 0.35;  delta_1 = 1 + 0.9 * 1 - 0.5 = 1.4
    # A_3 = 0.5;  A_2 = 0.35 + 0.45 * 0.5 = 0.575;  A_1 = 1.4 + 0.45 * 0.575 = 1.65875
    rewards, values = row(1, 0, 2)[None], row(0.5, 1, 1.5)[None]
    advantages, returns = generalized_advantages(
        rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, gae_lambda=0.5
    )
    assert close(advantages, [[1.65875, 0.575, 0.5]])
    assert close(returns, [[2.15875, 1.575, 2.0]])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.7, 1.0), (0.0, 0.5)])
def test_advantages_are_the_sums_of_the_definition(seed: int, gamma: float, gae_lambda: float):
    rewards, values = ragged(seed), ragged(seed)
    values = [[number * 3 - 1 for number in each] for each in values]
    (reward_table, lengths), (value_table, _) = whole(rewards), whole(values)
    behind = 99 * ~mask_of(lengths)  # what stands behind the end must not matter
    advantages, returns = generalized_advantages(
        reward_table + behind, value_table - behind, mask_of(lengths), gamma=gamma, gae_lambda=gae_lambda
    )
    for reward, value, found, back in zip(
        rewards, values, rows_of(advantages, lengths), rows_of(returns, lengths), strict=True
    ):
        after = [*value[1:], 0.0]
        deltas = [reward[t] + gamma * after[t] - value[t] for t in range(len(reward))]
        want = [
            sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))
        ]
        assert found == pytest.approx(want, abs=1e-9)
        assert back == pytest.approx([a + v for a, v in zip(want, value, strict=True)], abs=1e-9)
    assert not advantages[~mask_of(lengths)].any()


# ---------------------------------------------------------------------- clipped losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "is_clipped"),
    [
        (1.1, 2.0, -2.2, -2.2, False),  # inside: -A rho, gradient by the log-ratio -A rho
        (1.5, 2.0, -2.4, 0.0, True),  # above, and good: held at 1.2
        (0.5, 2.0, -1.0, -1.0, False),  # below, though good: pulled back
        (0.5, -2.0, 1.6, 0.0, True),  # below, and bad: held at 0.8
        (1.5, -2.0, 3.0, 3.0, False),  # above, though bad: pushed down
    ],
)
def test_the_policy_loss_on_both_sides_of_the_clip(
    ratio: float, advantage: float, loss: float, gradient: float, is_clipped: bool
):
    log_ratio = row(math.log(ratio)).requires_grad_()
    found = clipped_policy_loss(log_ratio, row(advantage), clip_range_low=0.2, clip_range_high=0.2)
    found.loss.sum().backward()
    assert close(found.loss.detach(), [loss])
    assert log_ratio.grad is not None
    assert close(log_ratio.grad, [gradient])
    assert found.is_clipped.tolist() == [is_clipped]
    assert close(found.ratio, [ratio])
    assert not found.ratio.requires_grad


def test_the_two_ranges_of_the_clip_are_apart():
    log_ratios, ones = row(math.log(1.25), math.log(0.75)), row(1, -1)
    wide = clipped_policy_loss(log_ratios, ones, clip_range_low=0.2, clip_range_high=0.3)
    assert close(wide.loss, [-1.25, 0.8])
    assert wide.is_clipped.tolist() == [False, True]


@pytest.mark.parametrize(
    ("value", "old", "back", "loss", "gradient", "is_clipped"),
    [
        (1.1, 1.0, 3.0, 1.805, -1.9, False),  # inside: (1.1 - 3)^2 / 2
        (2.0, 1.0, 3.0, 1.62, 0.0, True),  # moved towards the return too far: held at 1.2, (1.2 - 3)^2 / 2
        (0.0, 1.0, 3.0, 4.5, -3.0, False),  # moved away: (0 - 3)^2 / 2
        (0.0, 1.0, -3.0, 7.22, 0.0, True),  # held at 0.8: (0.8 + 3)^2 / 2
    ],
)
def test_the_value_loss_on_both_sides_of_the_clip(
    value: float, old: float, back: float, loss: float, gradient: float, is_clipped: bool
):
    now = row(value).requires_grad_()
    found = clipped_value_loss(now, row(old), row(back), clip_range=0.2)
    found.loss.sum().backward()
    assert close(found.loss.detach(), [loss])
    assert now.grad is not None
    assert close(now.grad, [gradient])
    assert found.is_clipped.tolist() == [is_clipped]


def test_without_a_range_a_value_is_compared_with_its_return_alone():
    found = clipped_value_loss(row(2.0), row(1.0), row(3.0), clip_range=None)
    assert found.loss.tolist() == [0.5]
    assert found.is_clipped.tolist() == [False]


@pytest.mark.parametrize("seed", range(5))
def test_clipped_losses_are_those_of_plain_numbers(seed: int):
    draw = random.Random(seed)
    numbers = [[draw.gauss(0, 1) for _ in range(40)] for _ in range(5)]
    log_ratios, advantages, values, old, back = (row(*each) for each in numbers)
    policy = clipped_policy_loss(log_ratios, advantages, clip_range_low=0.1, clip_range_high=0.3)
    value = clipped_value_loss(values, old, back, clip_range=0.25)
    for i, (lr, a, v, o, r) in enumerate(zip(*numbers, strict=True)):
        ratio = math.exp(lr)
        assert float(policy.loss[i]) == pytest.approx(max(-a * ratio, -a * min(max(ratio, 0.9), 1.3)), abs=1e-9)
        near = min(max(v, o - 0.25), o + 0.25)
        assert float(value.loss[i]) == pytest.approx(max((v - r) ** 2, (near - r) ** 2) / 2, abs=1e-9)
        assert float(approximate_kl(log_ratios)[i]) == pytest.approx(lr**2 / 2, abs=1e-9)


# ---------------------------------------------------------------------- what is carried


@pytest.mark.parametrize(
    ("kl", "want"),
    [
        (6.6, 0.2 * (1 + 0.1 * 50 / 1000)),  # error 6.6 / 6 - 1 = 0.1
        (30.0, 0.2 * (1 + 0.2 * 50 / 1000)),  # error 4, held at 0.2
        (0.0, 0.2 * (1 - 0.2 * 50 / 1000)),  # error -1, held at -0.2
        (6.0, 0.2),
    ],
)
def test_the_kl_controller_by_hand(kl: float, want: float):
    assert adaptive_kl_coef(0.2, kl, target=6.0, horizon=1000.0, num_responses=50) == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize("cuts", [[7], [1, 6], [3, 4], [1, 1, 5], [2, 0, 5]])
def test_the_moments_of_scores_do_not_depend_on_how_these_come(cuts: list[int]):
    scores = row(2, 4, 4, 4, 5, 5, 9)  # mean 33 / 7, squares about it: 183 - 33^2 / 7
    moments, start = ScoreMoments(), 0
    for size in cuts:
        moments, start = moments.updated(scores[start : start + size]), start + size
    assert moments.num_scores == 7
    assert moments.mean == pytest.approx(33 / 7, abs=1e-12)
    assert moments.std == pytest.approx(math.sqrt((183 - 33**2 / 7) / 6), abs=1e-12)


def test_the_deviation_of_one_score_and_of_equal_ones_is_1():
    assert ScoreMoments().std == 1
    assert ScoreMoments().updated(row(5)).std == 1
    assert ScoreMoments().updated(row(5, 5, 5)).std == 1


def test_scores_are_scaled_or_whitened_and_then_clipped():
    moments = ScoreMoments().updated(row(1, 3, 5))  # mean 3, deviation 2
    for norm, clip, want in (
        ("none", None, [1, 3, 5]),
        ("scale", None, [0.5, 1.5, 2.5]),
        ("whiten", None, [-1, 0, 1]),
        ("scale", 1.0, [0.5, 1, 1]),
        ("whiten", 0.25, [-0.25, 0, 0.25]),
    ):
        assert close(normalized_scores(row(1, 3, 5), moments, norm=norm, clip=clip), want, 1e-7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("num_epochs", 0),
        ("gamma", 1.1),
        ("gae_lambda", -0.1),
        ("clip_range", 0.0),
        ("value_clip_range", 0.0),
        ("value_coef", -1.0),
        ("entropy_coef", -1.0),
        ("kl_coef", math.inf),
        ("kl_target", 0.0),
        ("kl_horizon", 0.0),
        ("score_clip", 0.0),
        ("missing_eos_penalty", -1.0),
        ("target_kl", 0.0),
        ("ratio_threshold", 1.0),
        ("gamma", math.nan),
        ("kl_coef", math.nan),
    ],
)
def test_a_constant_out_of_its_range_is_refused(name: str, wrong: Any):
    with pytest.raises(
        InputError, match=rf"^model\.init_args\.constants\.{name}: must be .*, got {wrong}\. Correct it"
    ):
        PPOConstants(**{name: wrong})
