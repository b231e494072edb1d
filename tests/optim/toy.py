"""A language model of a few thousand weights with the parts that optimizers tell apart, and a loop that trains it."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from lf_lightning.optim import OptimizerSpec, PartialOptimizer, describe

WORDS, WIDTH, HEAD = 12, 8, 4
TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [7, 8, 9, 7, 8, 9]])
NUM_BLOCKS = 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, 2 * HEAD)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.norm(hidden)
        return hidden + self.down_proj(torch.tanh(self.up_proj(inner))) + torch.tanh(self.q_proj(inner))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(NUM_BLOCKS)])
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)

    def loss(self) -> Tensor:
        hidden = self.embed(TOKENS[:, :-1])
        for block in self.layers:
            hidden = block(hidden)
        return cross_entropy(self.lm_head(self.norm(hidden)).flatten(0, 1).float(), TOKENS[:, 1:].flatten())


def toy(dtype: torch.dtype = torch.float32) -> Toy:
    torch.manual_seed(0)
    return Toy().to(dtype)


def build(spec: OptimizerSpec, model: Toy, seed: int = 3) -> Optimizer:
    trained = describe(model, heads=[model.lm_head], blocks=list(model.layers), head_size=HEAD)
    return spec.build(trained, seed=seed)


class Run(NamedTuple):
    model: Toy
    optimizer: Optimizer
    losses: list[float]
    saved: Any  # weights and state before the step `save_at`, read back from a file as a checkpoint is

    def weights(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.model.named_parameters()}


def train(
    spec: OptimizerSpec,
    num_steps: int = 8,
    *,
    saved: Any = None,
    save_at: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    model: Toy | None = None,
    optimizer: Callable[[Toy], Optimizer] | None = None,
) -> Run:
    """Steps on one batch; from a saved state where one is given."""
    model = model or toy(dtype)
    made = optimizer(model) if optimizer else build(spec, model, seed)
    losses, kept = [], None
    if saved is not None:
        model.load_state_dict(saved["model"])
        made.load_state_dict(saved["optimizer"])
    for step in range(num_steps):
        if step == save_at:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": made.state_dict()}, file)
            file.seek(0)
            kept = torch.load(file, weights_only=True)
        with made.only_active() if isinstance(made, PartialOptimizer) else nullcontext():
            loss = model.loss()
            loss.backward()
        losses.append(loss.item())
        made.step()
        made.zero_grad()
    return Run(model, made, losses, kept)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(run: Run, dtype: torch.dtype = torch.float32) -> set[str]:
    """Names of the parameters that are no longer as they began."""
    start = dict(toy(dtype).named_parameters())
    return {name for name, each in run.model.named_parameters() if not torch.equal(each, start[name])}
