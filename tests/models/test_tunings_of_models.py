"""Which parameters each tuning trains, and what it refuses; the defects of LlamaFactory that it does not share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from lf_lightning import BackboneSpec, InputError
from lf_lightning.models import OFT, Backbone, Freeze, Full, LoRA, ReferenceSpec, Tuning, load_backbone, load_reference
from lf_lightning.models.export import load_weights, save_weights
from lf_lightning.models.pissa import convert_to_lora
from lf_lightning.models.reference import resolved_kind
from tests.models.test_adapters import LLAMA, lora_names, perturb, trained

MOE: dict[str, Any] = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "head_dim": 4, "vocab_size": 61}
MOE |= {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_experts": 4}
MOE |= {"num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BLOCK = "model.layers.{}."
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folders")
    shapes = {"base": LLAMA, "four": {**LLAMA, "num_hidden_layers": 4}, "moe": MOE}
    shapes["tied"] = {**LLAMA, "tie_word_embeddings": True}
    for name, shape in shapes.items():
        torch.manual_seed(0)
        values = dict(shape)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        AutoModelForCausalLM.from_config(config).save_pretrained(place / name)
    return place


def loaded(folder: Path, tuning: Tuning, *, rows: Any = None, **options: Any) -> Backbone:
    names = [f"new {number}" for number in rows or ()]
    spec = BackboneSpec(path=str(folder), tokenizer="bytes", new_tokens=names, **options)
    return load_backbone(spec, tuning, vocab_size=61 + len(rows or {}), seed=0, new_rows=rows)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(1, 30)[None]).logits
    return found


def saved(backbone: Backbone, folder: Path, base: Path) -> Path:
    folder.mkdir(exist_ok=True)
    save_weights(backbone, folder, base=str(base), writes=True)
    return folder


# ---------------------------------------------------------------------- targets


def test_a_regular_expression_must_match_whole_names(folders: Path):
    names = lora_names("model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj")
    assert trained(loaded(folders / "base", LoRA(target=r".*\.[02]\.self_attn\.q_proj"))) == names
    with pytest.raises(InputError, match=r"target: must name linear layers of the model, got q_pr\.j"):
        loaded(folders / "base", LoRA(target="q_pr.j"))
    with pytest.raises(InputError, match=r"target: must be a regular expression, got \(q"):
        LoRA(target="(q")


def test_rslora_divides_by_the_root_of_the_rank(folders: Path):
    layer = loaded(folders / "base", LoRA(rank=4, alpha=6.0, rslora=True)).causal_lm.model.layers[0].self_attn.q_proj
    assert layer.scaling == {"default": 3.0}


def test_modules_to_save_train_whole_beside_the_adapter(folders: Path):
    backbone = loaded(folders / "base", LoRA(target=["q_proj"], modules_to_save=["model.norm"]))
    names = lora_names(*(f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)))
    assert trained(backbone) == names | {"base_model.model.model.norm.modules_to_save.default.weight"}


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: LoRA(dora=True, init="pissa"), "dora: must be false with init: pissa"),
        (lambda: LoRA(pissa_iterations=3), "pissa_iterations: belongs to init: pissa_fast, got init: zero"),
        (lambda: LoRA(init="pissa_fast", pissa_iterations=0), "pissa_iterations: must be at least 1, got 0"),
        (lambda: LoRA(adapter="x", dora=True), "an adapter to continue brings its own dora"),
        (lambda: OFT(block_size=4, num_blocks=2), "num_blocks: excludes block_size"),
        (lambda: OFT(block_size=1), "block_size: must be at least 2, got 1"),
        (lambda: OFT(adapter="x", exact=True), "an adapter to continue brings its own exact"),
        (lambda: Freeze(num_layers=0), "num_layers: must not be 0"),
        (lambda: Freeze(num_layers=-1, spread=True), "num_layers: must be positive with spread: true"),
        (lambda: BackboneSpec(path="x", new_tokens=["a"], new_special_tokens=["a"]), "must be words, each once"),
        (lambda: BackboneSpec(path="x", new_token_noise=0.1), "new_token_noise: must be 0 or more and beside"),
    ],
)
def test_options_that_contradict_each_other_are_refused_when_they_are_parsed(make: Any, line: str):
    with pytest.raises(InputError, match=line):
        make()


# ---------------------------------------------------------------------- Freeze


def test_freeze_takes_first_blocks_spread_blocks_and_parts_of_blocks(folders: Path):
    assert {name.split(".")[2] for name in trained(loaded(folders / "four", Freeze(num_layers=-1)))} == {"0"}
    assert {name.split(".")[2] for name in trained(loaded(folders / "four", Freeze(num_layers=2, spread=True)))} == {
        "1",
        "3",
    }
    parts = trained(loaded(folders / "four", Freeze(num_layers=1, modules=["mlp.down_proj", "k_proj"])))
    assert parts == {"model.layers.3.mlp.down_proj.weight", "model.layers.3.self_attn.k_proj.weight"}
    with pytest.raises(InputError, match=r"num_layers: must divide the 4 blocks .* got 3\."):
        loaded(folders / "four", Freeze(num_layers=3, spread=True))


def test_defect_32_freeze_takes_names_as_a_whole(folders: Path):
    backbone = loaded(folders / "base", Freeze(num_layers=1, modules=["q_proj"], extra_modules=["norm"]))
    assert trained(backbone) == {"model.layers.2.self_attn.q_proj.weight", "model.norm.weight"}
    for options, near in (({"modules": ["norm"]}, "modules"), ({"extra_modules": ["q_proj"]}, "extra_modules")):
        with pytest.raises(InputError, match=f"{near}: must name modules"):
            loaded(folders / "base", Freeze(num_layers=1, **options))


def test_parts_that_train_are_float32_in_a_half_precision_model(folders: Path):
    tuning = Freeze(num_layers=2, spread=False, modules=["q_proj", "mlp"], extra_modules=["embed_tokens", "lm_head"])
    half, whole = (loaded(folders / "base", tuning, dtype=dtype) for dtype in ("bfloat16", "float32"))
    found = {(parameter.requires_grad, parameter.dtype) for parameter in half.parameters()}
    assert found == {(True, torch.float32), (False, torch.bfloat16)}
    assert (logits(half.model).float() - logits(whole.model)).abs().max() < 0.1


# ---------------------------------------------------------------------- OFT


def test_defect_12_oft_takes_its_target_and_opens_again(folders: Path, tmp_path: Path):
    first = loaded(folders / "base", OFT(block_size=4, target=["q_proj"]))
    assert trained(first) == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.oft_R.default.weight" for layer in range(3)
    }
    perturb(first)
    folder = saved(first, tmp_path / "oft", folders / "base")
    plain = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    again = loaded(folders / "base", OFT(adapter=str(folder)))
    merged = loaded(folders / "base", Full(), merge_adapters=[str(folder)])
    assert torch.equal(logits(plain), logits(first.model))
    assert torch.equal(logits(again.model), logits(first.model))
    assert trained(again) == trained(first)
    assert (logits(merged.model) - logits(first.model)).abs().max() < 1e-5
    with pytest.raises(InputError, match="adapter: must be a LORA adapter for LoRA, got OFT"):
        loaded(folders / "base", LoRA(adapter=str(folder)))


def test_oft_refuses_blocks_that_leave_a_rest(folders: Path):
    with pytest.raises(InputError, match=r"block_size: must divide the 16 inputs of .*q_proj, got 32"):
        loaded(folders / "base", OFT())
    with pytest.raises(InputError, match=r"num_blocks: must divide the 16 inputs of .*q_proj, got 3"):
        loaded(folders / "base", OFT(num_blocks=3))


# ---------------------------------------------------------------------- experts


def test_defect_33_fused_experts_are_adapted_or_refused_never_skipped(folders: Path, tmp_path: Path):
    backbone = loaded(folders / "moe", LoRA(rank=2))
    names = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkvo"] + [EXPERTS, f"{EXPERTS}.base_layer"]
    assert trained(backbone) == lora_names(*names)
    perturb(backbone)
    folder = saved(backbone, tmp_path / "moe", folders / "moe")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(str(folder))), logits(backbone.model))
    named = loaded(folders / "moe", LoRA(rank=2, target=["experts.down_proj"]))
    assert trained(named) == lora_names(EXPERTS)
    for options in ({"dora": True}, {"dropout": 0.1}, {"init": "pissa"}):
        with pytest.raises(InputError, match=rf"{next(iter(options))}: cannot act on {EXPERTS}.gate_up_proj"):
            loaded(folders / "moe", LoRA(**options))
    with pytest.raises(InputError, match="OFT cannot rotate"):
        loaded(folders / "moe", OFT(block_size=4))


# ---------------------------------------------------------------------- PiSSA


@pytest.mark.parametrize("init", ["pissa", "pissa_fast"])
def test_defect_74_a_pissa_model_starts_as_its_base_and_is_saved_for_it(folders: Path, tmp_path: Path, init: Any):
    base = logits(AutoModelForCausalLM.from_pretrained(folders / "base"))
    backbone = loaded(folders / "base", LoRA(rank=3, init=init))
    assert (logits(backbone.model) - base).abs().max() < 1e-5
    perturb(backbone)
    folder = saved(backbone, tmp_path / "run", folders / "base")
    convert_to_lora(folder, backbone.start)
    found = [logits(AutoPeftModelForCausalLM.from_pretrained(str(folder))) for _ in range(2)]
    assert torch.equal(*found)
    assert (found[0] - logits(backbone.model)).abs().max() < 1e-4
    assert (found[0] - base).abs().max() > 0.1


def test_a_pissa_adapter_as_it_trains_is_refused_as_one_to_continue(folders: Path, tmp_path: Path):
    raw = saved(loaded(folders / "base", LoRA(rank=3, init="pissa")), tmp_path / "raw", folders / "base")
    for options in ({"tuning": LoRA(adapter=str(raw))}, {"tuning": Full(), "merge_adapters": [str(raw)]}):
        with pytest.raises(InputError, match=r"must be valid on its base, got .*raw, which was started as pissa"):
            loaded(folders / "base", **options)


def test_a_pissa_checkpoint_from_another_decomposition_is_the_same_model(folders: Path, tmp_path: Path):
    first = loaded(folders / "base", LoRA(rank=3, init="pissa"))
    perturb(first)
    folder = saved(first, tmp_path / "run", folders / "base")
    convert_to_lora(folder, first.start)
    second = loaded(folders / "base", LoRA(rank=3, init="pissa_fast", pissa_iterations=1))  # other numbers
    load_weights(second, folder)
    assert all(torch.equal(second.start[name], each) for name, each in first.start.items())
    assert (logits(second.model) - logits(first.model)).abs().max() < 1e-5
    with pytest.raises(InputError, match="must have twice the rank 2 of this PiSSA adapter"):
        load_weights(loaded(folders / "base", LoRA(rank=2, init="pissa")), folder)


def test_the_reference_of_a_pissa_run_is_the_original_base(folders: Path):
    base, tuning = logits(AutoModelForCausalLM.from_pretrained(folders / "base")), LoRA(rank=3, init="pissa")
    for kind in ("auto", "copy"):
        policy = loaded(folders / "base", tuning)
        spec = BackboneSpec(path=str(folders / "base"), tokenizer="bytes")
        reference = load_reference(ReferenceSpec(kind=kind), policy, spec, tuning, vocab_size=61, seed=0)
        perturb(policy)
        found = []
        with reference._switched(), torch.no_grad():
            found = logits(reference.backbone.model)
        assert (found - base).abs().max() < 1e-5
        assert (logits(policy.model) - base).abs().max() > 0.1
    with pytest.raises(InputError, match=r"reference\.kind: adapters_off would leave weights without"):
        resolved_kind(ReferenceSpec(kind="adapters_off"), tuning)


# ---------------------------------------------------------------------- several adapters


def test_several_adapters_are_merged_continued_or_joined_by_a_new_one(folders: Path, tmp_path: Path):
    adapters = []
    for number, tuning in enumerate((LoRA(rank=2), LoRA(rank=3, dora=True))):
        backbone = loaded(folders / "base", tuning)
        perturb(backbone)
        adapters.append(str(saved(backbone, tmp_path / str(number), folders / "base")))
    want = AutoModelForCausalLM.from_pretrained(folders / "base")
    for name in adapters:
        want = PeftModel.from_pretrained(want, name).merge_and_unload()
    both = logits(want)
    continued = loaded(folders / "base", LoRA(adapter=adapters[1]), merge_adapters=adapters[:1])
    assert (logits(continued.model) - both).abs().max() < 1e-5
    new = loaded(folders / "base", LoRA(rank=2), merge_adapters=adapters)
    assert (logits(new.model) - both).abs().max() < 1e-5
    whole = loaded(folders / "base", Full(), merge_adapters=adapters)
    assert trained(whole) == {name for name, _ in whole.model.named_parameters()}
    with pytest.raises(InputError, match=r"backbone\.merge_adapters: must be a folder with adapter_config"):
        loaded(folders / "base", Full(), merge_adapters=["nowhere"])


# ---------------------------------------------------------------------- new tokens


@pytest.mark.parametrize("name", ["base", "tied"])
def test_new_rows_start_as_the_mean_or_as_what_describes_them(folders: Path, name: str):
    before = AutoModelForCausalLM.from_pretrained(folders / name)
    backbone = loaded(folders / name, Full(), rows={61: (), 62: (5, 9)}, new_token_noise=0.0)
    for old, new in zip(_vocabulary(before), _vocabulary(backbone.causal_lm), strict=True):
        assert torch.equal(new[:61], old)
        torch.testing.assert_close(new[61], old.mean(0))
        torch.testing.assert_close(new[62], old[[5, 9]].mean(0))
    assert (backbone.causal_lm.lm_head.weight is backbone.causal_lm.model.embed_tokens.weight) == (name == "tied")
    assert backbone.causal_lm.config.vocab_size == 63


def _vocabulary(model: Any) -> list[torch.Tensor]:
    return [model.model.embed_tokens.weight.detach(), model.lm_head.weight.detach()]


def test_noise_is_one_over_the_root_of_the_width_unless_given(folders: Path):
    rows = dict.fromkeys(range(61, 161), ())
    spreads = {}
    for noise in (None, 0.5):
        backbone = loaded(folders / "base", Full(), rows=rows, new_token_noise=noise)
        new = backbone.causal_lm.model.embed_tokens.weight.detach()[61:]
        spreads[noise] = float((new - new.mean(0)).std())
    assert spreads == pytest.approx({None: 0.25, 0.5: 0.5}, rel=0.1)


def test_every_tuning_trains_the_vocabulary_of_new_tokens(folders: Path):
    rows = {61: ()}
    copies = {f"base_model.model.{each}.modules_to_save.default.weight" for each in ("model.embed_tokens", "lm_head")}
    for tuning in (LoRA(target=["q_proj"]), OFT(block_size=4, target=["q_proj"])):
        assert copies <= trained(loaded(folders / "base", tuning, rows=rows))
    frozen = trained(loaded(folders / "base", Freeze(num_layers=1), rows=rows))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= frozen
    tied = trained(loaded(folders / "tied", LoRA(target=["q_proj"]), rows=rows))
    assert {name for name in tied if "lora" not in name} == {sorted(copies)[1]}
    with pytest.raises(InputError, match="peft cannot keep embedding and output layer tied beside OFT"):
        loaded(folders / "tied", OFT(block_size=4, target=["q_proj"]), rows=rows)


def test_without_its_adapter_a_model_with_new_tokens_is_what_training_started_from(folders: Path):
    rows, spec = {61: (3,)}, BackboneSpec(path=str(folders / "tied"), tokenizer="bytes")
    start = logits(loaded(folders / "tied", Full(), rows=rows).model)
    policy = loaded(folders / "tied", LoRA(), rows=rows)
    reference = load_reference(ReferenceSpec(), policy, spec, LoRA(), vocab_size=62, seed=0, new_rows=rows)
    perturb(policy)
    with reference._switched(), torch.no_grad():
        assert torch.equal(logits(policy.model), start)
    assert (logits(policy.model) - start).abs().max() > 0.1
