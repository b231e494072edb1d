"""Every folder of a reward model's run holds its head, in the form that was asked for, and nothing of a wrapper."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lf_lightning.callbacks.value_head import spare_pad_id
from lf_lightning.data.tokenizer import byte_tokenizer
from tests.cli.runs import INIT, build_model
from tests.stages.judgement_runs import fit

FOLDERS = ("checkpoints/step-00000002", "checkpoints/step-00000004", "final")
HEAD = {"v_head.summary.weight", "v_head.summary.bias"}
CLASSIFIER = {f"{INIT}.value_head": {"save_as": "sequence_classification"}}
TIED = {f"{INIT}.backbone.architecture.tie_word_embeddings": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model")


def names(folder: Path) -> set[str]:
    """Names of every tensor of a folder."""
    return {name for path in folder.glob("*.safetensors") for name in load_file(path)}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_listed(folder: Path) -> None:
    """The manifest knows size and hash of every file, those of the head included."""
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert listed.keys() == there - {"manifest.json"}
    for name, facts in listed.items():
        content = (folder / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_model_is_plain_beside_its_head(tied: bool, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    run = fit(tmp_path, "RM", **(TIED if tied else {}))
    heads = []
    for name in FOLDERS:
        head = load_file(run / name / "value_head.safetensors")
        assert head.keys() == HEAD
        assert head["v_head.summary.weight"].shape == (1, 16)
        assert head["v_head.summary.bias"].shape == (1,)
        heads.append(head["v_head.summary.weight"])
        others = names(run / name) - HEAD
        assert all(other.startswith("model.") or other == "lm_head.weight" for other in others)
        assert ("lm_head.weight" in others) == (not tied)
        assert_listed(run / name)
        _, report = AutoModelForCausalLM.from_pretrained(run / name, output_loading_info=True)
        assert not report["missing_keys"]
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(heads[1], heads[2])


@pytest.mark.parametrize("save_as", [{}, CLASSIFIER], ids=["value_head", "sequence_classification"])
def test_an_adapter_holds_its_own_weights_and_the_head(save_as: dict[str, Any], tmp_path: Path, model: Path):
    run = fit(tmp_path, "RM", lora=model, **save_as)
    for name in FOLDERS:
        found = names(run / name)
        scores = {"base_model.model.score.weight"} if save_as else HEAD
        assert scores <= found
        assert all(".lora_A." in other or ".lora_B." in other for other in found - scores)
        assert (run / name / "value_head.safetensors").is_file() == (not save_as)
        config = json.loads((run / name / "adapter_config.json").read_text())
        assert config["task_type"] == ("SEQ_CLS" if save_as else "CAUSAL_LM")
        assert_listed(run / name)


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_for_sequence_classification_is_whole_and_has_no_output_layer(tied: bool, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = fit(tmp_path, "RM", **CLASSIFIER, **(TIED if tied else {}))
    for name in FOLDERS:
        found = names(run / name)
        assert "score.weight" in found
        assert not [other for other in found if "lm_head" in other or "v_head" in other]
        classifier, report = AutoModelForSequenceClassification.from_pretrained(run / name, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert classifier.config.num_labels == 1
        assert classifier.config.pad_token_id == AutoTokenizer.from_pretrained(run / name).pad_token_id
        assert not (run / name / "generation_config.json").exists()
        assert_listed(run / name)


def test_both_forms_hold_the_same_model(tmp_path: Path):
    both = [tensors(fit(tmp_path, "RM", run, **form) / "final") for run, form in (("a", {}), ("b", CLASSIFIER))]
    assert torch.equal(both[0].pop("v_head.summary.weight"), both[1].pop("score.weight"))
    del both[0]["v_head.summary.bias"], both[0]["lm_head.weight"]
    assert both[0].keys() == both[1].keys()
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])


def test_other_stages_get_no_head(tmp_path: Path):
    assert not list(fit(tmp_path, "DPO", trainer__max_steps=2).rglob("value_head.*"))


def test_the_pad_token_is_one_that_ends_no_response():
    tokenizer = byte_tokenizer()
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert pad != end
    assert spare_pad_id(tokenizer, [end]) == pad
    tokenizer.pad_token = tokenizer.eos_token
    other = spare_pad_id(tokenizer, [end])
    assert other is not None
    assert other != end
    assert spare_pad_id(tokenizer, tokenizer.all_special_ids) is None
