"""Without dropout a model in training computes what it computes in evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lf_lightning import BackboneSpec
from lf_lightning.models import Backbone, Full, LoRA, Tuning, load_backbone, without_dropout
from lf_lightning.models.export import save_weights

IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 4, 8]])
BASE = {"vocab_size": 61, "initializer_range": 0.2}
LLAMA = {**BASE, "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "attention_dropout": 0.3}
GPT2 = {**BASE, "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.3, "resid_pdrop": 0.2}
FALCON = {**BASE, "model_type": "falcon", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
FALCON |= {"attention_dropout": 0.3, "hidden_dropout": 0.2}
OPT = {"vocab_size": 61, "model_type": "opt", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.2, "layerdrop": 0.5, "init_std": 0.2}


def hidden(backbone: Backbone) -> Tensor:
    with torch.no_grad():
        found: Tensor = backbone.causal_lm.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    return found


def check(backbone: Backbone) -> None:
    want = hidden(backbone.eval())
    backbone.train()
    torch.manual_seed(0)
    assert (hidden(backbone) - want).abs().max() > 1e-3, "there was no dropout to begin with"
    without_dropout(backbone)
    assert all(module.training for module in backbone.modules())
    assert torch.equal(hidden(backbone), want)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", [LLAMA, GPT2, FALCON, OPT], ids=["llama", "gpt2", "falcon", "opt"])
def test_training_computes_what_evaluation_does(architecture: dict[str, Any], attention: Any) -> None:
    spec = BackboneSpec(architecture=architecture, tokenizer="bytes", attention=attention)
    check(load_backbone(spec, Full(), vocab_size=0, seed=0))


def test_the_dropout_of_an_adapter_stays_as_its_tuning_says(tmp_path: Path) -> None:
    scratch = BackboneSpec(architecture={**LLAMA, "attention_dropout": 0.0}, tokenizer="bytes")
    save_weights(load_backbone(scratch, Full(), vocab_size=0, seed=0), tmp_path, base=None, writes=True)
    tuning: Tuning = LoRA(rank=2, dropout=0.5)
    backbone = load_backbone(BackboneSpec(path=str(tmp_path), tokenizer="bytes"), tuning, vocab_size=0, seed=0)
    without_dropout(backbone)
    rates = {module.p for name, module in backbone.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.5}
