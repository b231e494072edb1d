"""From a spec to a model: what is built, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lf_lightning import BackboneSpec, InputError
from lf_lightning.models import Backbone, Full, LoRA, load_backbone
from lf_lightning.models.export import save_weights

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def load(spec: BackboneSpec, **options: Any) -> Backbone:
    return load_backbone(spec, options.pop("tuning", Full()), **{"vocab_size": 259, "seed": 0, **options})


def scratch(options: dict[str, Any] | None = None, **spec: Any) -> BackboneSpec:
    return BackboneSpec(architecture={**LLAMA, **(options or {})}, tokenizer="bytes", **spec)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_weights(load(scratch()), path, base=None, writes=True)
    return path


def same(first: Backbone, second: Backbone) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_vocabulary_of_a_scratch_model_is_the_tokenizers_unless_given() -> None:
    assert load(scratch()).causal_lm.get_input_embeddings().weight.shape == (259, 16)
    assert load(scratch({"vocab_size": 300})).causal_lm.get_input_embeddings().weight.shape == (300, 16)


def test_the_seed_alone_decides_the_weights_and_the_global_random_state_stays() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = load(scratch())
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, load(scratch()))
    assert not same(first, load(scratch(), seed=1))


def test_new_adapters_are_a_function_of_the_seed(folder: Path) -> None:
    spec = BackboneSpec(path=str(folder), tokenizer="bytes")
    torch.manual_seed(1)
    first = load(spec, tuning=LoRA())
    torch.manual_seed(2)
    assert same(first, load(spec, tuning=LoRA()))
    assert not same(first, load(spec, tuning=LoRA(), seed=1))


def test_a_model_is_left_in_train_mode(folder: Path) -> None:
    for spec in (scratch(), BackboneSpec(path=str(folder), tokenizer="bytes")):
        backbone = load(spec)
        assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize(("dtype", "want"), [("float32", torch.float32), ("float64", torch.float64)])
def test_the_dtype_is_that_of_the_spec(folder: Path, dtype: Any, want: torch.dtype) -> None:
    for spec in (scratch(dtype=dtype), BackboneSpec(path=str(folder), tokenizer="bytes", dtype=dtype)):
        assert {parameter.dtype for parameter in load(spec).parameters()} == {want}


def test_auto_takes_the_dtype_of_the_folder(tmp_path: Path) -> None:
    load(scratch()).causal_lm.to(torch.bfloat16).save_pretrained(tmp_path)
    backbone = load(BackboneSpec(path=str(tmp_path), tokenizer="bytes"), tuning=LoRA())
    assert {parameter.dtype for parameter in backbone.parameters() if not parameter.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_kernel_is_that_of_the_spec(attention: Any) -> None:
    assert load(scratch(attention=attention)).causal_lm.config._attn_implementation == attention


def test_gradient_checkpointing_is_switched_on() -> None:
    assert load(scratch(gradient_checkpointing=True)).causal_lm.is_gradient_checkpointing
    assert not load(scratch()).causal_lm.is_gradient_checkpointing


def test_shapes_alone_are_built_on_the_meta_device(folder: Path) -> None:
    for spec in (scratch(), BackboneSpec(path=str(folder), tokenizer="bytes")):
        backbone = load(spec, device=torch.device("meta"))
        assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
        assert backbone.num_parameters() == (12_208, 12_208)


def test_the_names_of_a_familys_config_are_options_of_its_architecture() -> None:
    moe = {**LLAMA, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    backbone = load(BackboneSpec(architecture={**moe, "head_dim": 8}, tokenizer="bytes"))
    assert backbone.causal_lm.config.num_experts == 4
    assert backbone.causal_lm.model.layers[0].mlp.gate.weight.shape == (4, 16)


def test_a_family_without_a_pad_token_is_built() -> None:
    architecture = {"model_type": "rwkv", "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    backbone = load(BackboneSpec(architecture=architecture, tokenizer="bytes"))
    assert backbone.causal_lm.get_input_embeddings().weight.shape == (259, 16)


def test_a_scratch_model_does_not_take_its_familys_pad_token_beyond_the_vocabulary() -> None:
    backbone = load(BackboneSpec(architecture={**LLAMA, "model_type": "smollm3"}, tokenizer="bytes"))
    assert backbone.causal_lm.get_input_embeddings().weight.shape == (259, 16)


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "lama"}, r"architecture\.model_type: must be one that transformers knows, got lama\."),
        ({"model_type": None}, r"architecture\.model_type: must be one that transformers knows, got None\."),
        ({"hiden_size": 8}, r"architecture\.hiden_size: llama has no such option\. Did you mean hidden_size\?"),
        ({"vocab_size": 100}, r"the embedding must cover the tokenizer's 259 words, got 100 rows\."),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(scratch(options))
    assert "\n" not in str(caught.value)


def test_a_kernel_that_the_family_lacks_is_refused() -> None:
    architecture = {**LLAMA, "model_type": "gemma2", "head_dim": 8}
    with pytest.raises(InputError, match="got Gemma2ForCausalLM does not support an attention") as caught:
        load(BackboneSpec(architecture=architecture, tokenizer="bytes", attention="sdpa"))
    assert "\n" not in str(caught.value)


def test_an_adapter_over_a_model_that_nobody_can_load_is_refused() -> None:
    with pytest.raises(InputError, match="an adapter needs a base that others can load, got a model from architecture"):
        load(scratch(), tuning=LoRA())


@pytest.mark.parametrize("name", ["./missing", "/nowhere/at/all", "a/b/c", "missing", "~/no-such-model"])
def test_a_path_without_a_model_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"path: must be a folder with config\.json or a hub name, got {name}\."):
        load(BackboneSpec(path=name, tokenizer="bytes"))


@pytest.mark.parametrize("text", ["{", '{"model_type": "lama"}', "{}"])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"backbone\.path: .* cannot be read, got .* Correct the path\.") as caught:
        load(BackboneSpec(path=str(tmp_path), tokenizer="bytes"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match=r"the model cannot be loaded, got .*no file named") as caught:
        load(BackboneSpec(path=str(tmp_path), tokenizer="bytes"))
    assert "\n" not in str(caught.value)


def test_weights_that_are_cut_off_are_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(InputError, match="the model cannot be loaded"):
        load(BackboneSpec(path=str(tmp_path), tokenizer="bytes"))


def test_weights_of_another_shape_are_refused(tmp_path: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 20}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"must have shape .*20.*, as its config\.json says, got .*24"):
        load(BackboneSpec(path=str(tmp_path), tokenizer="bytes"))


@pytest.mark.parametrize(("options", "got"), [({}, "neither"), ({"path": "a", "architecture": LLAMA}, "both")])
def test_a_spec_names_one_model(options: dict[str, Any], got: str) -> None:
    with pytest.raises(InputError, match=f"give either path or architecture, got {got}"):
        BackboneSpec(**options, tokenizer="bytes")


def test_a_scratch_model_needs_a_tokenizer() -> None:
    with pytest.raises(InputError, match="a model built from architecture needs a tokenizer, got none"):
        BackboneSpec(architecture=LLAMA)


def test_an_encoder_decoder_model_is_refused() -> None:
    architecture = {"model_type": "t5", "d_model": 16, "d_ff": 24, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    with pytest.raises(InputError) as caught:
        load(BackboneSpec(architecture=architecture, tokenizer="bytes"))
    assert "\n" not in str(caught.value)
