"""Every way to tune, from the command line: it learns, plain libraries open it, and it resumes bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lf_lightning
from lf_lightning import BackboneSpec
from lf_lightning.callbacks import PissaConvertCallback
from lf_lightning.data.tokenizer import add_new_tokens, load_tokenizer
from lf_lightning.models import Backbone, load_backbone
from lf_lightning.models.export import load_weights
from tests.cli.runs import INIT, build_model, config, lightning, log_rows, losses, weights, write
from tests.stages.judgement_runs import fit as judge
from tests.stages.rollout_runs import fit as roll

STEPS = 24
TOKENS = {"new_tokens": ["<tool>"], "new_special_tokens": {"<|x|>": "the end of all"}}
CASES: dict[str, dict[str, Any]] = {  # tuning, its options, those of the backbone; parameters that train, last loss
    "lora": {"options": {"rank": 2}, "trained": 992, "to": 3.5},
    "dora": {"options": {"rank": 2, "dora": True, "rslora": True}, "trained": 992 + 256, "to": 3.6},
    "pissa": {"options": {"rank": 2, "init": "pissa"}, "trained": 992, "to": 3.7},
    "pissa_fast": {"options": {"rank": 2, "init": "pissa_fast", "rslora": True}, "trained": 992, "to": 3.3},
    "oft": {"kind": "OFT", "options": {"block_size": 4, "target": ["q_proj", "down_proj"]}, "trained": 120, "to": 4.6},
    "freeze": {"kind": "Freeze", "options": {"num_layers": 1, "extra_modules": ["norm"]}, "trained": 2224, "to": 2.5},
    "tokens": {"options": {"rank": 2, "target": ["q_proj"]}, "trained": 128 + 2 * 261 * 16, "to": 0.8, "more": TOKENS},
}
"""Sizes are those of two blocks of 16 by 24."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tunings")
    build_model(folder / "base", initializer_range=0.3)
    return folder


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    write(place, {})


def settings(place: Path, name: str, run: str, **changes: Any) -> dict[str, Any]:
    case = CASES[name]
    choice = {"class_path": case.get("kind", "LoRA"), "init_args": case["options"]}
    backbone = {"path": str(place / "base"), **case.get("more", {})}
    base = {f"{INIT}.tuning": choice, f"{INIT}.backbone": backbone, f"{INIT}.optimizer.init_args.lr": 0.05}
    base |= {"trainer__max_steps": STEPS, "checkpoint__every_n_steps": STEPS // 2}
    return config(place / run, place / "base", **{**base, **changes})


def run(place: Path, name: str, folder: str, *arguments: str, **changes: Any) -> Path:
    with patch("lf_lightning.callbacks.plots.plot_curve"):
        assert lightning("fit", place, settings(place, name, folder, **changes), *arguments) == 0
    return place / folder


def rebuilt(place: Path, name: str, folder: Path) -> Backbone:
    """Our own model with the weights of a folder."""
    case = CASES[name]
    spec = BackboneSpec(path=str(place / "base"), **case.get("more", {}))
    tokenizer = load_tokenizer(spec)
    rows = add_new_tokens(tokenizer, spec)
    kind = vars(lf_lightning.models)[case.get("kind", "LoRA")]
    backbone = load_backbone(spec, kind(**case["options"]), vocab_size=len(tokenizer), seed=7, new_rows=rows)
    load_weights(backbone, folder)
    return backbone.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(3, 60)[None]).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_run_learns_is_opened_by_plain_libraries_and_resumes_bit_by_bit(place: Path, name: str):
    straight = run(place, name, name)
    found = losses(straight)
    assert 6.6 < found[0] < 6.63
    assert found[-1] < CASES[name]["to"]
    half = straight / "checkpoints" / f"step-{STEPS // 2:08d}"
    again = run(place, name, f"{name}-again", "--ckpt_path", str(half))
    assert losses(again)[-STEPS // 2 :] == found[STEPS // 2 :]
    assert weights(again / "final") == weights(straight / "final")
    for folder in (straight / "final", half):
        backbone = rebuilt(place, name, folder)
        assert backbone.num_parameters()[0] == CASES[name]["trained"]
        kind = AutoPeftModelForCausalLM if backbone.is_adapter else AutoModelForCausalLM
        plain = kind.from_pretrained(str(folder)).eval()
        assert (logits(plain) - logits(backbone.model)).abs().max() < 1e-4
        base = AutoModelForCausalLM.from_pretrained(place / "base")
        assert (logits(plain)[..., :259] - logits(base)).abs().max() > 0.1


def test_new_tokens_are_one_id_each_in_what_is_encoded_and_saved(place: Path):
    folder = place / "tokens" / "final"
    if not folder.exists():
        run(place, "tokens", "tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<tool>", "<|x|>"]) == [259, 260]
    assert tokenizer("<tool><|x|>")["input_ids"] == [259, 260]
    assert tokenizer.decode([259, 260], skip_special_tokens=True) == "<tool>"
    names = set(load_file(folder / "adapter_model.safetensors"))
    whole = {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"}
    assert {name for name in names if "lora" not in name} == whole


def test_defect_41_and_74_a_pissa_folder_is_a_plain_lora_on_the_original_base(place: Path):
    folder = place / "pissa"
    if not folder.exists():
        run(place, "pissa", "pissa")
    step = folder / "checkpoints" / f"step-{STEPS:08d}"
    for saved in (folder / "final", step):
        top = json.loads((saved / "adapter_config.json").read_text())
        assert (top["r"], top["lora_alpha"], top["init_lora_weights"]) == (4, 8, True)
        assert top["base_model_name_or_path"] == str(place / "base")
    own = json.loads((step / "trainer_state" / "adapter" / "adapter_config.json").read_text())
    assert (own["r"], own["lora_alpha"], own["init_lora_weights"]) == (2, 4, "pissa")
    assert weights(folder / "final") == weights(step)


def test_saving_a_pissa_run_changes_nothing_that_trains(place: Path):
    often = run(place, "pissa", "often", trainer__max_steps=4, checkpoint__every_n_steps=1)
    never = run(place, "pissa", "never", trainer__max_steps=4, checkpoint__every_n_steps=None)
    assert weights(often / "final") == weights(never / "final")
    assert losses(often) == losses(never)


def test_a_live_model_is_the_same_bit_by_bit_before_and_after_its_folder_is_converted(place: Path, tmp_path: Path):
    backbone = rebuilt(place, "pissa", place / "pissa" / "final")
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    from lf_lightning.models.export import save_weights

    save_weights(backbone, tmp_path, base=str(place / "base"), writes=True)
    trainer: Any = type("Zero", (), {"is_global_zero": True})()
    PissaConvertCallback().on_save_pretrained(trainer, type("S", (), {"backbone": backbone})(), tmp_path)  # type: ignore[arg-type]
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.model.state_dict().items())
    plain = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)).eval()
    assert (logits(plain) - logits(backbone.model)).abs().max() < 1e-4


