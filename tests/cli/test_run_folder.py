"""A run is one folder: what lies in it, how it begins again, and how it goes on."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from safetensors import safe_open

from lf_lightning import cli
from lf_lightning.__main__ import main
from tests.cli.runs import INIT, ROWS, config, lightning, log_rows, losses, merged, steps, weights, write

STEP2, STEP4 = "checkpoints/step-00000002", "checkpoints/step-00000004"
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.fixture
def run(here: Path, full_run: Path) -> Path:
    """A copy of the finished run, in a working folder with its rows."""
    (here / "rows.json").write_text(json.dumps(ROWS))
    shutil.copytree(full_run, here / "run")
    return here / "run"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def pixels(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


# ---------------------------------------------------------------------- layout


def test_the_folder_holds_what_the_design_says(full_run: Path):
    top = {path.name for path in full_run.iterdir()}
    assert top == {
        "config.yaml",
        "trainer_log.jsonl",
        "metrics.csv",
        "all_results.json",
        "training_loss.png",
        "checkpoints",
        "final",
    }
    assert steps(full_run) == ["step-00000002", "step-00000004"]
    checkpoint = MODEL_FILES | TOKENIZER_FILES | {"manifest.json", "trainer_state/state.ckpt"}
    assert files(full_run / STEP2) == checkpoint
    assert files(full_run / "final") == MODEL_FILES | TOKENIZER_FILES | {"manifest.json", "README.md"}
    assert pixels(full_run / "training_loss.png") == (800, 500)


def test_the_log_has_the_fields_that_tools_of_llamafactory_read(full_run: Path):
    rows = log_rows(full_run)
    assert [row["current_steps"] for row in rows] == [1, 2, 3, 4]
    assert [row["total_steps"] for row in rows] == [4, 4, 4, 4]
    assert [row["percentage"] for row in rows] == [25.0, 50.0, 75.0, 100.0]
    assert [row["epoch"] for row in rows] == [0.3333, 0.6667, 1.0, 1.3333]  # 12 rows in steps of 4
    assert [row["lr"] for row in rows] == [0.01] * 4
    assert rows[-1]["remaining_time"] == "0:00:00"
    for row in rows:
        assert row["perplexity"] == pytest.approx(2.718281828459045 ** row["loss"])
        assert 0.0 <= row["accuracy"] <= 1.0
        assert row["throughput"] > 0
        assert row["grad_norm"] > 0
        assert row["elapsed_time"].count(":") == 2
    tokens = [row["total_tokens"] for row in rows]
    assert tokens == sorted(set(tokens))
    assert rows[0]["loss"] > rows[-1]["loss"]


def test_the_csv_holds_the_values_of_the_log(full_run: Path):
    with (full_run / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table] == [1, 2, 3, 4]
    assert [float(row["train/loss"]) for row in table] == losses(full_run)
    assert [float(row["train/learning_rate"]) for row in table] == [0.01] * 4
    assert [float(row["train/grad_norm"]) for row in table] == [row["grad_norm"] for row in log_rows(full_run)]


def test_the_results_hold_the_last_values(full_run: Path):
    results = json.loads((full_run / "all_results.json").read_text())
    last = log_rows(full_run)[-1]
    assert results["train_loss"] == last["loss"]
    assert (results["steps"], results["total_tokens"]) == (4, last["total_tokens"])


@pytest.mark.parametrize("folder", [STEP2, STEP4, "final"])
def test_the_manifest_gives_size_and_hash_of_every_other_file(folder: str, full_run: Path):
    manifest = json.loads((full_run / folder / "manifest.json").read_text())
    assert manifest["files"].keys() == files(full_run / folder) - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (full_run / folder / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_manifest_is_written_last(full_run: Path):
    for folder in (STEP2, STEP4, "final"):
        times = {name: (full_run / folder / name).stat().st_mtime_ns for name in files(full_run / folder)}
        assert max(times, key=lambda name: times[name]) == "manifest.json"


def test_the_model_card_names_data_steps_and_configuration(full_run: Path):
    card = (full_run / "final" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {"library_name": "transformers", "tags": ["lf-lightning", "text-generation"]}
    assert "Trained by lf_lightning's SFT stage." in body
    assert "- optimizer steps: 4\n" in body
    assert "rows" in body
    shown = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert shown["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01


def test_the_card_of_an_adapter_names_its_base(lora_run: Path, model: Path):
    head = yaml.safe_load((lora_run / "final" / "README.md").read_text().split("---\n")[1])
    assert head["library_name"] == "peft"
    assert head["base_model"] == str(model)


def test_state_is_tensors_and_plain_python(full_run: Path):
    state = torch.load(full_run / STEP2 / "trainer_state/state.ckpt", weights_only=True)
    assert state["global_step"] == 2
    assert state["state_dict"] == {}  # the weights lie beside it


def test_a_checkpoint_of_lora_holds_no_frozen_weights(lora_run: Path):
    for folder in (STEP2, STEP4, "final"):
        assert [path.name for path in (lora_run / folder).glob("*.safetensors")] == ["adapter_model.safetensors"]
        with safe_open(lora_run / folder / "adapter_model.safetensors", "pt") as file:
            assert {name.split(".")[-2] for name in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118
    state = torch.load(lora_run / STEP2 / "trainer_state/state.ckpt", weights_only=True)
    moments = state["optimizer_states"][0]["state"]
    trained = sum(part["exp_avg"].numel() for part in moments.values())
    assert trained == 992  # of 13,712: two layers x seven matrices at rank 2
    assert (lora_run / STEP2 / "trainer_state/state.ckpt").stat().st_size < 13712 * 4


def test_the_tokenizer_is_saved_with_the_template_that_trained(here: Path):
    from transformers import AutoTokenizer

    assert lightning("fit", here, config(data__template="default")) == 0
    for folder in (STEP2, "final"):
        tokenizer = AutoTokenizer.from_pretrained(here / "run" / folder)
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        assert text == "Human: Hi<|im_end|>\nAssistant:"


# ---------------------------------------------------------------------- config.yaml


def test_the_written_configuration_gives_the_same_run_again(run: Path, here: Path, full_run: Path):
    arguments = ["--config", str(run / "config.yaml"), "--trainer.default_root_dir", str(here / "again")]
    assert main(["fit", *arguments]) == 0
    assert losses(here / "again") == losses(full_run)
    assert weights(here / "again" / "final") == weights(full_run / "final")


def test_the_written_configuration_holds_defaults_and_no_way_to_overwrite(here: Path):
    for _ in range(2):
        assert lightning("fit", here, config(checkpoint__every_n_steps=3), "--overwrite", "true") == 0
    found = yaml.safe_load((here / "run/config.yaml").read_text())
    assert found["data"]["packing"] == "none"
    assert found["model"]["init_args"]["optimizer"]["init_args"]["eps"] == 1e-8
    assert not found.get("overwrite")
    assert main(["fit", "--config", "run/config.yaml"]) == 2  # it does not mix with its own run
    assert steps(here / "run") == ["step-00000003"]


def test_a_resume_keeps_the_configuration_that_led_to_the_checkpoint(run: Path, here: Path):
    before = (run / "config.yaml").read_text()
    assert lightning("fit", here, config(trainer__max_steps=6), "--ckpt_path", "last") == 0
    assert (run / "config.4.yaml").read_text() == before
    found = yaml.safe_load((run / "config.yaml").read_text())
    assert found["trainer"]["max_steps"] == 6
    assert found.get("ckpt_path") is None


# ---------------------------------------------------------------------- beginning again


def test_a_fresh_run_does_not_mix_with_checkpoints(run: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    before = {name: (run / name).stat().st_mtime_ns for name in files(run)}
    assert lightning("fit", here, config()) == 2
    assert "--ckpt_path last" in capsys.readouterr().err
    assert {name: (run / name).stat().st_mtime_ns for name in files(run)} == before


def test_overwrite_moves_the_old_files_aside_and_removes_the_checkpoints(run: Path, here: Path):
    old = {name: (run / name).read_bytes() for name in ("config.yaml", "trainer_log.jsonl", "metrics.csv")}
    old_weights = weights(run / "final")
    settings = config(trainer__max_steps=3, checkpoint__every_n_steps=3, seed_everything=1)
    assert lightning("fit", here, settings, "--overwrite", "true") == 0
    assert steps(run) == ["step-00000003"]
    assert {name: (run / "previous-1" / name).read_bytes() for name in old} == old
    assert weights(run / "previous-1" / "final") == old_weights
    assert (run / "previous-1" / "training_loss.png").is_file()
    assert len(losses(run)) == 3


def test_a_run_without_checkpoints_is_moved_aside_unasked(here: Path):
    for seed in (1, 2, 3):
        assert lightning("fit", here, config(checkpoint__every_n_steps=None, seed_everything=seed)) == 0
    run = here / "run"
    assert sorted(path.name for path in run.glob("previous-*")) == ["previous-1", "previous-2"]
    for number, seed in ((1, 1), (2, 2)):
        assert yaml.safe_load((run / f"previous-{number}" / "config.yaml").read_text())["seed_everything"] == seed
    assert yaml.safe_load((run / "config.yaml").read_text())["seed_everything"] == 3
    assert len(log_rows(run)) == 4


def test_files_that_are_no_part_of_a_run_stay(here: Path):
    (here / "run").mkdir()
    (here / "run" / "notes.txt").write_text("mine")
    assert lightning("fit", here, config()) == 0
    assert (here / "run" / "notes.txt").read_text() == "mine"


def test_last_starts_afresh_where_there_is_none_and_says_so(here: Path, capsys: pytest.CaptureFixture[str]):
    assert lightning("fit", here, config(), "--ckpt_path", "last") == 0
    assert "no complete checkpoint in run: starting afresh\n" in capsys.readouterr().err
    assert steps(here / "run") == ["step-00000002", "step-00000004"]


def test_what_a_kill_has_left_unfinished_goes(here: Path, full_run: Path):
    run = here / "run"
    shutil.copytree(full_run / STEP2, run / "checkpoints" / ".step-00000002.tmp")
    shutil.copytree(full_run / STEP2, run / "checkpoints" / "step-00000003")
    (run / "checkpoints" / "step-00000003" / "manifest.json").unlink()
    shutil.copytree(full_run / "final", run / ".final.tmp")
    shutil.copytree(full_run / "final", run / ".final.old")
    assert lightning("fit", here, config(checkpoint__every_n_steps=4)) == 0
    assert steps(run) == ["step-00000004"]
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]


def test_on_a_resume_too(run: Path, here: Path):
    (run / STEP4 / "manifest.json").unlink()
    shutil.copytree(run / STEP2, run / "checkpoints" / ".step-00000004.tmp")
    assert lightning("fit", here, config(), "--ckpt_path", "last") == 0
    assert steps(run) == ["step-00000002", "step-00000004"]
    assert (run / STEP4 / "manifest.json").is_file()


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize("name", ["full_run", "lora_run"])
def test_a_resume_gives_the_weights_of_a_run_without_a_break(
    name: str, here: Path, model: Path, request: pytest.FixtureRequest
):
    straight: Path = request.getfixturevalue(name)
    shutil.copytree(straight, here / "run")
    shutil.rmtree(here / "run" / STEP4)
    shutil.rmtree(here / "run" / "final")
    settings = config(lora=model if name == "lora_run" else None)
    assert lightning("fit", here, settings, "--ckpt_path", "last") == 0
    assert weights(here / "run" / "final") == weights(straight / "final")
    assert weights(here / "run" / STEP4) == weights(straight / STEP4)
    assert losses(here / "run") == losses(straight)
    totals = [[row["total_tokens"] for row in log_rows(folder)] for folder in (here / "run", straight)]
    assert totals[0] == totals[1]


def test_the_logs_are_cut_back_to_the_checkpoint(run: Path, here: Path):
    before = losses(run)
    with (run / "trainer_log.jsonl").open("a") as file:
        file.write('{"current_steps": 5, "loss": 9.0}\n{"current_steps": 6, "lo')  # torn by a kill
    with (run / "metrics.csv").open("a") as file:
        file.write("5,1.6667,9.0\n6,2.0")
    assert lightning("fit", here, config(), "--ckpt_path", f"run/{STEP2}") == 0
    assert [row["current_steps"] for row in log_rows(run)] == [1, 2, 3, 4]
    assert losses(run) == before[:4]
    with (run / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_a_resume_at_the_last_step_trains_nothing_and_writes_the_final_folder(run: Path, here: Path):
    want, logged = weights(run / "final"), losses(run)
    shutil.rmtree(run / "final")
    assert lightning("fit", here, config(), "--ckpt_path", "last") == 0
    assert weights(run / "final") == want
    assert files(run / "final") == MODEL_FILES | TOKENIZER_FILES | {"manifest.json", "README.md"}
    assert losses(run) == logged
    assert steps(run) == ["step-00000002", "step-00000004"]


def test_a_longer_run_goes_on_from_the_last_step(run: Path, here: Path):
    logged = losses(run)
    assert lightning("fit", here, config(trainer__max_steps=7), "--ckpt_path", "last") == 0
    assert losses(run)[:4] == logged
    assert [row["current_steps"] for row in log_rows(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert steps(run) == ["step-00000002", "step-00000004", "step-00000006"]
    assert lightning("fit", here, config("straight", trainer__max_steps=7)) == 0
    assert weights(run / "final") == weights(here / "straight" / "final")


# ---------------------------------------------------------------------- which checkpoints stay


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(-1, ["1", "2", "3", "4"]), (0, ["4"]), (1, ["3", "4"]), (2, ["2", "3", "4"])],
)
def test_without_a_monitor_the_newest_stay(keep: int, kept: list[str], here: Path):
    assert lightning("fit", here, config(checkpoint__every_n_steps=1, checkpoint__save_top_k=keep)) == 0
    assert steps(here / "run") == [f"step-0000000{number}" for number in kept]


def ranked(here: Path, mode: str, keep: int) -> tuple[list[float], list[int]]:
    """Run with a learning rate that makes the loss go up and down; the eval losses, and the steps that stay."""
    changes = {f"{INIT}.optimizer.init_args.lr": 0.3, "data.val_size": 3, "trainer.val_check_interval": 1}
    settings = merged(config(trainer__max_steps=6, checkpoint__every_n_steps=1), changes)
    settings = merged(
        settings, {"checkpoint.monitor": "val/loss", "checkpoint.mode": mode, "checkpoint.save_top_k": keep}
    )
    assert lightning("fit", here, settings) == 0
    values = [row["eval_loss"] for row in log_rows(here / "run") if "eval_loss" in row]
    return values, [int(name.split("-")[1]) for name in steps(here / "run")]


@pytest.mark.parametrize(("mode", "keep"), [("min", 1), ("max", 1), ("min", 2), ("min", 0)])
def test_with_a_monitor_the_best_stay_beside_the_newest(mode: str, keep: int, here: Path):
    values, kept = ranked(here, mode, keep)
    assert len(values) == 6
    older = sorted(range(1, 6), key=lambda step: values[step - 1], reverse=mode == "max")
    assert sorted(range(6), key=lambda step: values[step]) != list(range(5, -1, -1)), "the loss only fell"
    assert kept == sorted({*older[:keep], 6})


def test_a_resumed_run_remembers_how_good_its_checkpoints_were(here: Path):
    values, kept = ranked(here, "max", 1)  # the largest loss: a checkpoint from before the resume
    settings = yaml.safe_load((here / "run.yaml").read_text())
    assert lightning("fit", here, merged(settings, {"trainer.max_steps": 8}), "--ckpt_path", "last") == 0
    later = [row["eval_loss"] for row in log_rows(here / "run") if "eval_loss" in row]
    assert later[:6] == values
    best = max(range(1, 8), key=lambda step: later[step - 1])
    # step 6 was the newest when the others were pruned: the best of those that were left then
    assert steps(here / "run")[-1] == "step-00000008"
    assert f"step-{best:08d}" in steps(here / "run")
    assert len(steps(here / "run")) == 2
    assert best in (*kept, 7)


# ---------------------------------------------------------------------- validate, test, predict


def test_validate_measures_the_weights_of_a_checkpoint(run: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    settings = config(data__eval_datasets=[{"path": "rows.json"}])
    found = []
    for folder in (STEP2, STEP4, "final"):
        assert lightning("validate", here, settings, "--ckpt_path", f"run/{folder}") == 0
        found.append(json.loads((run / "all_results.json").read_text())["eval_loss"])
    assert found[0] > found[1] == found[2]
    assert lightning("validate", here, settings, "--ckpt_path", "last") == 0
    assert json.loads((run / "all_results.json").read_text())["eval_loss"] == found[2]
    assert lightning("validate", here, settings) == 0  # the model as it was before training
    assert json.loads((run / "all_results.json").read_text())["eval_loss"] > found[0]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_eval_loss_does_not_depend_on_the_eval_batch_size(size: int, run: Path, here: Path):
    settings = config(data__eval_datasets=[{"path": "rows.json"}], data__eval_micro_batch_size=5)
    assert lightning("validate", here, settings, "--ckpt_path", "run/final") == 0
    want = json.loads((run / "all_results.json").read_text())
    settings["data"]["eval_micro_batch_size"] = size
    assert lightning("validate", here, settings, "--ckpt_path", "run/final") == 0
    got = json.loads((run / "all_results.json").read_text())
    assert got["eval_loss"] == pytest.approx(want["eval_loss"], rel=1e-6)
    assert got["eval_accuracy"] == pytest.approx(want["eval_accuracy"], abs=1e-12)


def test_test_writes_its_values_beside_those_of_the_run(run: Path, here: Path):
    before = json.loads((run / "all_results.json").read_text())
    settings = config(data__test_datasets=[{"path": "rows.json"}], data__eval_datasets=[{"path": "rows.json"}])
    assert lightning("test", here, settings, "--ckpt_path", "last") == 0
    results = json.loads((run / "all_results.json").read_text())
    assert results.items() >= before.items()
    assert lightning("validate", here, settings, "--ckpt_path", "last") == 0
    both = json.loads((run / "all_results.json").read_text())
    assert both["test_loss"] == results["test_loss"] == both["eval_loss"]
    assert both["test_perplexity"] == pytest.approx(2.718281828459045 ** both["test_loss"])
    assert both["test_accuracy"] == both["eval_accuracy"]


def answers(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "generated_predictions.jsonl").read_text().splitlines()]


def test_predict_gives_the_same_greedy_answers_for_any_batch_size(run: Path, here: Path):
    settings = config(data__predict_datasets=[{"path": "rows.json"}], model__init_args__generation__max_new_tokens=12)
    found = []
    for size in (1, 5, 12):
        settings["model"]["init_args"]["generation"]["batch_size"] = size
        assert lightning("predict", here, settings, "--ckpt_path", "run/final") == 0
        found.append(answers(run))
    assert found[0] == found[1] == found[2]
    assert [answer["label"] for answer in found[0]] == [row["output"] for row in ROWS]
    prompt = "<|im_start|>user\nCount to 1.<|im_end|>\n<|im_start|>assistant\n"
    assert found[0][0]["prompt"] == prompt


def test_predict_answers_as_plain_transformers_does(run: Path, here: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = config(data__predict_datasets=[{"path": "rows.json"}], model__init_args__generation__max_new_tokens=12)
    assert lightning("predict", here, settings, "--ckpt_path", "run/final") == 0
    causal_lm = AutoModelForCausalLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    for answer, row in zip(answers(run), ROWS, strict=True):
        messages = [{"role": "user", "content": row["instruction"]}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = causal_lm.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert answer["predict"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_predict_with_the_adapter_of_a_checkpoint(here: Path, lora_run: Path, model: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (here / "rows.json").write_text(json.dumps(ROWS[:3]))
    shutil.copytree(lora_run, here / "run")
    settings = config(lora=model, data__predict_datasets=[{"path": "rows.json"}])
    assert lightning("predict", here, settings, "--ckpt_path", f"run/{STEP2}") == 0
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), here / "run" / STEP2)
    tokenizer = AutoTokenizer.from_pretrained(here / "run" / STEP2)
    for answer in answers(here / "run"):
        prompt = tokenizer(answer["prompt"], return_tensors="pt", add_special_tokens=False)
        tokens = adapted.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert answer["predict"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_predict_answers_the_validation_rows_where_no_prompts_are_given(run: Path, here: Path):
    assert lightning("predict", here, config(data__val_size=3), "--ckpt_path", "run/final") == 0
    labels = [answer["label"] for answer in answers(run)]
    assert len(labels) == 3
    assert set(labels) < {row["output"] for row in ROWS}


# ---------------------------------------------------------------------- kill -9


def start(here: Path, root: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lf_lightning", "fit", "--config", "run.yaml", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with (here / "out.txt").open("ab") as out:
        return subprocess.Popen(command, cwd=here, env=environment, stdout=out, stderr=out, start_new_session=True)


def kill_at_step(process: subprocess.Popen[bytes], run: Path, step: int, delay: float) -> None:
    """Send SIGKILL some time after a step was logged."""
    log, deadline = run / "trainer_log.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.read_text().count('"loss"') >= step:
            time.sleep(delay)
            break
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_run_that_was_killed_twice_ends_with_the_same_weights(here: Path, root: Path):
    settings = config(trainer__max_steps=60, checkpoint__every_n_steps=1, checkpoint__save_top_k=3)
    assert lightning("fit", here, {**settings, "trainer": {**settings["trainer"], "default_root_dir": "straight"}}) == 0
    write(here, settings)
    rng = random.Random(5)
    run = here / "run"
    for number in range(2):
        first_step = len(losses(run)) if run.exists() else 0
        process = start(here, root, *(["--ckpt_path", "last"] if number else []))
        kill_at_step(process, run, first_step + rng.randint(3, 15), rng.uniform(0, 0.02))
        assert process.returncode == -signal.SIGKILL
        assert not (run / "final").exists()
        for checkpoint in (run / "checkpoints").glob("step-*"):
            if (checkpoint / "manifest.json").is_file():
                listed = json.loads((checkpoint / "manifest.json").read_text())["files"]
                assert {name: (checkpoint / name).stat().st_size for name in listed} == {
                    name: facts["size"] for name, facts in listed.items()
                }
    assert lightning("fit", here, settings, "--ckpt_path", "last") == 0
    assert weights(run / "final") == weights(here / "straight" / "final")
    assert losses(run) == losses(here / "straight")
    assert len(steps(run)) == 4


# ---------------------------------------------------------------------- other ends


class Signals(Callback):
    """Send this process a signal after three steps, as a terminal or a scheduler would."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_ends_the_run_with_its_own_code_and_a_resume_goes_on(
    number: signal.Signals,
    code: int,
    here: Path,
    full_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    plain = cli.make_gate

    def with_signal(*arguments: Any, **options: Any) -> Any:
        gate = plain(*arguments, **options)
        gate.trainer.callbacks.append(Signals(number))
        return gate

    with monkeypatch.context() as patch:
        patch.setattr(cli, "make_gate", with_signal)
        assert lightning("fit", here, config()) == code
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "interrupted after step 3: saved run/checkpoints/step-00000003, continue with --ckpt_path last"
    )
    assert steps(here / "run") == ["step-00000002", "step-00000003"]
    assert not (here / "run" / "final").exists()
    assert lightning("fit", here, config(), "--ckpt_path", "last") == 0
    assert weights(here / "run" / "final") == weights(full_run / "final")
    assert losses(here / "run") == losses(full_run)
