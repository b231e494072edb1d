"""Tiny models for the tests of rewards, and the rows that they score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lf_lightning import BackboneSpec
from lf_lightning.data.tokenizer import byte_tokenizer
from lf_lightning.models import Backbone, Full, Tuning, ValueHeadSpec, add_value_head, load_backbone
from lf_lightning.models.export import save_weights
from lf_lightning.models.rewards import Reward, RewardBatch, RewardSetting
from lf_lightning.models.value_head import save_value_head

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 261,
    "initializer_range": 0.2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    "attention_dropout": 0.3,
    "dtype": "float64",
}
POLICY = byte_tokenizer()
# the second ends in the pad token, which is eos; the third has it inside, the fourth is nothing but pads
ROWS = ((5, 9, 200, 33, 17, 60, 99), (7, 44, 2), (2, 8, 2, 30, 11, 2, 2, 12), (2, 2, 2))


def batch_of(rows: Sequence[Sequence[int]]) -> RewardBatch:
    """Rows whose first token is the prompt."""
    return RewardBatch(
        prompt_ids=tuple(tuple(row[:1]) for row in rows),
        response_ids=tuple(tuple(row[1:]) for row in rows),
        is_stopped=(True,) * len(rows),
        references=("",) * len(rows),
        tokenizer=POLICY,
    )


def prepared(reward: Reward, policy: Backbone | None = None) -> Any:
    reward.prepare(RewardSetting(policy=policy, tokenizer=POLICY, device=torch.device("cpu")))  # type: ignore[arg-type]
    return reward


def perturb(backbone: Backbone, seed: int = 5) -> Backbone:
    """Stand in for training: move every trained weight."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


def loaded(source: Any, tuning: Tuning = Full()) -> Backbone:
    given = {"architecture": source} if isinstance(source, dict) else {"path": str(source)}
    return load_backbone(BackboneSpec(**given, tokenizer="bytes"), tuning, vocab_size=0, seed=0)


def save_base(folder: Path, **options: Any) -> Path:
    backbone = perturb(loaded({**LLAMA, **options}))  # the pad token too is no longer a row of zeros
    save_weights(backbone, folder, base=None, writes=True)
    return folder


def with_head(
    source: Any, tuning: Tuning = Full(), head: ValueHeadSpec = ValueHeadSpec(), *, seed: int = 5
) -> Backbone:
    """A trained reward model."""
    backbone = loaded(source, tuning)
    path = None if isinstance(source, dict) else str(source)
    add_value_head(backbone, head, tuning=tuning, path=path, seed=seed)
    return perturb(backbone, seed)


def save_judge(backbone: Backbone, folder: Path, base: Any) -> Path:
    """Write a reward model as a run does."""
    folder.mkdir(exist_ok=True)
    save_weights(backbone, folder, base=str(base), writes=True)
    save_value_head(backbone, folder, writes=True)
    return folder
