"""What parameters are, the groups that they form, and AdamW's first steps by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lf_lightning import AdamW
from lf_lightning.optim import describe
from lf_lightning.optim.parameters import decay_groups
from tests.optim.toy import HEAD, toy


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Embedding(5, 2), nn.RMSNorm(2))


def test_biases_and_norms_are_not_decayed() -> None:
    decayed, others = decay_groups(describe(model()), 0.1)
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(2, 3), (5, 2)]
    assert [tuple(parameter.shape) for parameter in others["params"]] == [(2,), (2,), (2,), (2,)]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out() -> None:
    module = model()
    for index in (0, 1, 3):
        module[index].requires_grad_(False)
    (group,) = decay_groups(describe(module), 0.1)
    assert [id(parameter) for parameter in group["params"]] == [id(module[2].weight)]


def test_each_parameter_is_known_for_what_it_is() -> None:
    module = toy()
    found = describe(module, heads=[module.lm_head], blocks=list(module.layers), head_size=HEAD)
    assert [each.name for each in found] == [name for name, _ in module.named_parameters()]
    roles = {each.name: (each.role, each.block, each.head_rows) for each in found}
    assert roles["embed.weight"] == ("embedding", None, None)
    assert roles["layers.1.norm.weight"] == ("vector", 1, None)
    assert roles["layers.1.q_proj.weight"] == ("linear", 1, HEAD)
    assert roles["layers.2.q_proj.bias"] == ("vector", 2, None)
    assert roles["layers.0.up_proj.weight"] == ("linear", 0, None)
    assert roles["lm_head.weight"] == ("head", None, None)
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.zeros(2, 3, 4))
    assert [each.role for each in describe(experts)] == ["other"]


def test_a_tied_head_is_the_embedding() -> None:
    module = toy()
    module.lm_head.weight = module.embed.weight
    roles = {each.name: each.role for each in describe(module, heads=[module.lm_head])}
    assert roles["embed.weight"] == "embedding"
    assert "lm_head.weight" not in roles


def test_the_first_steps_are_those_of_the_paper() -> None:
    # step 1: m_hat = g, v_hat = g^2, so the move is lr * g / (|g| + eps); before it the weight shrinks by lr * decay
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    weight = layer.weight
    weight.data.fill_(2.0)
    optimizer = AdamW(lr=0.1, betas=(0.9, 0.99), eps=1.0, weight_decay=0.5).build(describe(layer))
    weight.grad = torch.tensor([[4.0]], dtype=torch.float64)
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 * (1 - 0.05) - 0.1 * 4 / (4 + 1), abs=1e-12)
    # step 2 with g = -1: m_hat = (0.9 * 0.4 - 0.1) / 0.19, v_hat = (0.99 * 0.16 + 0.01) / 0.0199
    weight.grad = torch.tensor([[-1.0]], dtype=torch.float64)
    optimizer.step()
    move = 0.1 * (0.26 / 0.19) / (math.sqrt(0.1684 / 0.0199) + 1)
    assert weight.item() == pytest.approx(1.82 * 0.95 - move, abs=1e-12)
