"""What is saved opens with plain transformers and peft, and gives the same logits; and our own way back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lf_lightning import BackboneSpec, InputError
from lf_lightning.models import Backbone, Freeze, Full, LoRA, Tuning, load_backbone
from lf_lightning.models.export import load_weights, save_named_weights, save_weights, unnamed_weights

BASE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
UNTIED = {"model_type": "llama", **BASE, "tie_word_embeddings": False}
TIED = {**UNTIED, "tie_word_embeddings": True}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MIXTRAL = {"model_type": "mixtral", **BASE, **EXPERTS}
QWEN3_MOE = {"model_type": "qwen3_moe", **BASE, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 12}
IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 4, 8]])


def scratch(architecture: dict[str, Any], tuning: Tuning = Full(), *, seed: int = 0, **options: Any) -> Backbone:
    spec = BackboneSpec(architecture=architecture, tokenizer="bytes", **options)
    return load_backbone(spec, tuning, vocab_size=0, seed=seed)


def over(base: Path, tuning: Tuning, **options: Any) -> Backbone:
    return load_backbone(BackboneSpec(path=str(base), tokenizer="bytes", **options), tuning, vocab_size=0, seed=0)


def perturb(backbone: Backbone) -> Backbone:
    """Stand in for training: move every trained weight."""
    generator = torch.Generator().manual_seed(5)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


def folder_in(parent: Path, name: str) -> Path:
    folder = parent / name
    (folder / "trainer_state").mkdir(parents=True)
    return folder


def saved(backbone: Backbone, folder: Path, *, base: Path | None = None) -> Path:
    """A checkpoint folder, as the stage fills it."""
    save_weights(backbone, folder, base=None if base is None else str(base), writes=True)
    save_named_weights(backbone, unnamed_weights(backbone, folder), folder, writes=True)
    return folder


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as handle:
            found |= set(handle.keys())
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_weights(scratch(UNTIED), folder, base=None, writes=True)
    return folder


@pytest.mark.parametrize("architecture", [UNTIED, TIED, MIXTRAL, QWEN3_MOE], ids=["untied", "tied", "mixtral", "qwen3"])
def test_a_full_model_opens_with_plain_transformers(tmp_path: Path, architecture: dict[str, Any]) -> None:
    backbone = perturb(scratch(architecture))
    folder = saved(backbone, folder_in(tmp_path, "checkpoint"))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(plain), logits(backbone.causal_lm), rtol=0, atol=1e-6)
    again = load_backbone(BackboneSpec(path=str(folder), tokenizer="bytes"), Full(), vocab_size=0, seed=0)
    torch.testing.assert_close(logits(again.causal_lm), logits(backbone.causal_lm), rtol=0, atol=1e-6)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    names = names_in(saved(scratch(TIED), folder_in(tmp_path, "tied")))
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in names_in(saved(scratch(UNTIED), folder_in(tmp_path, "untied")))


def test_fused_experts_are_saved_under_the_names_of_the_hub(tmp_path: Path) -> None:
    backbone = scratch(MIXTRAL)
    folder = saved(backbone, folder_in(tmp_path, "checkpoint"))
    names = names_in(folder)
    experts = {name for name in names if "experts" in name}
    assert experts == {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w{number}.weight"
        for layer in range(2)
        for expert in range(4)
        for number in (1, 2, 3)
    }


@pytest.mark.parametrize("architecture", [UNTIED, TIED, MIXTRAL, QWEN3_MOE], ids=["untied", "tied", "mixtral", "qwen3"])
def test_a_checkpoint_gives_every_weight_back_bit_by_bit(tmp_path: Path, architecture: dict[str, Any]) -> None:
    trained = perturb(scratch(architecture))
    folder = saved(trained, folder_in(tmp_path, "checkpoint"))
    other = scratch(architecture, seed=1)
    load_weights(other, folder)
    want = dict(trained.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in other.named_parameters())


@pytest.mark.parametrize("architecture", [UNTIED, TIED, MIXTRAL, QWEN3_MOE], ids=["untied", "tied", "mixtral", "qwen3"])
def test_a_final_folder_without_trainer_state_gives_the_weights_back(
    tmp_path: Path, architecture: dict[str, Any]
) -> None:
    trained = perturb(scratch(architecture))
    save_weights(trained, tmp_path, base=None, writes=True)
    other = scratch(architecture, seed=1)
    load_weights(other, tmp_path)
    torch.testing.assert_close(logits(other.causal_lm), logits(trained.causal_lm), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", [UNTIED, TIED, MIXTRAL], ids=["untied", "tied", "mixtral"])
def test_a_model_in_shards_is_read_shard_by_shard(tmp_path: Path, architecture: dict[str, Any]) -> None:
    trained = perturb(scratch(architecture))
    folder = folder_in(tmp_path, "checkpoint")
    trained.causal_lm.save_pretrained(folder, max_shard_size="8KB")
    save_named_weights(trained, unnamed_weights(trained, folder), folder, writes=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    other = scratch(architecture, seed=1)
    load_weights(other, folder)
    torch.testing.assert_close(logits(other.causal_lm), logits(trained.causal_lm), rtol=0, atol=1e-6)


def test_an_adapter_opens_with_plain_peft_over_its_base(tmp_path: Path, base: Path) -> None:
    backbone = perturb(over(base, LoRA(rank=4, alpha=6.0)))
    folder = saved(backbone, folder_in(tmp_path, "checkpoint"), base=base)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    torch.testing.assert_close(logits(plain), logits(backbone.causal_lm), rtol=0, atol=1e-6)
    assert (logits(plain) - logits(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 1e-2
    direct = AutoModelForCausalLM.from_pretrained(folder)  # follows the base that the adapter names
    torch.testing.assert_close(logits(direct), logits(backbone.causal_lm), rtol=0, atol=1e-6)


@pytest.mark.parametrize("target", ["all", ["q_proj"], ["lm_head", "v_proj"]])
def test_an_adapter_folder_holds_no_frozen_weight(tmp_path: Path, base: Path, target: Any) -> None:
    backbone = over(base, LoRA(rank=4, target=target))
    folder = saved(backbone, folder_in(tmp_path, "checkpoint"), base=base)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == backbone.num_parameters()[0]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    found = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert found == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_checkpoint_gives_its_weights_back_bit_by_bit(tmp_path: Path, base: Path) -> None:
    trained = perturb(over(base, LoRA(rank=4)))
    folder = saved(trained, folder_in(tmp_path, "checkpoint"), base=base)
    other = over(base, LoRA(rank=4))
    load_weights(other, folder)
    want = dict(trained.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in other.named_parameters())
    assert other.num_parameters() == trained.num_parameters()


@pytest.mark.parametrize("tuning", [Full(), Freeze(num_layers=1)])
def test_a_half_precision_model_is_saved_so_that_it_opens_to_the_same_logits(
    tmp_path: Path, base: Path, tuning: Tuning
) -> None:
    backbone = perturb(over(base, tuning, dtype="bfloat16"))
    save_weights(backbone, tmp_path, base=None, writes=True)
    other = over(base, tuning, dtype="bfloat16")
    load_weights(other, tmp_path)
    want = dict(backbone.named_parameters())
    assert all(torch.equal(parameter, want[name]) for name, parameter in other.named_parameters())
    stored = {name: tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert stored["model.layers.1.mlp.up_proj.weight"] == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, want[f"model.{name}"].float()), name


# ---------------------------------------------------------------------- what does not fit


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_weights(scratch(UNTIED), tmp_path, base=None, writes=True)
    with pytest.raises(InputError, match=r"weight model\.layers\.0\.mlp\.gate_proj\.weight must have shape \(20, 16\)"):
        load_weights(scratch({**UNTIED, "intermediate_size": 20}), tmp_path)


def test_a_folder_that_lacks_a_trained_weight_is_refused(tmp_path: Path) -> None:
    save_weights(scratch(UNTIED), tmp_path, base=None, writes=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks the weight model\.norm\.weight"):
        load_weights(scratch(UNTIED), tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(InputError, match=r"must hold an adapter, as the tuning says, got none"):
        load_weights(over(base, LoRA()), tmp_path)


@pytest.mark.parametrize("tuning", [LoRA(rank=2), LoRA(rank=4, target=["q_proj"]), LoRA(rank=4)])
def test_an_adapter_of_another_make_is_refused(tmp_path: Path, base: Path, tuning: Tuning) -> None:
    save_weights(over(base, LoRA(rank=4, target=["q_proj", "v_proj"])), tmp_path, base=str(base), writes=True)
    with pytest.raises(InputError, match="adapter"):
        load_weights(over(base, tuning), tmp_path)
