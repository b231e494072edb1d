"""What the probe lets through and what it stops: families by name, and a head that was tampered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AttentionInterface

from lf_lightning import PT, BackboneSpec, DataModule, Full, InputError
from lf_lightning.models import Backbone, attention, load_backbone
from lf_lightning.models.probe import branches_are_isolated, check_output_layer, documents_are_isolated
from lf_lightning.types import Document, Layout

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
SLIDING = {"head_dim": 8, "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MOE = {**EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
STATES = {"hidden_size": 32, "num_hidden_layers": 2}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
ISOLATING: dict[str, dict[str, Any]] = {
    "llama": BASE,
    "qwen2": BASE,
    "qwen3": {**BASE, "head_dim": 8},
    "mistral": {**BASE, "sliding_window": 4},
    "gemma2": {**BASE, **SLIDING},
    "gemma3_text": {**BASE, **SLIDING},
    "granite": {**BASE, "logits_scaling": 8.0},
    "cohere": {**BASE, "logit_scale": 0.25},
    "gpt_oss": {**BASE, **SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**BASE, "num_local_experts": 4},
    "olmoe": {**BASE, **EXPERTS},
    "qwen2_moe": {**BASE, **MOE},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "lfm2": {**BASE, "layer_types": ["full_attention", "full_attention"]},
}
ISOLATING["opt"] = {**STATES, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}
LEAKING: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "mamba2": {**STATES, "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    "rwkv": {**STATES, "attention_hidden_size": 32},
    "falcon_h1": {**BASE, **MAMBA},
    "lfm2": {**BASE, "layer_types": ["conv", "full_attention"]},
}


def build(family: str, architecture: dict[str, Any], **options: Any) -> Backbone:
    values = {"model_type": family, "vocab_size": 64, **architecture}
    spec = BackboneSpec(architecture=values, tokenizer="bytes", **options)
    return load_backbone(spec, Full(), vocab_size=0, seed=0)


@pytest.mark.parametrize("family", ISOLATING)
def test_a_model_that_keeps_documents_apart_passes(family: str) -> None:
    backbone = build(family, ISOLATING[family])
    assert documents_are_isolated(backbone, "padding_free") is True
    assert branches_are_isolated(backbone) is True
    assert documents_are_isolated(backbone, "padded") is (family not in ("gpt_oss", "opt"))


@pytest.mark.parametrize("family", LEAKING)
def test_a_model_that_carries_state_or_biases_across_a_row_fails(family: str) -> None:
    backbone = build(family, LEAKING[family])
    assert documents_are_isolated(backbone, "padding_free") is False
    assert branches_are_isolated(backbone) is False
    assert documents_are_isolated(backbone, "padded") is False


@pytest.mark.parametrize("family", ["stablelm", "nemotron"])
def test_a_family_that_drops_the_documents_on_the_way_to_its_attention_is_isolated_in_padded_rows_only(
    family: str,
) -> None:
    backbone = build(family, BASE)
    assert documents_are_isolated(backbone, "padding_free") is False
    assert branches_are_isolated(backbone) is False
    assert documents_are_isolated(backbone, "padded") is True


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_a_bfloat16_model_passes_too(layout: Layout) -> None:
    assert documents_are_isolated(build("llama", BASE, dtype="bfloat16"), layout) is True
    assert branches_are_isolated(build("llama", BASE, dtype="bfloat16")) is True


def test_an_attention_that_knows_documents_but_no_branches_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(*arguments: Any, documents: Any, **options: Any) -> Any:
        plain = tuple(Document(document.num_tokens) for document in documents)
        return attention.sdpa_document_attention(*arguments, documents=plain, **options)

    register = attention.register

    def register_blind() -> None:
        register()
        AttentionInterface.register(attention.SDPA_DOCUMENTS, blind)

    monkeypatch.setattr(attention, "register", register_blind)
    backbone = build("llama", BASE)
    assert documents_are_isolated(backbone, "padding_free") is True
    assert branches_are_isolated(backbone) is False
    monkeypatch.undo()
    assert branches_are_isolated(backbone) is True


def test_the_probe_leaves_mode_layout_and_random_state_as_they_were() -> None:
    for layout, mode in (("padded", True), ("padding_free", False)):
        backbone = build("llama", BASE).train(mode)
        backbone.set_layout(layout)
        before = torch.random.get_rng_state()
        documents_are_isolated(backbone, "padded")
        documents_are_isolated(backbone, "padding_free")
        branches_are_isolated(backbone)
        check_output_layer(backbone)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert backbone.training is mode
        assert backbone.is_padding_free is (layout == "padding_free")
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("family", ["llama", "granite", "cohere", "gemma2", "gpt2", "mixtral", "falcon_h1", "mamba2"])
def test_the_output_layers_that_we_know_pass(family: str) -> None:
    check_output_layer(build(family, {**ISOLATING, **LEAKING}[family]))


@pytest.mark.parametrize(("family", "value"), [("cohere", None), ("cohere", 0.5), ("llama", 2.0)])
def test_a_config_that_does_not_tell_the_scale_of_the_logits_is_caught(family: str, value: float | None) -> None:
    backbone = build(family, ISOLATING[family])
    check_output_layer(backbone)
    backbone.causal_lm.config.logit_scale = value  # both families took their scale when they were built
    backbone = Backbone(backbone.model)
    with pytest.raises(InputError, match=f"the output layer of {type(backbone.causal_lm).__name__} is not a linear"):
        check_output_layer(backbone)


def test_a_scale_of_which_the_config_says_nothing_is_caught() -> None:
    backbone = build("gemma2", ISOLATING["gemma2"])
    backbone.causal_lm.lm_head.register_forward_hook(lambda module, inputs, logits: 3.0 * logits)
    with pytest.raises(InputError, match=r"logits differ by \d"):
        check_output_layer(backbone)


def test_a_norm_between_decoder_and_head_is_caught() -> None:
    backbone = build("llama", BASE)
    backbone.causal_lm.lm_head.register_forward_pre_hook(lambda module, inputs: (torch.tanh(inputs[0]),))
    with pytest.raises(InputError, match=r"logits differ by \d"):
        check_output_layer(backbone)


def fit_packs(folder: Path, family: str, layout: str, **options: Any) -> None:
    (folder / "texts.json").write_text(json.dumps([{"text": "some words to learn " * n} for n in (1, 2, 1, 3)]))
    architecture = {"model_type": family, **(ISOLATING | LEAKING).get(family, BASE)}
    spec = BackboneSpec(architecture=architecture, tokenizer="bytes")
    source = {"path": str(folder / "texts.json"), "formatting": "text"}
    arguments: dict[str, Any] = {"template": "default", "max_length": 64, "packing": "knapsack", "layout": layout}
    arguments |= {"cache_dir": None}
    data = DataModule(spec, "pt", datasets=[source], **{**arguments, **options})
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(PT(spec, Full()), data)


@pytest.mark.parametrize("family", ["gpt_oss", "opt"])
def test_isolated_packs_are_refused_where_padded_rows_would_leak(tmp_path: Path, family: str) -> None:
    with pytest.raises(InputError, match=r"isolate_documents: needs .* failed the probe in the padded layout"):
        fit_packs(tmp_path, family, "padded")


@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "padded"), ("gpt_oss", "padding_free"), ("opt", "auto"), ("stablelm", "auto")]
)
def test_isolated_packs_are_taken_where_the_layout_keeps_documents_apart(
    tmp_path: Path, family: str, layout: str
) -> None:
    fit_packs(tmp_path, family, layout)
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_what_fails_the_probe_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.layout: padding_free needs .* Set data\.layout: padded"):
        fit_packs(tmp_path, "bloom", "padding_free", packing="none")
    with pytest.raises(InputError, match=r"data\.isolate_documents: needs .* Set it to false"):
        fit_packs(tmp_path, "bloom", "auto")
