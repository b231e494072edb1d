"""The losses of pairs against values worked out by hand, gradcheck, and what each of them must not care about."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lf_lightning.losses.preference import (
    PREFERENCE_LOSSES,
    LogRatios,
    PreferenceConstants,
    StepKL,
    bco_shifted_loss,
    exo_pair_loss,
    mixed_loss,
    preference_rewards,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from lf_lightning.types import InputError

LOG2, LOG3, LOG6 = math.log(2), math.log(3), math.log(6)
ALL = sorted(PREFERENCE_LOSSES)
OF_THE_MARGIN = {"sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm", "simpo"}


def ratios_of(chosen: Any, rejected: Any, dtype: torch.dtype = torch.float64) -> LogRatios:
    return LogRatios(*(torch.tensor(side, dtype=dtype).reshape(-1).requires_grad_() for side in (chosen, rejected)))


def kl_of(chosen: float = 0.0, rejected: float = 0.0) -> StepKL:
    return StepKL(torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64))


def loss_of(name: str, ratios: LogRatios, *, beta: float = 0.5, kl: StepKL | None = None, **constants: float) -> Tensor:
    entry = PREFERENCE_LOSSES[name]
    kl = (kl or kl_of()) if entry.uses_step_kl else None
    return entry.function(ratios, beta=beta, constants=PreferenceConstants(**constants), kl=kl)


AT_THE_REFERENCE = {
    "sigmoid": 0.6931471805599453,  # log 2
    "hinge": 1.0,
    "ipo": 25.0,  # 1 / (2 beta)^2
    "kto_pair": 0.5,
    "robust": 0.6931471805599453,
    "exo_pair": 2.761230709097915,  # log(1/2) - (log 0.999 + log 0.001) / 2
    "nca_pair": 1.3862943611198906,  # 2 log 2
    "bco_pair": 1.3862943611198906,
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.8465735902799727,  # (log 2 + 1) / 2
    "sigmoid_norm": 0.6931471805599453,
}


@pytest.mark.parametrize(("name", "value"), AT_THE_REFERENCE.items(), ids=AT_THE_REFERENCE)
def test_where_the_policy_is_the_reference_the_loss_has_its_known_value(name: str, value: float):
    loss = loss_of(name, ratios_of([0.0, 0.0], [0.0, 0.0]), beta=0.1)
    assert loss.tolist() == pytest.approx([value, value], abs=1e-7)


# beta = 1/2, c = 2 log 3, r = -2 log 2: sig(b c) = 3/4, sig(b r) = 1/3, sig(b d) = 6/7
BY_HAND: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": ({"label_smoothing": 0.1}, 0.3333266267505639),  # 0.9 log(7/6) + 0.1 log 7
    "hinge": ({}, 0.0),  # log 6 > 1
    "ipo": ({}, 6.674570105361385),  # (2 log 6 - 1)^2
    "kto_pair": ({"kl": kl_of(chosen=2 * LOG2)}, 0.225),  # (1/4 + (1 - 4/5)) / 2
    "robust": ({"label_smoothing": 0.1}, -0.0698192538),  # (0.9 log(7/6) - 0.1 log 7) / 0.8
    "exo_pair": ({"label_smoothing": 0.25}, 0.0345103668),  # 6/7 log(8/7) + 1/7 log(4/7)
    "nca_pair": ({}, 1.1835618071),  # log(4/3) + log(4) / 2 + log(3/2) / 2
    "bco_pair": ({}, 0.6931471805599453),  # log(4/3) + log(3/2)
    "sppo_hard": ({}, 1.582570022010914),  # (2 log 3 - 1)^2 + (1 - 2 log 2)^2
    "apo_zero": ({}, 0.5833333333333333),  # 1/4 + 1/3
    "apo_down": ({}, 0.8928571428571429),  # 3/4 + 1/7
    "discopop": ({"discopop_tau": 1.0}, 0.1648786685),  # log(7/6) / 7 + 6/7 1/6
    "sigmoid_norm": ({}, 0.1541506798272583),  # log(7/6)
    "simpo": ({"simpo_gamma": LOG2}, 0.2876820724517809),  # log(4/3): b d - log 2 = log 3
}


@pytest.mark.parametrize(("name", "case"), BY_HAND.items(), ids=BY_HAND)
def test_the_loss_of_a_pair_is_that_worked_out_by_hand(name: str, case: tuple[dict[str, Any], float]):
    options, value = case
    loss = loss_of(name, ratios_of(2 * LOG3, -2 * LOG2), beta=0.5, **options)
    assert loss.tolist() == pytest.approx([value], abs=1e-9)


def test_the_odds_of_orpo_are_those_worked_out_by_hand():
    means = ratios_of(math.log(3 / 4), math.log(1 / 3))  # odds 3 and 1/2
    loss = loss_of("orpo", means, beta=0.5)
    assert loss.item() == pytest.approx(0.36475741236541005, abs=1e-12)  # log(4/3) + log(7/6) / 2
    loss.backward()
    assert means.chosen.grad is not None
    assert means.rejected.grad is not None
    assert means.chosen.grad.item() == pytest.approx(-1.2857142857142858, abs=1e-12)  # -1 - 1/2 1/7 / (1 - 3/4)
    assert means.rejected.grad.item() == pytest.approx(0.10714285714285714, abs=1e-12)  # 1/2 1/7 / (1 - 1/3)


def test_a_pair_beyond_the_hinge_costs_its_distance():
    loss = loss_of("hinge", ratios_of(-2 * LOG2, 2 * LOG3))
    assert loss.item() == pytest.approx(2.791759469228055, abs=1e-12)  # 1 + log 6


def test_the_reference_values_of_table_and_losses_cover_every_name():
    assert {*AT_THE_REFERENCE, "orpo", "simpo"} == {*BY_HAND, "orpo"} == set(PREFERENCE_LOSSES)
    means = {name for name, entry in PREFERENCE_LOSSES.items() if entry.uses_means}
    assert means == {"ipo", "sigmoid_norm", "orpo", "simpo"}
    assert {name for name, entry in PREFERENCE_LOSSES.items() if not entry.uses_reference} == {"orpo", "simpo"}
    assert {name for name, entry in PREFERENCE_LOSSES.items() if entry.uses_step_kl} == {"kto_pair"}


# Log-probs per token of two pairs with responses of 3, 2, 1 and 4 tokens, and the reference's sums
TOKENS = ((-0.5, -1.5, -0.25), (-2.0, -1.0), (-0.75,), (-0.5, -3.0, -1.0, -0.5))
REFERENCE_SUMS = (-3.0, -2.0, -0.5, -6.5)


def gradient_in_tokens(name: str, **constants: float) -> Tensor:
    """Direction of the gradient in the log-prob of every token."""
    entry = PREFERENCE_LOSSES[name]
    tokens = torch.tensor([*itertools.chain(*TOKENS)], dtype=torch.float64, requires_grad=True)
    sums = torch.stack([part.sum() for part in tokens.split([len(part) for part in TOKENS])])
    lengths = torch.tensor([float(len(part)) for part in TOKENS])
    ratios = sums - torch.tensor(REFERENCE_SUMS) if entry.uses_reference else sums
    ratios = ratios / lengths if entry.uses_means else ratios
    kl = kl_of(0.3, 0.9)  # without it kto_pair is half of apo_zero
    loss_of(name, LogRatios(ratios[::2], ratios[1::2]), beta=0.3, kl=kl, **constants).sum().backward()
    assert tokens.grad is not None
    return torch.nn.functional.normalize(tokens.grad, dim=0)


@pytest.mark.parametrize(("first", "second"), itertools.combinations(ALL, 2))
def test_no_two_names_pull_in_the_same_direction(first: str, second: str):
    constants = {"label_smoothing": 0.1}
    cosine = gradient_in_tokens(first, **constants) @ gradient_in_tokens(second, **constants)
    assert cosine < 1 - 1e-6


@pytest.mark.parametrize("name", ALL)
def test_a_constant_changes_the_losses_that_read_it_and_no_other(name: str):
    changed = {"label_smoothing": 0.2, "simpo_gamma": 1.5, "discopop_tau": 0.7}
    ratios = ratios_of([-0.4, -1.3], [-0.9, -0.2])
    plain = loss_of(name, ratios)
    found = {
        constant
        for constant, value in changed.items()
        if not torch.equal(plain, loss_of(name, ratios, **{constant: value}))
    }
    assert found == set(PREFERENCE_LOSSES[name].options)


@pytest.mark.parametrize("name", ALL)
def test_beta_changes_every_loss(name: str):
    ratios = ratios_of([-0.4, -1.3], [-0.9, -0.2])
    assert not torch.isclose(loss_of(name, ratios, beta=0.5), loss_of(name, ratios, beta=0.6)).any()


@pytest.mark.parametrize("name", ALL)
def test_only_losses_of_the_margin_ignore_what_both_responses_share(name: str):
    ratios, shifted = ratios_of([-0.4, -1.3], [-0.9, -0.2]), ratios_of([-0.7, -1.6], [-1.2, -0.5])
    is_same = torch.isclose(loss_of(name, ratios), loss_of(name, shifted), rtol=1e-12)
    assert is_same.tolist() == [name in OF_THE_MARGIN] * 2


@pytest.mark.parametrize("name", ALL)
def test_the_losses_of_pairs_know_nothing_of_each_other(name: str):
    ratios = ratios_of([-0.4, -1.3], [-0.9, -0.2])
    alone = [loss_of(name, LogRatios(*(side[i : i + 1] for side in ratios))) for i in (0, 1)]
    assert torch.equal(loss_of(name, ratios), torch.cat(alone))


@pytest.mark.parametrize("name", ALL)
def test_of_no_pair_there_is_no_loss_but_a_gradient(name: str):
    empty = ratios_of([], [])
    loss = loss_of(name, empty)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert empty.chosen.grad is not None


@pytest.mark.parametrize("name", ALL)
def test_gradcheck_passes(name: str):
    chosen, rejected = ratios_of([-0.4, -1.3, -0.05], [-0.9, -0.2, -6.0])
    constants = {"label_smoothing": 0.1, "discopop_tau": 0.4}
    kl = kl_of(0.3, 0.2)
    assert torch.autograd.gradcheck(
        lambda *sides: loss_of(name, LogRatios(*sides), kl=kl, **constants), (chosen, rejected)
    )


@pytest.mark.parametrize("name", ALL)
def test_a_step_down_the_gradient_prefers_the_chosen_response_more(name: str):
    ratios = ratios_of(-4.0, -0.8)  # where the pair is in the wrong order; near 0 discopop pulls the other way
    loss_of(name, ratios).backward()
    assert ratios.chosen.grad is not None
    assert ratios.rejected.grad is not None
    assert ratios.chosen.grad.item() < ratios.rejected.grad.item()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("chosen", "rejected"), [(-1e4, -1e-3), (-1e-3, -1e4), (0.0, 0.0), (0.0, -1e4), (-1e4, 0.0)])
def test_far_from_the_reference_loss_and_gradient_stay_finite(name: str, chosen: float, rejected: float):
    ratios = ratios_of(chosen, rejected, torch.float32)
    loss = loss_of(name, ratios)
    assert loss.dtype == torch.float32
    loss.backward()
    for found in (loss, ratios.chosen.grad, ratios.rejected.grad):
        assert found is not None
        assert torch.isfinite(found).all()


def test_wrong_labels_are_swapped_pairs():
    ratios = ratios_of([0.4, -1.3], [-0.9, 0.2])
    swapped = LogRatios(ratios.rejected, ratios.chosen)
    torch.testing.assert_close(
        sigmoid_loss(swapped, beta=0.5, label_smoothing=0.3), sigmoid_loss(ratios, beta=0.5, label_smoothing=0.7)
    )


def test_the_robust_loss_of_noisy_labels_is_on_average_the_loss_of_clean_ones():
    ratios = ratios_of([0.4, -1.3], [-0.9, 0.2])
    swapped = LogRatios(ratios.rejected, ratios.chosen)
    noisy = [robust_loss(side, beta=0.5, label_smoothing=0.2) for side in (ratios, swapped)]
    torch.testing.assert_close(0.8 * noisy[0] + 0.2 * noisy[1], sigmoid_loss(ratios, beta=0.5))


def test_the_exo_loss_is_zero_where_the_policy_prefers_as_the_data_does_and_never_below():
    at = ratios_of([2 * LOG3, 0.0, 4 * LOG3], [0.0, 0.0, 0.0])  # sig(b d) = 3/4, 1/2, 9/10
    loss = exo_pair_loss(at, beta=0.5, label_smoothing=0.25)
    assert loss[0].item() == pytest.approx(0.0, abs=1e-15)
    assert (loss[1:] > 0.01).all()


def test_no_smoothing_of_the_exo_loss_stands_for_a_thousandth():
    ratios = ratios_of([0.4, -1.3], [-0.9, 0.2])
    found = exo_pair_loss(ratios, beta=0.5)
    assert torch.equal(found, exo_pair_loss(ratios, beta=0.5, label_smoothing=1e-3))


def test_the_kl_of_each_side_moves_the_other_half():
    ratios = ratios_of([0.4], [-0.9])
    shifted = ratios_of([0.4 + 1.5], [-0.9 + 1.5])
    plain = loss_of("kto_pair", ratios, kl=kl_of(0.2, 0.7))
    torch.testing.assert_close(loss_of("kto_pair", shifted, kl=kl_of(1.7, 2.2)), plain)
    loss_of("kto_pair", ratios, kl=kl_of(0.2, 50.0)).backward()  # the chosen half is flat there
    assert ratios.chosen.grad is not None
    assert ratios.rejected.grad is not None
    assert abs(ratios.chosen.grad.item()) < 1e-9
    assert ratios.rejected.grad.item() > 0.05


def test_a_kl_with_gradient_and_a_missing_one_are_refused():
    ratios = ratios_of([0.4], [-0.9])
    with pytest.raises(AssertionError, match="has no gradient"):
        loss_of("kto_pair", ratios, kl=StepKL(torch.zeros((), requires_grad=True), torch.zeros(())))
    with pytest.raises(AssertionError, match="kto_pair_loss needs the KL of the step"):
        PREFERENCE_LOSSES["kto_pair"].function(ratios, beta=0.5, constants=PreferenceConstants(), kl=None)


def test_the_shift_of_bco_is_taken_off_both_rewards():
    ratios = ratios_of(2 * LOG3, -2 * LOG2)
    loss = bco_shifted_loss(ratios, beta=0.5, delta=torch.tensor(LOG3, dtype=torch.float64))
    assert loss.item() == pytest.approx(0.8472978603872037, abs=1e-12)  # log 2 + log(7/6)
    away = ratios_of(2 * LOG3 + 4.0, -2 * LOG2 + 4.0)
    assert bco_shifted_loss(away, beta=0.5, delta=LOG3 + 2.0).item() == pytest.approx(0.8472978603872037, abs=1e-12)


def test_the_bco_mix_at_the_reference_is_the_known_value():
    start = ratios_of(0.0, 0.0)
    bco = bco_shifted_loss(start, beta=0.1, delta=0.0)
    mixed = mixed_loss(sigmoid_loss(start, beta=0.1), bco, weight=0.5)
    assert mixed.item() == pytest.approx(0.9241962407465937, abs=1e-12)  # (log 2 + 0.5 2 log 2) / 1.5
    assert mixed_loss(torch.tensor(4.0), torch.tensor(1.0), weight=0.5).item() == 3.0
    assert mixed_loss(torch.tensor(4.0), torch.tensor(1.0), weight=0.0).item() == 4.0


def test_rewards_are_beta_times_the_ratios_without_gradient():
    rewards = preference_rewards(ratios_of([2.0, -4.0], [1.0, 8.0]), beta=0.25)
    assert (rewards.chosen.tolist(), rewards.rejected.tolist()) == ([0.5, -1.0], [0.25, 2.0])
    assert not rewards.chosen.requires_grad
    assert not rewards.rejected.requires_grad


def test_the_gamma_of_simpo_is_a_margin_of_rewards():
    ratios = ratios_of(-1.0, -1.8)
    loss = simpo_loss(ratios, beta=2.5, simpo_gamma=2.0)
    assert loss.item() == pytest.approx(0.6931471805599453, abs=1e-12)  # 2.5 0.8 - 2 = 0


@pytest.mark.parametrize(
    ("name", "value", "want"),
    [
        ("label_smoothing", 0.5, "in [0, 0.5)"),
        ("label_smoothing", -0.1, "in [0, 0.5)"),
        ("label_smoothing", math.nan, "in [0, 0.5)"),
        ("simpo_gamma", -1.0, "0 or more"),
        ("simpo_gamma", math.inf, "0 or more"),
        ("discopop_tau", 0.0, "positive"),
    ],
)
def test_a_constant_outside_its_range_is_refused_by_name(name: str, value: float, want: str):
    with pytest.raises(InputError) as caught:
        PreferenceConstants(**{name: value})
    assert str(caught.value) == f"model.init_args.constants.{name}: must be {want}, got {value}. Correct it."


def test_constants_at_the_edge_of_their_range_are_accepted():
    edge = PreferenceConstants(label_smoothing=0.499, simpo_gamma=0.0, discopop_tau=1e-3)
    assert vars(edge) == {"label_smoothing": 0.499, "simpo_gamma": 0.0, "discopop_tau": 1e-3}
    assert vars(PreferenceConstants()) == {"label_smoothing": None, "simpo_gamma": 0.5, "discopop_tau": 0.05}


def test_sides_of_different_length_are_refused():
    with pytest.raises(AssertionError, match="chosen"):
        sigmoid_loss(LogRatios(torch.zeros(3), torch.zeros(1)), beta=0.1)
