"""Losses of supervised fine-tuning: values worked out by hand, second formulas, and a naive path with all logits."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lf_lightning.losses.causal_lm import (
    CountedStates,
    TokenLoss,
    TokenLosses,
    asft_loss,
    counted_states,
    dft_loss,
    eaft_loss,
    smoothed_loss,
    token_loss_sums,
)
from lf_lightning.losses.log_probs import cross_entropy_sums
from lf_lightning.types import IGNORE, OutputLayer
from tests.losses.test_log_probs import CASES, Case, Inputs, make_inputs, watched

LOG2 = math.log(2)
P = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]], dtype=torch.float64)
SECOND = torch.tensor([1])


def of(function: TokenLoss) -> float:
    """The loss of one token with the probabilities P whose target has 1/4: nll = 2 log 2."""
    return float(function(P.log(), SECOND, torch.zeros(1, 4, dtype=torch.float64)).loss)


def test_smoothing_adds_the_mean_over_all_words():
    # mean of -log p = (1 + 2 + 3 + 3) / 4 log 2
    assert of(lambda z, t, _: smoothed_loss(z, t, label_smoothing=0.1)) == pytest.approx((0.9 * 2 + 0.1 * 2.25) * LOG2)


def test_dft_weighs_a_token_by_its_probability():
    assert of(lambda z, t, _: dft_loss(z, t)) == pytest.approx(0.25 * 2 * LOG2)


@pytest.mark.parametrize(("alpha", "weight"), [(1.0, 0.875), (2.0, 0.765625), (0.0, 1.0)])
def test_eaft_weighs_a_token_by_the_entropy_of_the_likeliest_words(alpha: float, weight: float):
    # H = 1/2 log 2 + 1/4 2 log 2 + 2 * 1/8 3 log 2 = 1.75 log 2; over log 4: 0.875
    assert of(lambda z, t, _: eaft_loss(z, t, alpha=alpha)) == pytest.approx(weight * 2 * LOG2)


def test_asft_adds_the_divergence_from_the_reference():
    # q uniform: KL(q || p) = mean of -log p - log 4 = 0.25 log 2
    found = asft_loss(P.log(), SECOND, torch.zeros(1, 4, dtype=torch.float64), alpha=0.4)
    assert float(found.loss) == pytest.approx(0.5 * LOG2 + 0.4 * 0.25 * LOG2)
    assert found.kl is not None
    assert float(found.kl) == pytest.approx(0.25 * LOG2)
    assert float(found.nll) == pytest.approx(2 * LOG2)


def test_a_word_that_both_models_forbid_adds_nothing_and_has_no_gradient():
    forbid = torch.tensor([[0.0, 0.0, -math.inf, 0.0]], dtype=torch.float64)
    logits = (P.log() + forbid).requires_grad_()
    found = asft_loss(logits, SECOND, forbid, alpha=1.0)
    (gradient,) = torch.autograd.grad(found.loss.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0


def test_defect_46_eaft_works_with_fewer_than_twenty_words_and_divides_by_their_number():
    uniform = torch.zeros(1, 3, dtype=torch.float64)
    assert float(eaft_loss(uniform, SECOND, alpha=1.0).loss) == pytest.approx(math.log(3))  # weight exactly 1
    many = torch.zeros(1, 50, dtype=torch.float64)
    assert float(eaft_loss(many, SECOND, alpha=1.0).loss) == pytest.approx(math.log(50))


def test_eaft_reads_only_the_twenty_likeliest_words():
    few = torch.tensor([*[0.0] * 20], dtype=torch.float64)
    long = torch.cat([few, torch.full((1000,), -3.0, dtype=torch.float64)])
    found = eaft_loss(long.unsqueeze(0), SECOND, alpha=1.0)
    assert float(found.loss) == pytest.approx(float(found.nll))  # 20 equal words: weight 1


def test_the_weights_have_no_gradient():
    """The gradient of w * nll with a constant w is w (softmax - one_hot)."""
    for function, weight in ((dft_loss, 0.25), (partial(eaft_loss, alpha=1.0), 0.875)):
        logits = P.log().requires_grad_()
        (gradient,) = torch.autograd.grad(function(logits, SECOND).loss.sum(), logits)
        torch.testing.assert_close(gradient, weight * (P - F.one_hot(SECOND, 4)))


def test_smoothed_loss_agrees_with_pytorch():
    logits = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(7)
    for eps in (0.0, 0.1, 0.9):
        want = F.cross_entropy(logits, targets, label_smoothing=eps, reduction="none")
        torch.testing.assert_close(smoothed_loss(logits, targets, label_smoothing=eps).loss, want)


# ---------------------------------------------------------------------- over a batch


def smoothed(logits: Tensor, targets: Tensor, _: Tensor | None) -> TokenLosses:
    return smoothed_loss(logits, targets, label_smoothing=0.2)


def dft(logits: Tensor, targets: Tensor, _: Tensor | None) -> TokenLosses:
    return dft_loss(logits, targets)


def eaft(logits: Tensor, targets: Tensor, _: Tensor | None) -> TokenLosses:
    return eaft_loss(logits, targets, alpha=1.5)


def asft(logits: Tensor, targets: Tensor, reference: Tensor | None) -> TokenLosses:
    assert reference is not None
    return asft_loss(logits, targets, reference, alpha=0.7)


LOSSES: dict[str, TokenLoss] = {"smoothed": smoothed, "dft": dft, "eaft": eaft, "asft": asft}


def second_formula(name: str, logits: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
    """The same losses written another way, with all logits: sums over tokens."""
    nll = F.cross_entropy(logits, targets, reduction="none")
    p = logits.softmax(1)
    if name == "smoothed":
        return F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum")
    picked = p.detach().gather(1, targets.unsqueeze(1)).squeeze(1)
    if name == "dft":
        return (picked * nll).sum()
    if name == "asft":
        kl = F.kl_div(logits.log_softmax(1), reference.softmax(1), reduction="sum")
        return (picked * nll).sum() + 0.7 * kl
    top = p.detach().sort(1, descending=True).values[:, :20]
    share = top / top.sum(1, keepdim=True)
    entropy = -(share * share.log()).sum(1)
    return ((entropy / math.log(share.shape[1])) ** 1.5 * nll).sum()


def all_logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    hidden, layer, targets = inputs
    logits = F.linear(hidden, layer.weight, layer.bias) * layer.scale
    if layer.softcap is not None:
        logits = layer.softcap * torch.tanh(logits / layer.softcap)
    counted = targets != IGNORE
    return logits[counted], targets[counted]


def reference_like(inputs: Inputs) -> CountedStates:
    """Another model's states of the same batch: wider, and with its own layer."""
    generator = torch.Generator().manual_seed(5)
    shape = (*inputs.hidden.shape[:2], 6)
    dtype = inputs.layer.weight.dtype
    hidden = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(len(inputs.layer.weight), 6, generator=generator, dtype=torch.float64).to(dtype)
    return counted_states(hidden, OutputLayer(weight, scale=0.5), inputs.targets, keeps_weights=True)


