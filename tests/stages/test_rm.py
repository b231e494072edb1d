"""The RM stage: each option changes the result, and its scores are those that plain transformers computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lf_lightning import LoRA
from lf_lightning.__main__ import main
from lf_lightning.models import Full, ValueHeadSpec
from tests.cli.runs import INIT, build_model, lightning, log_rows, losses, weights
from tests.stages.judgement_runs import PAIRS, dataset, first_losses, fit, judged, python_fit

Runs = Callable[..., list[float]]


def init(**options: Any) -> dict[str, Any]:
    return {f"{INIT}.{name}": value for name, value in options.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The losses of two steps with these values; a run is made once."""
    found: dict[str, list[float]] = {}

    def run(**changes: Any) -> list[float]:
        key = repr(sorted(changes.items()))
        if key not in found:
            found[key] = first_losses(tmp_path_factory.mktemp("run"), "RM", **changes)
        return found[key]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model")


@pytest.mark.parametrize(
    "changed",
    [
        {"margin": True},
        init(centering=0.5),
        init(value_head={"dropout": 0.3}),
        {f"{INIT}.backbone.architecture.attention_dropout": 0.5},
        {"seed_everything": 8},
    ],
    ids=str,
)
def test_an_option_changes_what_is_learned(changed: dict[str, Any], runs: Runs):
    assert runs(**changed)[1] != pytest.approx(runs()[1], rel=1e-5)


def test_the_loss_is_that_of_the_logged_margins(tmp_path: Path):
    run = fit(tmp_path, "RM", data__global_batch_size=1, data__shuffle=False)
    for row in log_rows(run):
        margin = row["scores/chosen"] - row["scores/rejected"]
        assert row["margin"] == pytest.approx(margin, abs=1e-6)
        assert row["loss"] == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-6)
        assert row["accuracy"] == float(margin > 0)


def test_margin_and_centering_enter_the_loss_as_the_formula_says(tmp_path: Path):
    options = {"data__global_batch_size": 1, "data__shuffle": False, "margin": True}
    row = log_rows(fit(tmp_path, "RM", **options, **init(centering=0.5)))[1]  # the second row's margin is 0.5
    chosen, rejected = row["scores/chosen"], row["scores/rejected"]
    assert row["reward"] == pytest.approx(math.log1p(math.exp(0.5 - chosen + rejected)), abs=1e-6)
    assert row["centering"] == pytest.approx((chosen + rejected) ** 2, abs=1e-6)
    assert row["loss"] == pytest.approx(row["reward"] + 0.5 * row["centering"], abs=1e-6)


def test_the_output_layer_and_what_is_frozen_stay(tmp_path: Path, model: Path):
    before = load_file(model / "model.safetensors")
    freeze = init(tuning={"class_path": "Freeze", "init_args": {"num_layers": 1}})
    after = load_file(fit(tmp_path, "RM", lora=model, **freeze) / "final" / "model.safetensors")
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)


# ---------------------------------------------------------------------- scores


def scores(run: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (run / "generated_predictions.jsonl").read_text().splitlines()]
    return [[row["chosen"], row["rejected"]] for row in rows]


def predict(folder: Path, path: str = "final", **changes: Any) -> list[list[float]]:
    """Scores of the pairs, in the order of their file."""
    settings = judged(folder, "RM", data__predict_datasets=dataset(folder, "RM"), **changes)
    assert lightning("predict", folder, settings, "--ckpt_path", str(folder / "run" / path)) == 0
    return scores(folder / "run")


