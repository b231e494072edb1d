"""The entropy of the log-prob kernel, with its gradient, and logits at a temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lf_lightning.losses.log_probs import token_statistics
from lf_lightning.types import IGNORE, OutputLayer

TOKENS, HIDDEN, WORDS = 7, 6, 11


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full_logits(hidden: Tensor, layer: OutputLayer) -> Tensor:
    logits = layer.scale * (hidden @ layer.weight.T + (0 if layer.bias is None else layer.bias))
    return logits if layer.softcap is None else layer.softcap * torch.tanh(logits / layer.softcap)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "frozen": {"frozen": True},
    "bias": {"bias": True},
    "frozen bias": {"bias": True, "frozen": True},
    "scale and softcap": {"scale": 1.3, "softcap": 2.0},
    "all": {"bias": True, "scale": 0.7, "softcap": 1.5},
    "an impossible word": {"bias": True, "impossible": 4, "frozen": True},
}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", CASES)
def test_log_probs_and_entropy_and_their_gradients_are_those_of_full_logits(name: str, temperature: float):
    case = CASES[name]
    trains = not case.get("frozen", False)
    hidden = numbers(1, TOKENS, HIDDEN, seed=1).requires_grad_()
    weight = numbers(WORDS, HIDDEN, seed=2).requires_grad_(trains)
    bias = numbers(WORDS, seed=3) if case.get("bias") else None
    targets = torch.tensor([[3, IGNORE, 0, 10, 5, 5, IGNORE]])
    if bias is not None:
        if "impossible" in case:
            bias[case["impossible"]] = -torch.inf
        bias.requires_grad_(trains)
    layer = OutputLayer(weight, bias, case.get("scale", 1.0), case.get("softcap"))
    pushes = numbers(2, 1, TOKENS, seed=4)
    inputs = [each for each in (hidden, weight, bias) if each is not None and each.requires_grad]
    found = token_statistics(
        hidden, layer.at_temperature(temperature), targets, chunk_size=3, with_entropy=True, entropy_grad=True
    )
    assert found.entropy is not None
    got = torch.autograd.grad((pushes[0] * found.log_probs + pushes[1] * found.entropy).sum(), inputs)
    table = (full_logits(hidden, layer) / temperature).log_softmax(-1)
    counts = targets != IGNORE
    log_probs = table.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * counts
    entropy = -torch.where(table.isinf(), 0, table.exp() * table.clamp(min=-1e300)).sum(-1) * counts
    want = torch.autograd.grad((pushes[0] * log_probs + pushes[1] * entropy).sum(), inputs)
    assert torch.allclose(found.log_probs, log_probs, rtol=0, atol=1e-12)
    assert torch.allclose(found.entropy, entropy, rtol=0, atol=1e-12)
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_without_entropy_grad_the_entropy_pushes_nothing():
    hidden = numbers(1, TOKENS, HIDDEN, seed=1).requires_grad_()
    layer, targets = OutputLayer(numbers(WORDS, HIDDEN, seed=2)), torch.arange(TOKENS)[None]
    plain = token_statistics(hidden, layer, targets, chunk_size=3)
    looked = token_statistics(hidden, layer, targets, chunk_size=3, with_entropy=True)
    assert looked.entropy is not None
    assert not looked.entropy.requires_grad
    one, other = (torch.autograd.grad(each.log_probs.sum(), hidden)[0] for each in (plain, looked))
    assert torch.equal(one, other)


def test_the_entropy_of_equal_words_is_the_log_of_their_number_and_flat():
    hidden = numbers(1, 2, HIDDEN, seed=1).requires_grad_()
    layer = OutputLayer(torch.zeros(WORDS, HIDDEN, dtype=torch.float64))
    found = token_statistics(hidden, layer, torch.zeros(1, 2, dtype=torch.int64), with_entropy=True, entropy_grad=True)
    assert found.entropy is not None
    assert found.entropy.tolist()[0] == pytest.approx([2.3978952727983707] * 2, abs=1e-12)  # log 11
    (gradient,) = torch.autograd.grad(found.entropy.sum(), hidden)
    assert not gradient.any()