def reference_logits(states: CountedStates) -> Tensor:
    return F.linear(states.rows, states.output_layer.weight) * states.output_layer.scale


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("name", LOSSES)
def test_the_sums_agree_with_all_logits_in_value_and_gradient(name: str, case: Case, chunk_size: int | None):
    inputs = make_inputs(case)
    reference = reference_like(inputs)
    logits, targets = all_logits(inputs)
    want = second_formula(name, logits, targets, reference_logits(reference))
    (3 * want).backward()
    gradients = inputs.grads()
    found = token_loss_sums(*inputs, loss=LOSSES[name], reference=reference, chunk_size=chunk_size)
    torch.testing.assert_close(found.loss, want)
    torch.testing.assert_close(found.nll, cross_entropy_sums(*inputs).nll.detach())
    assert int(found.num_correct) == int(cross_entropy_sums(*inputs).num_correct)
    (3 * found.loss).backward(retain_graph=True)
    again = inputs.grads()
    (3 * found.loss).backward()  # computes the gradients once more
    for got in (again, inputs.grads()):
        for leaf, gradient in gradients.items():
            torch.testing.assert_close(got[leaf], gradient, msg=leaf)


@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_is_as_large_as_tokens_times_vocabulary(name: str):
    inputs = make_inputs(Case(bias=True, scale=2.0, softcap=3.0), dtype=torch.float32, sizes=(2, 48, 8, 500))
    kernel = partial(token_loss_sums, loss=LOSSES[name], reference=reference_like(inputs))
    assert watched(kernel, inputs, chunk_size=16).largest <= 16 * 500
    assert inputs.hidden.grad is not None


@pytest.mark.parametrize("name", LOSSES)
def test_defect_46_with_nothing_counted_the_zero_is_still_connected(name: str):
    inputs = make_inputs(CASES["plain"])
    inputs = inputs._replace(targets=torch.full_like(inputs.targets, IGNORE))
    found = token_loss_sums(*inputs, loss=LOSSES[name], reference=reference_like(inputs))
    found.loss.backward()
    assert [float(value.detach()) for value in found] == [0, 0, 0, 0]
    assert inputs.hidden.grad is not None
    assert inputs.hidden.grad.abs().max() == 0


def test_without_gradients_the_values_are_the_same_and_nothing_is_kept():
    inputs = make_inputs(CASES["all of them"])
    with_gradient = token_loss_sums(*inputs, loss=dft)
    with torch.no_grad():
        without = token_loss_sums(*inputs, loss=dft)
    assert not without.loss.requires_grad
    torch.testing.assert_close(without.loss, with_gradient.loss.detach())


def test_in_half_precision_the_sums_are_close_and_gradients_keep_their_type():
    case = Case(bias=True)
    exact = make_inputs(case, sizes=(2, 48, 8, 50))
    half = make_inputs(case, dtype=torch.bfloat16, sizes=(2, 48, 8, 50))
    for name, loss in LOSSES.items():
        found = token_loss_sums(*half, loss=loss, reference=reference_like(half))
        want = token_loss_sums(*exact, loss=loss, reference=reference_like(exact))
        assert found.loss.dtype == torch.float32, name
        assert float(found.loss.detach()) == pytest.approx(float(want.loss.detach()), rel=0.03), name
        found.loss.backward()
        assert half.layer.weight.grad is not None
        assert half.layer.weight.grad.dtype == torch.bfloat16
        half.grads()


def test_counted_states_are_copies_where_the_weights_do_not_stay():
    inputs = make_inputs(CASES["bias"])
    kept = counted_states(*inputs, keeps_weights=True)
    copied = counted_states(*inputs, keeps_weights=False)
    assert kept.output_layer.weight.data_ptr() == inputs.layer.weight.data_ptr()
    assert copied.output_layer.weight.data_ptr() != inputs.layer.weight.data_ptr()
    torch.testing.assert_close(copied.output_layer.weight, inputs.layer.weight.detach())
    assert not copied.rows.requires_grad
    assert len(kept.rows) == int((inputs.targets != IGNORE).sum())