def inputs(folder: Path) -> list[list[list[int]]]:
    """The tokens of both conversations of each pair, as the saved tokenizer's own template writes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row[side]}],
                return_dict=False,
            )
            for side in ("chosen", "rejected")
        ]
        for row in PAIRS
    ]


@torch.no_grad()
def plain_scores(folder: Path) -> list[list[float]]:
    """The head's value at the last token, from what transformers or peft opens."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    kind = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    causal_lm, head = kind.from_pretrained(folder).eval(), load_file(folder / "value_head.safetensors")
    assert head.keys() == {"v_head.summary.weight", "v_head.summary.bias"}

    def score(ids: list[int]) -> float:
        hidden = causal_lm(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
        return float(hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"][0])

    return [[score(ids) for ids in pair] for pair in inputs(folder)]


def close(got: list[list[float]], want: list[list[float]]) -> bool:
    return bool((torch.tensor(got) - torch.tensor(want)).abs().max() <= 1e-5)


TIED = {f"{INIT}.backbone.architecture.tie_word_embeddings": True}


@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_predicted_scores_are_those_of_plain_transformers(kind: str, tmp_path: Path, model: Path):
    changes: dict[str, Any] = {"tied": TIED, "lora": {"lora": model}, "full": {}}[kind]
    fit(tmp_path, "RM", **changes)
    got = predict(tmp_path, **changes)
    assert len(got) == 12
    assert close(got, plain_scores(tmp_path / "run" / "final"))
    for layout in ({"data__layout": "padded", "data__eval_micro_batch_size": 5}, {"data__share_prompt": False}):
        assert close(predict(tmp_path, **layout, **changes), got)
    assert not close(predict(tmp_path, "checkpoints/step-00000002", **changes), got)
    assert all(value == float(torch.tensor(value)) for pair in got for value in pair)  # every bit of the float32


@pytest.mark.parametrize("kind", ["full", "tied", "lora", "pad is eos"])
def test_a_folder_for_sequence_classification_scores_as_predict_does(kind: str, tmp_path: Path, model: Path):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    changes = init(value_head={"save_as": "sequence_classification"})
    if kind in ("lora", "pad is eos"):
        own = build_model(tmp_path / "own", pad_token_id=0)
        tokenizer = AutoTokenizer.from_pretrained(own)
        if kind == "pad is eos":
            tokenizer.pad_token = "<|im_end|>"
        tokenizer.save_pretrained(own)
        changes |= {"lora": own}
        changes |= {} if kind == "lora" else init(tuning={"class_path": "Full"})
    changes |= TIED if kind == "tied" else {}
    folder = fit(tmp_path, "RM", **changes) / "final"
    want = predict(tmp_path, **changes)
    opens = AutoPeftModelForSequenceClassification if kind == "lora" else AutoModelForSequenceClassification
    classifier = opens.from_pretrained(folder, num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [tokenizer.decode(ids) for pair in inputs(folder) for ids in pair]
    for side in ("right", "left"):
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, add_special_tokens=False)
        assert (batch["attention_mask"] == 0).any()
        with torch.no_grad():
            got = classifier(**batch).logits.view(-1, 2)
        assert close(got.tolist(), want)


def test_a_reward_model_goes_on_from_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    full = init(tuning={"class_path": "Full"})
    fit(tmp_path, "RM")
    want = predict(tmp_path)
    capsys.readouterr()
    base = tmp_path / "run" / "final"
    for init_of_head in ("auto", "load"):
        changes = {**full, **init(value_head={"init": init_of_head}), "data__predict_datasets": dataset(tmp_path, "RM")}
        assert lightning("predict", tmp_path, judged(tmp_path, "RM", "next", lora=base, **changes)) == 0
        assert scores(tmp_path / "next") == want
        assert "value head: new" not in capsys.readouterr().err
    changes |= init(value_head={"init": "new"})
    assert lightning("predict", tmp_path, judged(tmp_path, "RM", "next", lora=base, **changes)) == 0
    assert not close(scores(tmp_path / "next"), want)


def test_a_folder_without_a_head_is_refused(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]):
    settings = judged(tmp_path, "RM", data__predict_datasets=dataset(tmp_path, "RM"))
    assert lightning("predict", tmp_path, settings, "--ckpt_path", str(model)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"reward model: {model} must hold value_head.safetensors or value_head.bin, got neither" in last


def test_the_head_that_llamafactory_has_written_is_loaded(tmp_path: Path, parity: Path):
    changes = {"lora": parity / "model-vh", **init(tuning={"class_path": "Full"}, value_head={"init": "load"})}
    settings = judged(tmp_path, "RM", data__predict_datasets=dataset(tmp_path, "RM"), **changes)
    assert lightning("predict", tmp_path, settings) == 0
    assert close(scores(tmp_path / "run"), plain_scores(parity / "model-vh"))


# ---------------------------------------------------------------------- from plain Python


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_from_python_is_the_command_lines_bit_for_bit(kind: str, tmp_path: Path, model: Path):
    base = model if kind == "lora" else None
    run = fit(tmp_path, "RM", lora=base, **init(centering=0.1, value_head={"dropout": 0.2}))
    tuning = LoRA(rank=2) if base else Full()
    python_fit(tmp_path, "RM", tuning, lora=base, centering=0.1, value_head=ValueHeadSpec(dropout=0.2))
    assert weights(tmp_path / "python" / "final") == weights(run / "final")
    assert losses(tmp_path / "python") == losses(run)
    again = ["--config", str(tmp_path / "python/config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")]
    assert main(["fit", *again]) == 0
    assert weights(tmp_path / "again" / "final") == weights(run / "final")
