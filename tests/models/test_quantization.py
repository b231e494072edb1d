"""Weights in few bits: what becomes small, what trains beside them, what a folder holds, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lf_lightning.data.tokenizer import byte_tokenizer
from lf_lightning.models import Freeze, Full, LoRA, ReferenceSpec, load_backbone, load_reference
from lf_lightning.types import BackboneSpec, InputError
from tests.cli.runs import INIT, build_model, config, lightning, log_rows, losses, merged, weights

SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
COLUMNS = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
KINDS = ("nf4", "fp4", "int8")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("few bits") / "model", **SIZES)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(base: Path, **options: Any) -> BackboneSpec:
    return BackboneSpec(path=str(base), **options)


def load(base: Path, **options: Any) -> Any:
    return load_backbone(spec(base, **options), LoRA(rank=2), vocab_size=259, seed=1)


def linears(backbone: Any) -> list[torch.nn.Module]:
    layers = (Linear4bit, Linear8bitLt)
    return [module for module in backbone.causal_lm.modules() if isinstance(module, layers)]


@pytest.mark.parametrize(("kind", "bytes_a_weight"), [("nf4", 0.5), ("fp4", 0.5), ("int8", 1.0)])
def test_every_linear_layer_but_the_output_layer_becomes_small_and_the_count_stays(
    base: Path, kind: Any, bytes_a_weight: float
):
    plain, small = load(base), load(base, quantization=kind)
    assert len(linears(small)) == 2 * 7
    for layer in linears(small):
        weight: Any = layer.weight
        assert weight.numel() * weight.element_size() == bytes_a_weight * layer.in_features * layer.out_features
        assert not weight.requires_grad
    assert type(small.causal_lm.lm_head) is torch.nn.Linear
    assert small.num_parameters() == plain.num_parameters()
    trained = {name for name, parameter in small.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in plain.model.named_parameters() if parameter.requires_grad}
    assert all(parameter.dtype == torch.float32 for parameter in small.parameters() if parameter.requires_grad)


def test_the_options_change_the_weights(base: Path):
    ids = torch.arange(3, 40).unsqueeze(0)
    found = [load(base, **options) for options in ({}, {"quantization": "nf4"}, {"quantization": "fp4"})]
    found += [load(base, quantization="nf4", double_quantization=False), load(base, quantization="int8")]
    with torch.no_grad():
        logits = [each.causal_lm(input_ids=ids).logits for each in found]
    for i, one in enumerate(logits):
        assert not any(torch.equal(one, other) for other in logits[i + 1 :]), i
        assert torch.nn.functional.cosine_similarity(one.flatten(), logits[0].flatten(), dim=0) > 0.8


def test_the_products_are_in_the_type_of_the_spec(base: Path):
    for dtype in ("float32", "bfloat16"):
        (layer, *_) = linears(load(base, quantization="nf4", dtype=dtype))
        assert layer.compute_dtype == getattr(torch, dtype)


def settings(here: Path, base: Path, run: str, **options: Any) -> dict[str, Any]:
    of_stage = {f"{INIT}.{name}": value for name, value in options.items()}
    return merged(config(run, base), {f"{INIT}.backbone.quantization": "nf4", **of_stage})


def test_an_adapter_learns_beside_four_bits_and_its_folder_opens_with_plain_peft(here: Path, base: Path):
    run = merged(settings(here, base, "run", **{"optimizer.init_args.lr": 0.05}), {"trainer.max_steps": 8})
    assert lightning("fit", here, run) == 0
    found = losses(here / "run")
    assert found[-1] < found[0] - 1.0
    names = {path.name for path in (here / "run" / "final").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    plain = AutoModelForCausalLM.from_pretrained(base, quantization_config=bits, dtype=torch.float32)
    opened = PeftModel.from_pretrained(plain, here / "run" / "final").eval()
    ours = load_backbone(
        spec(base, quantization="nf4"), LoRA(adapter=str(here / "run" / "final")), vocab_size=259, seed=1
    ).eval()
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(ours.causal_lm(input_ids=ids).logits, opened(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["nf4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_a_run_goes_on_bit_for_bit_and_dora_trains_too(here: Path, base: Path, kind: str):
    tuning = {"class_path": "LoRA", "init_args": {"rank": 2, "dora": kind == "fp4", "dropout": 0.1}}
    options = {"tuning": tuning, "backbone.quantization": kind, "backbone.gradient_checkpointing": kind == "nf4"}
    straight = settings(here, base, "straight", **options)
    assert lightning("fit", here, straight) == 0
    cut = merged(settings(here, base, "cut", **options), {"trainer.max_steps": 2})
    assert lightning("fit", here, cut) == 0
    assert lightning("fit", here, merged(cut, {"trainer.max_steps": 4}), "--ckpt_path", "last") == 0
    assert weights(here / "cut" / "final") == weights(here / "straight" / "final")


def test_a_reference_of_its_own_may_be_in_few_bits(base: Path):
    policy = load_backbone(spec(base), Full(), vocab_size=259, seed=1)
    small = load_reference(
        ReferenceSpec(kind="copy", quantization="nf4"), policy, spec(base), Full(), vocab_size=259, seed=1
    )
    assert len(linears(small.backbone)) == 14
    other = ReferenceSpec(path=str(base), quantization="int8")
    found = load_reference(other, policy, spec(base), Full(), vocab_size=259, seed=1)
    assert {type(layer) for layer in linears(found.backbone)} == {Linear8bitLt}
    kept = load_reference(
        ReferenceSpec(path=str(base)), policy, spec(base, quantization="nf4"), LoRA(), vocab_size=259, seed=1
    )
    assert linears(kept.backbone) == [], "the policy's options say nothing of another model"
    copied = load_reference(
        ReferenceSpec(kind="copy"), policy, spec(base, quantization="nf4"), LoRA(), vocab_size=259, seed=1
    )
    assert len(linears(copied.backbone)) == 14


def test_dpo_on_four_bits_starts_at_log_2(here: Path, base: Path):
    rows = [{"instruction": f"Say {i}", "chosen": "yes " * i, "rejected": "no " * i} for i in range(1, 9)]
    (here / "pairs.json").write_text(json.dumps(rows))
    data = {"data.datasets": [{"path": "pairs.json", "ranking": True, "columns": COLUMNS}], "model.class_path": "DPO"}
    run = merged(settings(here, base, "run"), {**data, "trainer.max_steps": 2})
    assert lightning("fit", here, run) == 0
    assert losses(here / "run")[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses(here / "run")[1] != losses(here / "run")[0]


@pytest.fixture(scope="module")
def quantized(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose weights are in four bits already, as transformers writes it."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=bits, dtype=torch.float32).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_folder_that_is_quantized_takes_an_adapter(here: Path, quantized: Path):
    assert lightning("fit", here, config("run", quantized)) == 0
    assert len(losses(here / "run")) == 4
    assert [row for row in log_rows(here / "run") if "loss" in row]
    with pytest.raises(InputError, match=r"is quantized already \(bitsandbytes\), got nf4. Remove it."):
        load(quantized, quantization="nf4")
    with pytest.raises(InputError, match=r"only an adapter can train beside weights in few bits"):
        load_backbone(spec(quantized), Full(), vocab_size=259, seed=1)


def test_a_folder_whose_package_is_missing_is_one_line_that_names_the_package(base: Path, tmp_path: Path):
    folder = tmp_path / "gptq"
    shutil.copytree(base, folder)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"needs a package that is missing.*(?i:gptq).* Install it\."):
        load(folder)


@pytest.mark.parametrize(
    ("options", "tuning", "line"),
    [
        ({}, Full(), "only an adapter can train beside weights in few bits, got Full with nf4. Use LoRA."),
        ({}, Freeze(), "got Freeze with nf4"),
        ({}, LoRA(init="pissa"), "got nf4 with a PiSSA start. Use init: zero."),
        ({"dtype": "float64"}, LoRA(), "got dtype: float64"),
        ({"merge_adapters": ["a"]}, LoRA(), "merge_adapters: would change weights that are in few bits"),
        ({"new_tokens": ["<a>"]}, LoRA(), "new_tokens: would change weights that are in few bits"),
        ({"path": None, "architecture": {"model_type": "llama"}, "tokenizer": "bytes"}, LoRA(), "Set path."),
    ],
)
def test_what_few_bits_cannot_do_is_refused(base: Path, options: dict[str, Any], tuning: Any, line: str):
    with pytest.raises(InputError) as error:
        load_backbone(replace(spec(base, quantization="nf4"), **options), tuning, vocab_size=259, seed=1)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_what_few_bits_cannot_do_is_refused_before_anything_is_loaded(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
):
    full = settings(here, base, "run", tuning={"class_path": "Full"})
    shared = merged(settings(here, base, "run"), {"trainer.strategy": "fsdp2"})
    for refused, line in ((full, "only an adapter can train"), (shared, "fsdp2 cannot cut weights in few bits")):
        assert lightning("fit", here, refused) == 2
        (said,) = [each for each in capsys.readouterr().err.splitlines() if "error" in each]
        assert line in said
        assert not (here / "run").exists()


def test_an_option_without_its_quantization_is_refused(base: Path):
    for kind in (None, "int8"):
        with pytest.raises(InputError, match="double_quantization: belongs to quantization: nf4 or fp4"):
            spec(base, quantization=kind, double_quantization=False)
    with pytest.raises(InputError, match=r"reference.quantization: belongs to a reference with weights of its own"):
        ReferenceSpec(kind="adapters_off", quantization="nf4")