@pytest.mark.parametrize("stage", ["RM", "DPO", "KTO"])
@pytest.mark.parametrize("name", ["pissa", "oft"])
def test_stages_that_judge_take_every_adapter_and_begin_at_their_known_value(
    place: Path, tmp_path: Path, stage: str, name: str
):
    case = CASES[name]
    choice = {"class_path": case.get("kind", "LoRA"), "init_args": case["options"]}
    folder = judge(tmp_path, stage, **{f"{INIT}.tuning": choice, "lora": place / "base", "trainer__max_steps": 2})
    first = losses(folder)[0]
    known = {"DPO": 0.693147, "KTO": 0.5}
    assert first == pytest.approx(known[stage], abs=2e-6) if stage in known else 0.6 < first < 0.8
    assert (folder / "final" / "value_head.safetensors").is_file() == (stage == "RM")


@pytest.mark.parametrize("stage", ["PPO", "GRPO"])
def test_stages_with_rollouts_take_a_pissa_adapter(place: Path, tmp_path: Path, stage: str):
    choice = {"class_path": "LoRA", "init_args": CASES["pissa"]["options"]}
    changes = {f"{INIT}.tuning": choice, "lora": place / "base", "trainer__max_steps": 2}
    folder = roll(place, stage, str(tmp_path / "run"), **changes)
    assert len([row for row in log_rows(folder) if "loss" in row]) == 2


@pytest.mark.parametrize("stage", ["DPO", "KTO"])
def test_defect_27_dropout_of_an_adapter_acts_in_stages_with_a_reference(place: Path, tmp_path: Path, stage: str):
    found = []
    for dropout in (0.0, 0.5):
        choice = {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": dropout}}
        changes = {f"{INIT}.tuning": choice, "lora": place / "base", "trainer__max_steps": 2}
        found.append(losses(judge(tmp_path, stage, f"run{dropout}", **changes)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)  # B is zero
    assert found[0][1] != pytest.approx(found[1][1], rel=1e-6)


def test_defect_7_and_8_a_copy_as_reference_has_the_same_new_tokens(place: Path, tmp_path: Path):
    backbone = {"path": str(place / "base"), **TOKENS}
    for tuning in ({"class_path": "Full"}, {"class_path": "LoRA", "init_args": {"rank": 2}}):
        changes = {f"{INIT}.tuning": tuning, f"{INIT}.backbone": backbone, f"{INIT}.reference": {"kind": "copy"}}
        run_name = str(tuning["class_path"])
        folder = judge(tmp_path, "DPO", run_name, lora=place / "base", trainer__max_steps=1, **changes)
        assert losses(folder)[0] == pytest.approx(0.693147, abs=1e-6)
