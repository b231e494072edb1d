"""The quickstarts through the CLI: a few steps of each in every test run, the whole proof when it is asked for."""

import json
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.ranks import fork_command

SFT, PT = "configs/sft/quickstart.yaml", "configs/pt/quickstart.yaml"
SEEDS = (42, 1, 2)


def lf_lightning(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, from the root of the repository; on one thread, as conftest sets it."""
    with tempfile.TemporaryDirectory() as folder:
        done = fork_command(arguments, ROOT, Path(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def clock() -> tuple[float, float]:
    """Wall and processor seconds of the commands that were run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]


def short(folder: Path) -> list[str]:
    """Options that make a run of a few steps on a few rows."""
    options = {"max_steps": 8, "log_every_n_steps": 1, "val_check_interval": 8, "default_root_dir": folder}
    return [f"--trainer.{name}={value}" for name, value in options.items()] + [f"--data.cache_dir={folder / 'cache'}"]


def opened(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer as plain transformers opens them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_few_steps_of_the_sft_quickstart_and_its_score_by_predict(tmp_path: Path):
    run = ["--config", SFT, *short(tmp_path), "--data.max_samples=64"]
    said = lf_lightning("fit", *run).stdout
    losses = [row["loss"] for row in log(tmp_path) if "loss" in row]
    assert len(losses) == 8
    assert losses[-1] < 0.9 * losses[0]
    for words in ("before", "right answer", str(tmp_path / "final"), "next, try: lf-lightning predict"):
        assert words in said
    lf_lightning("predict", *run, "--ckpt_path", str(tmp_path / "final"))
    score = lf_lightning("score", str(tmp_path / "generated_predictions.jsonl"), "--at-least", "0").stdout
    assert score == "exact match: " + said.split("exact match after training: ")[1].splitlines()[0] + "\n"
    assert "of 64)" in score
    model, tokenizer = opened(tmp_path / "final")
    prompt = [{"role": "user", "content": "Reverse\nlamp"}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "<|im_start|>user\nReverse\nlamp<|im_end|>\n<|im_start|>assistant\n"
    assert model.config.rope_parameters["rope_theta"] == 200.0
    assert torch.isfinite(model(ids).logits).all()


def test_a_few_steps_of_the_pt_quickstart(tmp_path: Path):
    lf_lightning("fit", "--config", PT, *short(tmp_path), "--data.max_samples=40")
    rows = log(tmp_path)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert [row["eval_perplexity"] for row in rows if "eval_perplexity" in row][-1] < 259
    model, tokenizer = opened(tmp_path / "final")
    assert torch.isfinite(model(tokenizer("One sunny day", return_tensors="pt")["input_ids"]).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_sft_quickstart_answers_nine_of_ten_held_out_prompts(seed: int, tmp_path: Path):
    start = clock()
    run = ["--config", SFT, f"--seed_everything={seed}", f"--trainer.default_root_dir={tmp_path}"]
    lf_lightning("fit", *run)
    wall, busy = (after - before for before, after in zip(start, clock(), strict=True))
    lf_lightning("predict", *run, "--ckpt_path", str(tmp_path / "final"))
    score = lf_lightning("score", str(tmp_path / "generated_predictions.jsonl"), "--at-least", "0.9")
    print(f"\n| sft | {seed} | {score.stdout.strip().removeprefix('exact match: ')} | {wall:.0f} | {busy:.0f} |")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_pt_quickstart_reads_held_out_stories_at_a_perplexity_below_the_stated_one(seed: int, tmp_path: Path):
    start = clock()
    options = [f"--seed_everything={seed}", f"--trainer.default_root_dir={tmp_path}"]
    lf_lightning("fit", "--config", PT, *options)
    wall, busy = (after - before for before, after in zip(start, clock(), strict=True))
    perplexity = [row["eval_perplexity"] for row in log(tmp_path) if "eval_perplexity" in row][-1]
    assert perplexity < 1.3  # as the YAML says
    print(f"\n| pt | {seed} | {perplexity:.3f} | {wall:.0f} | {busy:.0f} |")


# ---------------------------------------------------------------------- rm, dpo and kto

ACCURACY = {"rm": "eval_accuracy", "dpo": "eval_rewards/accuracies", "kto": "eval_rewards/accuracies"}


def accuracy(folder: Path, stage: str) -> float:
    """What `validate`, or the last validation of `fit`, measured."""
    value: float = json.loads((folder / "all_results.json").read_text())[ACCURACY[stage]]
    return value


@pytest.mark.parametrize("stage", ACCURACY)
def test_the_first_steps_of_a_quickstart_that_judges_bring_it_from_below_six_of_ten_to_above_nine(
    stage: str, tmp_path: Path
):
    steps = {"max_steps": 40, "log_every_n_steps": 1, "val_check_interval": 40, "default_root_dir": tmp_path}
    options = [f"--trainer.{name}={value}" for name, value in steps.items()] + ["--data.cache_dir=null"]
    lf_lightning("fit", "--config", f"configs/{stage}/quickstart.yaml", *options)
    rows = log(tmp_path)
    first = next(row for row in rows if "loss" in row)  # of the untrained model, on the first 32 rows
    assert first[ACCURACY[stage].removeprefix("eval_")] < 0.6
    assert accuracy(tmp_path, stage) > 0.9
    model, tokenizer = opened(tmp_path / "final")
    assert torch.isfinite(model(tokenizer("One", return_tensors="pt")["input_ids"]).logits).all()
    assert (tmp_path / "final" / "value_head.safetensors").is_file() == (stage == "rm")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", ACCURACY)
def test_a_quickstart_that_judges_rises_from_below_six_of_ten_to_above_nine(stage: str, seed: int, tmp_path: Path):
    options = ["--config", f"configs/{stage}/quickstart.yaml", f"--seed_everything={seed}"]
    lf_lightning("validate", *options, f"--trainer.default_root_dir={tmp_path / 'before'}")
    before = accuracy(tmp_path / "before", stage)
    start = clock()
    lf_lightning("fit", *options, f"--trainer.default_root_dir={tmp_path / 'run'}")
    wall, busy = (after - before_ for before_, after in zip(start, clock(), strict=True))
    after = accuracy(tmp_path / "run", stage)
    again = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--ckpt_path", str(tmp_path / "run" / "final")]
    lf_lightning("validate", *options, *again)
    assert accuracy(tmp_path / "run", stage) == pytest.approx(after, abs=1e-9)
    assert before < 0.6
    assert after > 0.9
    assert busy < 180  # processor seconds: the wall clock is that of whoever else computes
    print(f"\n| {stage} | {seed} | {before:.3f} -> {after:.3f} | {wall:.0f} | {busy:.0f} |")
