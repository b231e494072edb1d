"""The losses of single responses against values worked out by hand, gradcheck, and their symmetries."""

import math

import pytest
import torch
from torch import Tensor

from lf_lightning.losses.kto import (
    KTO_LOSSES,
    apo_zero_unpaired_loss,
    kl_estimate,
    kto_loss,
    weight_ratio,
    weights_in_range,
)

LOG2, LOG3 = math.log(2), math.log(3)
LABELS = torch.tensor([True, False])


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_where_the_policy_is_the_reference_every_loss_is_a_half():
    zeros = torch.zeros(2)
    assert kto_loss(zeros, LABELS, kl=torch.tensor(0.0), beta=0.1).tolist() == [0.5, 0.5]
    assert apo_zero_unpaired_loss(zeros, LABELS, beta=0.1).tolist() == [0.5, 0.5]


def test_the_losses_are_those_worked_out_by_hand():
    log_ratios = tensor(2 * LOG3, 2 * LOG3)
    loss = kto_loss(log_ratios, LABELS, kl=scalar(2 * LOG2), beta=0.5)  # b (r - kl) = log(3/2)
    assert loss.tolist() == pytest.approx([0.4, 0.6], abs=1e-12)
    weighted = kto_loss(log_ratios, LABELS, kl=scalar(2 * LOG2), beta=0.5, desirable_weight=2.0, undesirable_weight=0.1)
    assert weighted.tolist() == pytest.approx([0.8, 0.06], abs=1e-12)
    loss = apo_zero_unpaired_loss(log_ratios, LABELS, beta=0.5, desirable_weight=2.0, undesirable_weight=0.1)
    assert loss.tolist() == pytest.approx([0.5, 0.075], abs=1e-12)  # 2 1/4, 0.1 3/4


def test_a_liked_response_is_pulled_up_and_a_disliked_one_pushed_down():
    log_ratios = tensor(0.3, 0.3).requires_grad_()
    kto_loss(log_ratios, LABELS, kl=scalar(0.3), beta=0.8, undesirable_weight=3.0).sum().backward()
    assert log_ratios.grad is not None
    assert log_ratios.grad.tolist() == pytest.approx([-0.2, 0.6], abs=1e-12)  # beta / 4, where the slope is largest


@pytest.mark.parametrize("name", KTO_LOSSES)
def test_gradcheck_passes(name: str):
    log_ratios = tensor(-2.0, 0.4, 1.5, -0.1).requires_grad_()
    labels = torch.tensor([True, False, True, False])
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    assert torch.autograd.gradcheck(
        lambda given: KTO_LOSSES[name].function(given, labels, kl=scalar(0.7), beta=0.5, **weights), (log_ratios,)
    )


@pytest.mark.parametrize("name", KTO_LOSSES)
def test_turning_label_and_distance_round_changes_nothing(name: str):
    log_ratios, kl = tensor(-2.0, 0.4), 0.7 if KTO_LOSSES[name].uses_kl else 0.0
    function = KTO_LOSSES[name].function
    turned = function(2 * kl - log_ratios, ~LABELS, kl=scalar(kl), beta=0.5)
    torch.testing.assert_close(turned, function(log_ratios, LABELS, kl=scalar(kl), beta=0.5))


def test_only_the_loss_that_uses_the_kl_reads_it():
    for name, entry in KTO_LOSSES.items():
        near, far = (entry.function(tensor(0.4, 0.2), LABELS, kl=scalar(kl), beta=0.5) for kl in (0.0, 1.0))
        assert torch.equal(near, far) != entry.uses_kl, name
    assert KTO_LOSSES["apo_zero_unpaired"].function(tensor(0.0), LABELS[:1], kl=None, beta=0.5).tolist() == [0.5]
    assert [name for name, entry in KTO_LOSSES.items() if entry.uses_kl] == ["kto"]


@pytest.mark.parametrize("name", KTO_LOSSES)
@pytest.mark.parametrize("value", [1e4, -1e4])
def test_far_from_the_reference_loss_and_gradient_stay_finite(name: str, value: float):
    log_ratios = torch.full((2,), value, requires_grad=True)
    loss = KTO_LOSSES[name].function(log_ratios, LABELS, kl=torch.tensor(0.0), beta=0.5)
    loss.sum().backward()
    assert loss.tolist() == ([0.0, 1.0] if value > 0 else [1.0, 0.0])
    assert log_ratios.grad is not None
    assert log_ratios.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", KTO_LOSSES)
def test_of_no_response_there_is_no_loss_but_a_gradient(name: str):
    empty = torch.empty(0, requires_grad=True)
    loss = KTO_LOSSES[name].function(empty, torch.empty(0, dtype=torch.bool), kl=torch.tensor(0.0), beta=0.5)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert empty.grad is not None


def test_a_kl_with_gradient_and_labels_of_another_shape_are_refused():
    with pytest.raises(AssertionError, match="has no gradient"):
        kto_loss(tensor(0.0, 0.0), LABELS, kl=scalar(0.0).requires_grad_(), beta=0.1)
    with pytest.raises(AssertionError, match="labels"):
        kto_loss(tensor(0.0), LABELS, kl=scalar(0.0), beta=0.1)


def test_the_kl_is_the_mean_of_the_step_but_never_below_zero_and_has_no_gradient():
    assert kl_estimate(scalar(6.0), 4).item() == 1.5
    assert kl_estimate(scalar(6.0), torch.tensor(4)).item() == 1.5
    assert kl_estimate(scalar(-6.0), 4).item() == 0.0
    assert kl_estimate(scalar(0.0), 0).item() == 0.0
    assert not kl_estimate(scalar(6.0).requires_grad_(), 4).requires_grad
    assert kl_estimate(torch.tensor(6.0), 4).dtype == torch.float32


def test_the_balance_of_the_weights_is_that_of_the_paper():
    assert weight_ratio(1.0, 2.0, 30, 10) == 1.5
    assert weight_ratio(1.0, 1.0, 0, 10) is None
    assert weight_ratio(1.0, 1.0, 10, 0) is None


@pytest.mark.parametrize(
    ("weights", "is_in_range"),
    [
        ((1.0, 1.0, 10, 10), True),
        ((1.0, 1.0, 12, 10), True),
        ((1.0, 1.0, 4, 3), True),
        ((4 / 3, 1.0, 3, 3), True),
        ((0.1, 0.3, 3, 1), True),  # 1 but for rounding
        ((1.0, 1.0, 9, 10), False),
        ((1.0, 1.0, 27, 20), False),
        ((1.0, 1.0, 10, 0), False),
    ],
)
def test_weights_are_in_range_between_one_and_four_thirds(weights: tuple[float, float, int, int], is_in_range: bool):
    assert weights_in_range(*weights) is is_in_range
