"""The main job on real rows, from the command line, with a real model: what comes out opens anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lf_lightning import cli
from tests.cli.runs import lightning, log_rows, losses


class KeepLogits(Callback):
    """Keep what the trained model says of some words, before the run lets go of it."""

    words = torch.arange(2 * 40).reshape(2, 40) * 37 % 4096
    logits: torch.Tensor

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        model = pl_module.backbone
        with torch.no_grad(), model.padded_attention():
            model.eval()
            self.logits = model.causal_lm(input_ids=self.words, use_cache=False).logits.clone()
            model.train()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> KeepLogits:
    """A callback that every gate adds to its trainer."""
    callback = KeepLogits()
    plain = cli.make_gate

    def with_callback(*arguments: Any, **options: Any) -> Any:
        gate = plain(*arguments, **options)
        gate.trainer.callbacks.append(callback)
        return gate

    monkeypatch.setattr(cli, "make_gate", with_callback)
    return callback


@pytest.fixture
def place(here: Path, shared: Path, parity: Path) -> Path:
    """A working folder with the real rows and the real model."""
    shutil.copytree(parity / "model", here / "model")
    (here / "data").symlink_to(shared / "data")
    return here


def settings(stage: str, datasets: list[str], **changes: Any) -> dict[str, Any]:
    """Nine steps of four units, which visit the same few rows three times."""
    data = {"datasets": datasets, "dataset_dir": "data", "max_length": 512, "max_samples": 12, "global_batch_size": 4}
    tuning = changes.pop("tuning", {"class_path": "Full"})
    return {
        "seed_everything": 1,
        "trainer": {
            "max_steps": 9,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "default_root_dir": "run",
        },
        "checkpoint": {"every_n_steps": None},
        "model": {
            "class_path": stage,
            "init_args": {
                "backbone": {"path": "model"},
                "tuning": tuning,
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-3}},
                "schedule": {"kind": "constant"},
                "generation": {"max_new_tokens": 16, "batch_size": 8},
            },
        },
        "data": {**data, "cache_dir": None, **changes},
    }


LORA = {"class_path": "LoRA", "init_args": {"rank": 8}}


def opened(run: Path) -> torch.nn.Module:
    """What plain transformers, or peft on top of it, makes of final/."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    if (run / "final" / "adapter_config.json").is_file():
        return AutoPeftModelForCausalLM.from_pretrained(run / "final").eval()
    return AutoModelForCausalLM.from_pretrained(run / "final").eval()


def assert_opens_to(run: Path, kept: KeepLogits) -> None:
    with torch.no_grad():
        got = opened(run)(input_ids=kept.words).logits
    assert (got - kept.logits).abs().max() <= 1e-5
    base = run.parent / "model"
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        before = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=kept.words).logits
    assert (before - kept.logits).abs().max() > 1e-2, "nothing was learned"


def predict(place: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    (place / "prompts.json").write_text(json.dumps(rows))
    config["data"]["predict_datasets"] = [{"path": "prompts.json"}]
    assert lightning("predict", place, config, "--ckpt_path", "run/final") == 0
    return [json.loads(line) for line in (place / "run" / "generated_predictions.jsonl").read_text().splitlines()]


def fell(run: Path) -> bool:
    """Whether the loss of the last visit of the rows lies below that of the first."""
    values = losses(run)
    assert len(values) == 9
    return sum(values[-3:]) < sum(values[:3])


@pytest.mark.parametrize("tuning", [LORA, {"class_path": "Full"}], ids=["lora", "full"])
def test_sft_on_alpaca_and_identity(tuning: dict[str, Any], place: Path, kept: KeepLogits):
    config = settings("SFT", ["identity", "alpaca_en_demo"], tuning=tuning, max_samples=6)
    assert lightning("fit", place, config) == 0
    assert fell(place / "run")
    assert_opens_to(place / "run", kept)
    rows = json.loads((place / "data" / "alpaca_en_demo.json").read_text())[:5]
    answers = predict(place, rows, config)
    assert [answer["label"] for answer in answers] == [row["output"] for row in rows]
    for answer in answers:
        prompt = opened_tokenizer(place / "run")(answer["prompt"], return_tensors="pt", add_special_tokens=False)
        tokens = opened(place / "run").generate(**prompt, max_new_tokens=16, do_sample=False)
        new = tokens[0, prompt["input_ids"].shape[1] :]
        assert opened_tokenizer(place / "run").decode(new, skip_special_tokens=True) == answer["predict"]


def opened_tokenizer(run: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run / "final")


def test_sft_on_conversations_with_tools_skips_and_names_what_it_cannot_use(
    place: Path, kept: KeepLogits, capsys: pytest.CaptureFixture[str]
):
    config = settings("SFT", ["glaive_toolcall_en_demo"], invalid_rows="skip", max_length=1024)
    assert lightning("fit", place, config) == 0
    summary = next(
        line for line in capsys.readouterr().err.splitlines() if line.startswith("glaive_toolcall_en_demo: ")
    )
    assert summary.startswith("glaive_toolcall_en_demo: 12 rows, ")
    assert fell(place / "run")
    assert_opens_to(place / "run", kept)


@pytest.mark.parametrize(("packing", "max_samples"), [("blocks", 4), ("none", 12)])
def test_pt_on_c4(packing: str, max_samples: int, place: Path, kept: KeepLogits):
    config = settings("PT", ["c4_demo"], packing=packing, template="default", max_length=256, max_samples=max_samples)
    assert lightning("fit", place, config) == 0
    assert fell(place / "run")
    assert log_rows(place / "run")[-1]["total_tokens"] <= 9 * 4 * 256
    assert_opens_to(place / "run", kept)


def test_a_model_trained_by_pt_goes_on_with_sft(place: Path, kept: KeepLogits):
    assert (
        lightning("fit", place, settings("PT", ["c4_demo"], packing="blocks", template="default", max_length=256)) == 0
    )
    shutil.copytree(place / "run" / "final", place / "pretrained")
    config = settings("SFT", ["identity"], template="chatml")
    config["model"]["init_args"]["backbone"]["path"] = "pretrained"
    config["trainer"]["default_root_dir"] = "tuned"
    assert lightning("fit", place, config) == 0
    assert fell(place / "tuned")
    assert_opens_to(place / "tuned", kept)
