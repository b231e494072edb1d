"""Generates and trains with a model that is sharded over two ranks, which test_sharding.py forks.

Writes <folder>/<case>.<rank>.pt for every case: what this rank saw of the sharded model, and of one that is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lf_lightning import BackboneSpec
from lf_lightning.losses.log_probs import token_log_probs
from lf_lightning.models import (
    OFT,
    Adapter,
    Backbone,
    Freeze,
    Full,
    GenerationSpec,
    LoRA,
    TransformersEngine,
    ValueHeadSpec,
    load_backbone,
)
from lf_lightning.models.sharding import clip_gradients, shard
from lf_lightning.models.value_head import add_value_head
from lf_lightning.types import IGNORE, Document, OutputLayer, PromptBatch, TokenBatch

WORDS, STOP = 40, 39
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": WORDS,
    "initializer_range": 0.5,
}
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "tied": {"tied": True},
    "lora": {"tuning": LoRA(rank=2)},
    "head": {"head": True},
    "head-lora": {"head": True, "tuning": LoRA(rank=2)},
    "free": {"layout": "padding_free"},
    "checkpointed": {"gradient_checkpointing": True},
    "dora": {"tuning": LoRA(rank=2, dora=True)},
    "oft": {"tuning": OFT(block_size=4)},
    "parts": {"tuning": Freeze(num_layers=1, modules=["mlp"], extra_modules=["norm"])},
    "whole": {"tuning": LoRA(rank=2, modules_to_save=["embed_tokens", "lm_head"])},
    "half": {"tuning": LoRA(rank=2), "dtype": "bfloat16"},
}
PROMPTS = ((5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (3, 3))
LIMITS = ((2,), (9, 7, 5))
"""Most new tokens in each call of `generate` on a rank: other numbers of calls, and other numbers of tokens."""
TEXTS = ((5, 9, 2, 33, 17, 38, 4), (7, 1, 20, 30))
"""What each rank trains on."""


def build(case: dict[str, Any], folder: Path) -> Backbone:
    """The model of a case with its value head; weights of adapters are not zero."""
    tuning, dtype = case.get("tuning", Full()), case.get("dtype", "float64")
    shape = {**LLAMA, "tie_word_embeddings": case.get("tied", False)}
    source = {"path": str(folder / "base")} if isinstance(tuning, Adapter) else {"architecture": shape}
    checkpoints = case.get("gradient_checkpointing", False)
    spec = BackboneSpec(**source, tokenizer="bytes", dtype=dtype, gradient_checkpointing=checkpoints)
    backbone = load_backbone(spec, tuning, vocab_size=WORDS, seed=3)
    if case.get("head"):
        add_value_head(backbone, ValueHeadSpec(init="new"), tuning=tuning, path=None, seed=4, keeps_output_layer=True)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name or "oft_R" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    backbone.set_layout(case.get("layout", "padded"))
    return backbone


def prompts() -> PromptBatch:
    """All prompts, padded on the left."""
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    texts = ("",) * len(PROMPTS)
    return PromptBatch(ids, mask, tuple(range(len(PROMPTS))), texts, texts)


def answers(backbone: Backbone, limits: Sequence[int]) -> list[list[list[int]]]:
    """Greedy answers to all prompts, once for each limit; the weights are gathered once."""
    engine = TransformersEngine()
    with engine.ready(backbone):
        return [
            engine.generate(backbone, prompts(), GenerationSpec(max_new_tokens=limit), stop_token_ids=[STOP])
            for limit in limits
        ]


def text_batch(backbone: Backbone, rank: int) -> TokenBatch:
    """The text of a rank."""
    ids = torch.tensor([TEXTS[rank]])
    targets = torch.cat([ids[:, 1:], torch.tensor([[IGNORE]])], dim=1)
    documents = (Document(ids.shape[1]),) if backbone.is_padding_free else None
    return TokenBatch(ids, targets, torch.arange(ids.shape[1])[None], documents, 1, ids.shape[1])


def loss_of(backbone: Backbone, rank: int) -> Tensor:
    """A sum in which the output layer takes part, and the value head where there is one."""

    def kernel(hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> Tensor:
        total = -token_log_probs(hidden, output_layer, targets)[targets != IGNORE].sum()
        return total if backbone.value_head is None else total + backbone.value_head(hidden).square().sum()

    found: Tensor = backbone(text_batch(backbone, rank), kernel=kernel)
    return found


def full(tensor: Tensor) -> Tensor:
    """All of a tensor that may be cut; a copy."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(backbone: Backbone, ranks: Sequence[int]) -> dict[str, Any]:
    """A step of gradient descent on the mean over both ranks' losses: this rank's share of it, or all."""
    for rank in ranks:
        (loss_of(backbone, rank) / len(ranks)).backward()
    trained = {name: each for name, each in backbone.named_parameters() if each.requires_grad}
    raw = {name: full(each.grad) for name, each in trained.items() if each.grad is not None}
    norm = clip_gradients(trained.values(), 0.5)
    clipped = {name: full(each.grad) for name, each in trained.items() if each.grad is not None}
    with torch.no_grad():
        for each in trained.values():
            if each.grad is not None:
                each.add_(each.grad, alpha=-2.0)
            each.grad = None
    return {"raw": raw, "norm": float(norm), "clipped": clipped, "names": sorted(trained)}


def local_shares(backbone: Backbone) -> dict[str, float | None]:
    """Which part of each parameter lies on this rank; None where it is not cut."""
    return {
        name: each.to_local().numel() / each.numel() if isinstance(each, DTensor) else None
        for name, each in backbone.named_parameters()
    }


def shares_after_a_forward(backbone: Backbone, rank: int) -> dict[str, float | None]:
    """What is whole between forward and backward."""
    loss = loss_of(backbone, rank)
    found = local_shares(backbone)
    loss.backward()
    backbone.zero_grad(set_to_none=True)
    return found


@contextmanager
def broken(backbone: Backbone) -> Iterator[None]:
    """Weights that are whole while something goes wrong."""
    with TransformersEngine().ready(backbone):
        yield
        raise RuntimeError("broken")


def seen(case: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    """What this rank sees of a case."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    found: dict[str, Any] = {}
    one = build(case, folder)
    found["plain"] = [answers(one, LIMITS[rank]), train(one, [0, 1]), answers(one, LIMITS[rank]), train(one, [0, 1])]
    silent = build(case, folder)
    shard(silent, mesh)
    found["silent"] = [train(silent, [rank]), train(silent, [rank])]
    found["silent_shares"] = shares_after_a_forward(silent, rank)
    cut = build(case, folder)
    shard(cut, mesh)
    found["before"] = local_shares(cut)
    found["sharded"] = [answers(cut, LIMITS[rank])]
    found["after"] = local_shares(cut)
    found["sharded"] += [train(cut, [rank]), answers(cut, LIMITS[rank])]
    answers(cut, LIMITS[0] if rank == 0 else ())  # a rank that has nothing to answer
    found["sharded"] += [train(cut, [rank])]
    answers(cut, LIMITS[rank])
    found["shares"] = shares_after_a_forward(cut, rank)
    try:
        with broken(cut):
            found["inside"] = local_shares(cut)
    except RuntimeError as error:
        found["error"] = str(error)
    found["after_error"] = local_shares(cut)
    found["training"] = cut.training
    return found


def run(folder: Path, rank: int) -> None:
    """Run every case on this rank."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, case in CASES.items():
        torch.save(seen(case, folder, rank), folder / f"{name}.{rank}.pt")
        print(name, "done", flush=True)
    distributed.destroy_process_group()
