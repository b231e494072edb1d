import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lf_lightning.__main__ import main
from lf_lightning.models import OFT, Freeze, Full, LoRA, load_backbone
from lf_lightning.types import BackboneSpec
from tests.conftest import ROOT

TRAINERS = sorted((ROOT / "configs" / "trainer").glob("*.yaml"))
CONFIGS = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*TRAINERS})
TUNINGS = {"Full": Full, "Freeze": Freeze, "LoRA": LoRA, "OFT": OFT}

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
QWEN3_8B = {
    **QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
REAL: dict[str, tuple[dict[str, Any], int, int]] = {  # config, parameters of the model, parameters that train
    "sft/qwen3-0.6b_lora": (QWEN3, 596_049_920, 10_092_544),
    "sft/qwen3-0.6b_loraplus": (QWEN3, 596_049_920, 10_092_544),
    "sft/qwen3-0.6b_galore": (QWEN3, 596_049_920, 596_049_920),
    "sft/qwen3-0.6b_badam": (QWEN3, 596_049_920, 596_049_920),
    "sft/qwen3-0.6b_muon": (QWEN3, 596_049_920, 596_049_920),
    "sft/qwen3-0.6b_full_bf16": (QWEN3, 596_049_920, 596_049_920),
    "sft/qwen3-8b_qlora": (QWEN3_8B, 8_190_735_360, 43_646_976),
    "sft/qwen3-0.6b_dora": (QWEN3, 596_049_920, 10_436_608),
    "sft/qwen3-0.6b_pissa": (QWEN3, 596_049_920, 10_092_544),
    "sft/qwen3-0.6b_oft": (QWEN3, 596_049_920, 4_444_160),
    "sft/qwen3-0.6b_freeze": (QWEN3, 596_049_920, 62_923_776),
    "pt/qwen3-0.6b_full": (QWEN3, 596_049_920, 596_049_920),
    "pt/qwen3-0.6b_streaming": (QWEN3, 596_049_920, 596_049_920),
    "rm/qwen3-0.6b_lora": (QWEN3, 596_049_920, 10_092_544),
    "dpo/qwen3-0.6b_lora": (QWEN3, 596_049_920, 10_092_544),
    "kto/qwen3-0.6b_lora": (QWEN3, 596_049_920, 10_092_544),
    "ppo/qwen3-0.6b_lora": (QWEN3, 596_049_920, 10_092_544),
    "ppo/qwen3-0.6b_http": (QWEN3, 596_049_920, 10_092_544),
    "grpo/qwen3-0.6b_lora": (QWEN3, 596_049_920, 10_092_544),
    "sft/llama3-8b_full_fsdp2": (LLAMA3, 8_030_261_248, 8_030_261_248),
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def leaves(tree: Any, place: str = "") -> dict[str, Any]:
    """Dotted name -> value; class paths aside, which are given short and printed in full."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {place: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{place}.{key}") if key != "class_path" else {}
    return found


def test_the_configs_are_those_that_the_readme_promises():
    names = {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in CONFIGS}
    assert names >= {"sft/quickstart", "pt/quickstart", *REAL}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_gate_parses_the_config_and_keeps_its_values(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(path), "--print_config"])
    assert stopped.value.code == 0
    resolved = leaves(yaml.safe_load(capsys.readouterr().out))
    asked = leaves(read(path))
    asked.pop(".trainer.callbacks", None)  # class paths again
    assert {name: resolved.get(name) for name in asked} == asked


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_config_is_short_and_tells_how_to_run_it(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"lf-lightning fit --config configs/{path.parent.name}/{path.name}" in text


@pytest.mark.parametrize("path", TRAINERS, ids=lambda path: path.stem)
def test_a_trainer_is_given_after_any_stage_and_changes_nothing_else(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    if path.stem == "deepspeed" and find_spec("deepspeed") is None:  # its import prints
        pytest.skip("the package deepspeed is not installed")
    monkeypatch.chdir(ROOT)
    text = path.read_text(encoding="utf-8")
    (line,) = re.findall(r"lf-lightning fit (--config \S+ --config \S+)", text)
    stage = str(line).split()[1]
    assert line == f"--config {stage} --config configs/trainer/{path.name}"
    resolved = []
    for more in ([], ["--config", str(path)]):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", stage, *more, "--print_config"])
        assert stopped.value.code == 0
        resolved.append(leaves(yaml.safe_load(capsys.readouterr().out)))
    plain, merged = resolved
    asked = leaves(read(path))
    assert {name: merged.get(name) for name in asked} == asked
    assert asked[".trainer.num_nodes"] == 1
    assert {name for name in plain if merged.get(name, plain[name]) != plain[name]} <= asked.keys()
    assert {name: merged[name] for name in plain if name[:9] != ".trainer."} == {
        name: value for name, value in plain.items() if name[:9] != ".trainer."
    }


@pytest.mark.parametrize("name", REAL)
def test_the_model_of_a_real_recipe_has_the_parameters_of_the_real_model(name: str, tmp_path: Path):
    config, num_parameters, num_trained = REAL[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read(ROOT / "configs" / f"{name}.yaml")["model"]["init_args"]
    spec = BackboneSpec(**{**model["backbone"], "path": str(tmp_path)})
    tuning = TUNINGS[model["tuning"]["class_path"]](**model["tuning"].get("init_args", {}))
    backbone = load_backbone(spec, tuning, vocab_size=config["vocab_size"], seed=0, device=torch.device("meta"))
    trained, everything = backbone.num_parameters()
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}
    assert trained == num_trained
    assert everything - (trained if backbone.is_adapter else 0) == num_parameters


@pytest.mark.parametrize("name", REAL)
def test_the_trainable_weights_of_a_real_recipe_are_float32(name: str, tmp_path: Path):
    config = REAL[name][0] | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = read(ROOT / "configs" / f"{name}.yaml")["model"]["init_args"]
    spec = BackboneSpec(**{**model["backbone"], "path": str(tmp_path)})
    tuning = TUNINGS[model["tuning"]["class_path"]](**model["tuning"].get("init_args", {}))
    backbone = load_backbone(spec, tuning, vocab_size=config["vocab_size"], seed=0, device=torch.device("meta"))
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in backbone.parameters()}
    assert (True, torch.float32) in kinds
    assert (True, torch.bfloat16) not in kinds
