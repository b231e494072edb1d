"""The losses of a reward model against values worked out by hand, gradcheck, and their symmetries."""

import math

import pytest
import torch
from torch import Tensor

from lf_lightning.losses.reward import centering_penalty, reward_loss


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_losses_are_those_worked_out_by_hand():
    chosen, rejected = tensor(1.0, math.log(6), math.log(6)), tensor(1.0, math.log(2), math.log(2))
    loss = reward_loss(chosen, rejected, margin=tensor(0.0, 0.0, math.log(3)))
    # log 2, log(4/3), log 2
    assert loss.tolist() == pytest.approx([0.6931471805599453, 0.2876820724517809, 0.6931471805599453], abs=1e-12)


def test_the_penalty_is_the_square_of_the_sum():
    assert centering_penalty(tensor(1.5, 2.0), tensor(-0.5, -2.0)).tolist() == [1.0, 0.0]


def test_gradcheck_passes():
    sides = (tensor(0.3, -2.0).requires_grad_(), tensor(1.1, 0.4).requires_grad_())
    assert torch.autograd.gradcheck(lambda *given: reward_loss(*given, margin=tensor(0.5, 0.0)), sides)
    assert torch.autograd.gradcheck(centering_penalty, sides)


def test_the_loss_ignores_what_both_scores_share_and_the_penalty_does_not():
    chosen, rejected, margin = tensor(0.3, -2.0), tensor(1.1, 0.4), tensor(0.5, 0.0)
    torch.testing.assert_close(
        reward_loss(chosen + 7.0, rejected + 7.0, margin=margin), reward_loss(chosen, rejected, margin=margin)
    )
    assert (centering_penalty(chosen + 7.0, rejected + 7.0) > centering_penalty(chosen, rejected)).all()
    assert torch.equal(centering_penalty(chosen, rejected), centering_penalty(rejected, chosen))


def test_swapping_a_pair_costs_its_margin_twice_over():
    chosen, rejected, zero = tensor(2.0), tensor(0.5), tensor(0.0)
    worse = reward_loss(rejected, chosen, margin=zero) - reward_loss(chosen, rejected, margin=zero)
    assert worse.item() == pytest.approx(1.5, abs=1e-12)  # log sig(x) - log sig(-x) = x


def test_margins_in_float64_leave_the_type_of_the_scores():
    loss = reward_loss(torch.zeros(1), torch.zeros(1), margin=tensor(0.0))
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_scores_far_apart_give_finite_losses_and_gradients(gap: float):
    chosen = torch.tensor([gap], requires_grad=True)
    loss = reward_loss(chosen, torch.zeros(1), margin=torch.zeros(1))
    loss.sum().backward()
    assert loss.item() == max(0.0, -gap)
    assert chosen.grad is not None
    assert chosen.grad.item() == (0.0 if gap > 0 else -1.0)


def test_of_no_pair_there_is_no_loss_but_a_gradient():
    empty = torch.empty(0, requires_grad=True)
    loss = reward_loss(empty, empty, margin=torch.empty(0)) + centering_penalty(empty, empty)
    loss.sum().backward()
    assert loss.shape == (0,)
    assert empty.grad is not None


def test_sides_and_margins_of_different_length_are_refused():
    with pytest.raises(AssertionError):
        reward_loss(torch.zeros(2), torch.zeros(2), margin=torch.zeros(1))
    with pytest.raises(AssertionError):
        centering_penalty(torch.zeros(2), torch.zeros(1))
