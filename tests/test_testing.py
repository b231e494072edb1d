"""The helpers for tests: they load what they say, and fail where they should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lf_lightning.models import Freeze, Full, LoRA
from lf_lightning.testing import (
    check_lora_model,
    compare_model,
    load_infer_model,
    load_reference_model,
    load_train_dataset,
    load_train_model,
)
from lf_lightning.types import BackboneSpec
from tests.cli.runs import ROWS, build_model, config, lightning
from tests.stages.judgement_runs import fit as fit_judged


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("testing") / "model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_for_inference_is_the_plain_one_and_frozen(base: Path):
    ours = load_infer_model(BackboneSpec(path=str(base), dtype="float16"))
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float16}
    assert not ours.training
    plain = load_reference_model(base)
    compare_model(load_infer_model(BackboneSpec(path=str(base))).causal_lm, plain)


def test_what_differs_is_named(base: Path):
    one, other = load_reference_model(base), load_reference_model(base)
    with pytest.raises(AssertionError, match=r"lm_head\.weight must differ"):
        compare_model(one, other, diff_keys=["lm_head"])
    with torch.no_grad():
        other.get_output_embeddings().weight.add_(1.0)
    with pytest.raises(AssertionError, match=r"lm_head\.weight must be equal"):
        compare_model(one, other)
    compare_model(one, other, diff_keys=["lm_head"])
    with pytest.raises(AssertionError, match="only one of the models has"):
        compare_model(one, get_peft_model(load_reference_model(base), LoraConfig(target_modules=["q_proj"])))


def test_an_adapter_is_what_trains(base: Path):
    spec = BackboneSpec(path=str(base), dtype="float16")
    tuning = LoRA(target=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = load_train_model(spec, tuning)
    assert check_lora_model(adapted.model) == ({"q_proj", "v_proj"}, {"embed_tokens", "lm_head"})
    with pytest.raises(AssertionError, match="must not train"):
        check_lora_model(load_train_model(spec, Full()).model)
    next(parameter for name, parameter in adapted.model.named_parameters() if "lora_A" in name).requires_grad_(False)
    with pytest.raises(AssertionError, match=r"lora_A.* must train"):
        check_lora_model(adapted.model)


def test_what_trains_is_float32_and_the_rest_frozen(base: Path):
    model = load_train_model(BackboneSpec(path=str(base), dtype="float16"), Freeze(num_layers=1))
    for name, parameter in model.causal_lm.named_parameters():
        trains = name.startswith("model.layers.1.")
        assert parameter.requires_grad == trains
        assert parameter.dtype == (torch.float32 if trains else torch.float16)


def test_a_trained_folder_is_the_same_by_both_ways(here: Path, base: Path):
    assert lightning("fit", here, config("run", base)) == 0
    final = here / "run" / "final"
    spec = BackboneSpec(path=str(base))
    ours, plain = load_infer_model(spec, LoRA(rank=2), folder=final), load_reference_model(base, final)
    compare_model(ours.model, plain)
    compare_model(ours.model, load_train_model(spec, LoRA(rank=2)).model, diff_keys=["lora_"])
    assert check_lora_model(load_reference_model(base, final, is_trainable=True))[1] == set()


def test_a_value_head_is_loaded_with_its_model(here: Path, base: Path):
    final = fit_judged(here, "RM", "rm", lora=base, trainer__max_steps=2) / "final"
    ours = load_infer_model(BackboneSpec(path=str(base)), LoRA(rank=2, adapter=None), folder=final, add_valuehead=True)
    plain = load_reference_model(base, final, add_valuehead=True)
    assert ours.value_head is not None
    compare_model(ours.value_head, dict(plain.named_children())["v_head"])


def test_the_training_set_is_in_the_order_of_training(here: Path, base: Path):
    (here / "rows.json").write_text(json.dumps(ROWS))
    options = {"datasets": [{"path": "rows.json"}], "max_length": 96, "cache_dir": None, "seed": 3}
    units = load_train_dataset(BackboneSpec(path=str(base)), "sft", **options)
    plain = load_train_dataset(BackboneSpec(path=str(base)), "sft", shuffle=False, **options)
    assert len(units) == len(ROWS)
    assert units != plain
    assert sorted(map(repr, units)) == sorted(map(repr, plain))
