"""Which parameters train, of what type, under which names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lf_lightning import BackboneSpec, InputError
from lf_lightning.models import Backbone, Freeze, Full, LoRA, Tuning, load_backbone
from lf_lightning.models.adapters import decoder_blocks
from lf_lightning.models.export import save_weights
from lf_lightning.models.probe import check_output_layer

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "initializer_range": 0.2,
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def backbone_of(tuning: Tuning, **options: Any) -> Backbone:
    spec = BackboneSpec(architecture=LLAMA, tokenizer="bytes", **options)
    return load_backbone(spec, tuning, vocab_size=0, seed=0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    save_weights(backbone_of(Full()), folder, base=None, writes=True)
    return str(folder)


def adapted(base: str, tuning: Tuning, **options: Any) -> Backbone:
    return load_backbone(BackboneSpec(path=base, tokenizer="bytes", **options), tuning, vocab_size=0, seed=0)


def trained(backbone: Backbone) -> set[str]:
    return {name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad}


def lora_names(*modules: str) -> set[str]:
    return {f"base_model.model.{module}.lora_{letter}.default.weight" for module in modules for letter in "AB"}


def test_full_trains_every_parameter() -> None:
    backbone = backbone_of(Full())
    assert trained(backbone) == {name for name, _ in backbone.model.named_parameters()}
    assert len(trained(backbone)) == 30
    assert backbone.num_parameters()[0] == backbone.num_parameters()[1]


@pytest.mark.parametrize(("num_layers", "blocks"), [(1, "2"), (2, "12"), (3, "012")])
def test_freeze_trains_the_last_blocks_alone(num_layers: int, blocks: str) -> None:
    names = trained(backbone_of(Freeze(num_layers=num_layers)))
    assert {name.split(".")[2] for name in names} == set(blocks)
    assert all(name.startswith("model.layers.") for name in names)
    assert len(names) == 9 * num_layers


@pytest.mark.parametrize("num_layers", [4, -4])
def test_freeze_refuses_more_blocks_than_there_are(num_layers: int) -> None:
    with pytest.raises(
        InputError, match=rf"num_layers: must be 1 to 3 for this model, or its negative, got {num_layers}\."
    ):
        backbone_of(Freeze(num_layers=num_layers))


def test_lora_on_all_adapts_every_linear_layer_but_the_head(base: str) -> None:
    backbone = adapted(base, LoRA(rank=2))
    groups = {name: "self_attn" if name[0] in "qkvo" else "mlp" for name in LINEARS}
    groups["o_proj"] = "self_attn"
    modules = [f"model.layers.{layer}.{groups[name]}.{name}" for layer in range(3) for name in LINEARS]
    assert trained(backbone) == lora_names(*modules)


def test_lora_on_named_layers_adapts_those_alone(base: str) -> None:
    modules = [f"model.layers.{layer}.self_attn.{name}" for layer in range(3) for name in ("q_proj", "v_proj")]
    assert trained(adapted(base, LoRA(target=["q_proj", "v_proj"]))) == lora_names(*modules)
    assert trained(adapted(base, LoRA(target="down_proj"))) == lora_names(
        *(f"model.layers.{layer}.mlp.down_proj" for layer in range(3))
    )
    assert trained(adapted(base, LoRA(target=["layers.1.self_attn.k_proj"]))) == lora_names(
        "model.layers.1.self_attn.k_proj"
    )


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("q_prj", r"Did you mean q_proj\?"),
        ("gateproj", r"Did you mean gate_proj\?"),
        ("zzz", "Choose among down_proj,"),
    ],
)
def test_a_target_that_the_model_lacks_names_the_nearest(base: str, target: str, hint: str) -> None:
    with pytest.raises(InputError, match=rf"target: must name linear layers of the model, got {target}\. {hint}"):
        adapted(base, LoRA(target=["v_proj", target]))


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 2.0), (4.0, 1.0), (16.0, 4.0)])
def test_alpha_over_rank_scales_the_update_and_is_two_unless_given(
    base: str, alpha: float | None, scaling: float
) -> None:
    layer = adapted(base, LoRA(rank=4, alpha=alpha)).causal_lm.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": scaling}
    assert layer.lora_A["default"].weight.shape == (4, 16)


def test_a_new_adapter_changes_nothing_before_it_is_trained(base: str) -> None:
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = [each.causal_lm(input_ids=ids).logits for each in (adapted(base, Full()), adapted(base, LoRA()))]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_trains_is_float32_over_a_half_precision_base(base: str, dtype: str) -> None:
    half = getattr(torch, dtype)
    for tuning in (LoRA(), Freeze(num_layers=1), LoRA(target=["q_proj"])):
        backbone = adapted(base, tuning, dtype=dtype)
        found = {(parameter.requires_grad, parameter.dtype) for parameter in backbone.parameters()}
        assert found == {(True, torch.float32), (False, half)}
    assert {parameter.dtype for parameter in adapted(base, Full(), dtype=dtype).parameters()} == {torch.float32}


def test_float64_stays_float64(base: str) -> None:
    assert {parameter.dtype for parameter in adapted(base, Full(), dtype="float64").parameters()} == {torch.float64}


def perturb(backbone: Backbone) -> None:
    generator = torch.Generator().manual_seed(5)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_a_continued_adapter_starts_where_it_was_and_trains_on(base: str, tmp_path: Path) -> None:
    first = adapted(base, LoRA(rank=3, alpha=5.0, target=["q_proj", "o_proj"]))
    perturb(first)
    save_weights(first, tmp_path, base=base, writes=True)
    second = adapted(base, LoRA(adapter=str(tmp_path)))
    assert trained(second) == trained(first)
    parameters = dict(second.model.named_parameters())
    assert all(torch.equal(parameters[name], each) for name, each in first.model.named_parameters())
    assert second.causal_lm.model.layers[0].self_attn.q_proj.scaling == {"default": 5.0 / 3}


def test_a_continued_adapter_over_a_bfloat16_base_is_float32(base: str, tmp_path: Path) -> None:
    save_weights(adapted(base, LoRA(rank=3)), tmp_path, base=base, writes=True)
    second = adapted(base, LoRA(adapter=str(tmp_path)), dtype="bfloat16")
    found = {(parameter.requires_grad, parameter.dtype) for parameter in second.parameters()}
    assert found == {(True, torch.float32), (False, torch.bfloat16)}


def test_options_beside_an_adapter_to_continue_are_refused() -> None:
    for options in ({"rank": 4}, {"alpha": 8.0}, {"dropout": 0.1}, {"target": ["q_proj"]}):
        with pytest.raises(InputError, match=f"an adapter to continue brings its own {next(iter(options))}"):
            LoRA(adapter="somewhere", **options)


def test_an_adapter_folder_without_an_adapter_is_refused(base: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter: must be a folder with adapter_config.json, got .*/nothing\."):
        adapted(base, LoRA(adapter=str(tmp_path / "nothing")))


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": -2}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_values_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(InputError, match=rf"tuning\.init_args\.{name}: must be"):
        LoRA(**options)


def test_an_adapter_on_the_head_is_part_of_the_output_layer(base: str) -> None:
    backbone = adapted(base, LoRA(target=["lm_head", "q_proj"]))
    perturb(backbone)
    check_output_layer(backbone)
    layer = backbone.output_layer
    assert (layer.weight - backbone.causal_lm.lm_head.base_layer.weight).abs().max() > 1e-3
    layer.weight.sum().backward()
    assert backbone.causal_lm.lm_head.lora_B["default"].weight.grad.any()


def test_dropout_on_an_adapted_head_is_refused(base: str) -> None:
    backbone = adapted(base, LoRA(target=["lm_head"], dropout=0.1))
    with pytest.raises(InputError, match="dropout: must be 0 with an adapter on the output layer"):
        _ = backbone.output_layer


def test_the_blocks_of_a_model_without_any_are_not_found() -> None:
    backbone = backbone_of(Full())
    assert decoder_blocks(backbone.causal_lm) is backbone.causal_lm.model.layers
    backbone.causal_lm.model.layers = nn.ModuleList([nn.Identity()])
    with pytest.raises(InputError, match="no list of 3 blocks in LlamaForCausalLM"):
        decoder_blocks(backbone.causal_lm)
