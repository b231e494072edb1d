"""Rm, dpo and kto from the command line: kills and resumes, ranks, and the real rows with a real model."""

from __future__ import annotations

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
from lightning.pytorch import Callback, Trainer

from lf_lightning import cli
from tests.cli.runs import INIT, lightning, log_rows, losses, weights, write
from tests.cli.test_real_data import LORA, settings
from tests.stages.judgement_runs import dataset, fit, judged

SEVEN = {"trainer__max_steps": 7, "checkpoint__every_n_steps": 1, "checkpoint__save_top_k": -1}
"""Two epochs and a step of the third, which visits the rows in a new order."""


def init(**options: Any) -> dict[str, Any]:
    return {f"{INIT}.{name}": value for name, value in options.items()}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """An adapter that has learned something, with a dropout of its own."""
    tuning = {"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.2}}
    return fit(tmp_path_factory.mktemp("adapter"), "DPO", lora=model, **init(tuning=tuning)) / "final"


CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {  # stage, on a folder, options
    "rm full": ("RM", False, init(value_head={"dropout": 0.2})),
    "rm lora": ("RM", True, {}),
    "rm sequence classification": ("RM", False, init(value_head={"save_as": "sequence_classification"})),
    "dpo bco": ("DPO", False, init(bco_weight=0.5)),
    "dpo snapshot": ("DPO", True, {}),
    "dpo stored": ("DPO", False, init(loss="kto_pair", reference={"precompute": True})),
    "kto": ("KTO", False, {}),
    "kto stored": ("KTO", False, init(reference={"precompute": True})),
}


class Interrupted(Callback):
    """Stop in the second epoch, in the midst of it."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", CASES)
def test_a_resume_reaches_the_weights_of_a_run_without_a_break(
    name: str, here: Path, model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
):
    stage, on_folder, options = CASES[name]
    changes: dict[str, Any] = {**SEVEN, **options, "lora": model if on_folder else None}
    if name == "dpo snapshot":
        changes |= init(tuning={"class_path": "LoRA", "init_args": {"adapter": str(adapter)}})
    straight = fit(here, stage, "straight", **changes)
    plain = cli.make_gate

    def with_callback(*arguments: Any, **more: Any) -> Any:
        gate = plain(*arguments, **more)
        gate.trainer.callbacks.append(Interrupted())
        return gate

    monkeypatch.setattr("lf_lightning.callbacks.plots.plot_curve", lambda *_, **__: None)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "make_gate", with_callback)
        try:
            code: Any = lightning("fit", here, judged(here, stage, **changes))
        except SystemExit as stopped:
            code = stopped.code
    assert code == 130
    assert not (here / "run" / "final").exists()
    assert len(losses(here / "run")) in (4, 5)
    assert lightning("fit", here, judged(here, stage, **changes), "--ckpt_path", "last") == 0
    assert losses(here / "run") == losses(straight)
    assert weights(here / "run" / "final") == weights(straight / "final")
    assert weights(here / "run" / "checkpoints/step-00000006") == weights(straight / "checkpoints/step-00000006")
    if name == "dpo bco":
        folders = [run / "checkpoints/step-00000007/trainer_state/state.ckpt" for run in (here / "run", straight)]
        memories = [torch.load(folder, weights_only=True)["stage"]["memory"] for folder in folders]
        assert memories[0] == memories[1]
        assert memories[0]["bco_steps"] == 7
        assert memories[0]["bco_sum"] != 0


def command(verb: str, here: Path, root: Path, path: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "lf_lightning", verb, "--config", path, *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rm full", "dpo bco", "kto"])
def test_a_run_that_was_killed_ends_with_the_same_weights(name: str, here: Path, root: Path):
    stage, _, options = CASES[name]
    changes = {**options, "trainer__max_steps": 60, "checkpoint__every_n_steps": 1, "checkpoint__save_top_k": 3}
    straight = fit(here, stage, "straight", **changes)
    path, run = write(here, judged(here, stage, **changes)), here / "run"
    environment, draw = {**os.environ, "PYTHONPATH": str(root)}, random.Random(3)
    for number in range(2):
        more = ["--ckpt_path", "last"] if number else []
        with (here / "out.txt").open("ab") as out:
            process = subprocess.Popen(
                command("fit", here, root, path, *more), stdout=out, stderr=out, env=environment, start_new_session=True
            )
        log, stop = run / "trainer_log.jsonl", (len(losses(run)) if run.exists() else 0) + draw.randint(3, 12)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.is_file() and log.read_text().count('"loss"') >= stop:
                break
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert lightning("fit", here, judged(here, stage, **changes), "--ckpt_path", "last") == 0
    assert weights(run / "final") == weights(straight / "final")
    assert losses(run) == losses(straight)


# ---------------------------------------------------------------------- validation, ranks


@pytest.mark.parametrize("stage", ["RM", "DPO", "KTO"])
def test_the_metrics_of_a_set_do_not_depend_on_its_micro_batches(stage: str, here: Path):
    run = fit(here, stage, trainer__max_steps=3, checkpoint__every_n_steps=None)
    found = []
    for layout in (
        {"data__eval_micro_batch_size": 1},
        {"data__eval_micro_batch_size": 5, "data__layout": "padded"},
        {"data__eval_micro_batch_tokens": 200, "data__share_prompt": False},
    ):
        changes = judged(here, stage, data__eval_datasets=dataset(here, stage), **layout)
        assert lightning("validate", here, changes, "--ckpt_path", "run/final") == 0
        results = json.loads((run / "all_results.json").read_text())
        found.append({name: results[name] for name in results if name.startswith("eval_") and name != "eval_weights"})
    assert len(found[0]) >= 5
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5, abs=1e-5)


def results_on(ranks: int, verb: str, here: Path, root: Path, stage: str, **changes: Any) -> Any:
    """What a verb leaves on so many processes."""
    run = f"run{ranks}"
    place = {"trainer__devices": ranks, "trainer__strategy": "ddp" if ranks > 1 else "auto"}
    sets = {"data__eval_datasets": dataset(here, stage), "data__predict_datasets": dataset(here, stage)}
    path = write(here, judged(here, stage, run, **place, **(sets if verb != "fit" else {}), **changes), f"{run}.yaml")
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        command(verb, here, root, path), capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if verb == "fit":
        return losses(here / run)
    if verb == "predict":
        rows = [json.loads(line) for line in (here / run / "generated_predictions.jsonl").read_text().splitlines()]
        return [value for row in rows for value in row.values()]
    results = json.loads((here / run / "all_results.json").read_text())
    # equal models tie, up to rounding: which of two equal numbers is larger says nothing
    return [value for name, value in results.items() if name not in ("eval_weights", "eval_rewards/accuracies")]


STORED = init(reference={"precompute": True})
ON_RANKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "predict rm": ("predict", "RM", {}),
    "fit rm": ("fit", "RM", {}),
    "fit dpo": ("fit", "DPO", init(bco_weight=0.5)),
    "fit dpo stored": ("fit", "DPO", STORED),
    "fit kto": ("fit", "KTO", {"trainer__max_steps": 6}),
    "fit kto stored": ("fit", "KTO", {"trainer__max_steps": 6, **STORED}),
    "validate rm": ("validate", "RM", {}),
    "validate dpo": ("validate", "DPO", {}),
    "validate kto": ("validate", "KTO", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_give_what_one_gives(name: str, here: Path, root: Path):
    verb, stage, changes = ON_RANKS[name]
    one, two = (results_on(ranks, verb, here, root, stage, **changes) for ranks in (1, 2))
    assert len(one) >= 4
    assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


# ---------------------------------------------------------------------- real rows


@pytest.fixture
def place(here: Path, shared: Path, parity: Path) -> Path:
    """A working folder with the real rows and the real model."""
    shutil.copytree(parity / "model", here / "model")
    (here / "data").symlink_to(shared / "data")
    return here


def real(stage: str, name: str, **changes: Any) -> dict[str, Any]:
    """Nine steps of four pairs or answers, which visit the same few rows three times."""
    config = settings(stage, [name], max_length=384, **changes)
    if stage == "RM":
        del config["model"]["init_args"]["generation"]
    return config


@pytest.mark.parametrize(
    ("stage", "name", "tuning"),
    [
        ("RM", "dpo_en_demo", LORA),
        ("DPO", "dpo_en_demo", LORA),
        ("DPO", "dpo_en_demo", {"class_path": "Full"}),
        ("KTO", "kto_en_demo", LORA),
    ],
    ids=["rm", "dpo", "dpo full", "kto"],
)
def test_a_few_real_rows_are_learned(stage: str, name: str, tuning: dict[str, Any], place: Path):
    assert lightning("fit", place, real(stage, name, tuning=tuning)) == 0
    rows = [row for row in log_rows(place / "run") if "loss" in row]
    assert len(rows) == 9
    first, last = (sum(row["loss"] for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last < first
    if stage != "RM":
        assert rows[0]["loss"] == pytest.approx(0.693147 if stage == "DPO" else 0.5, abs=1e-5)
        assert rows[-1]["rewards/margins"] > 0


def test_real_pairs_are_scored_in_the_order_of_their_file(place: Path):
    config = real("RM", "dpo_en_demo")
    assert lightning("fit", place, config) == 0
    pairs = json.loads((place / "data" / "dpo_en_demo.json").read_text())[:5]
    shuffled = [pairs[index] for index in (3, 0, 4, 1, 2)]
    found = []
    for number, rows in enumerate((pairs, shuffled)):
        (place / f"some{number}.json").write_text(json.dumps(rows))
        columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
        source = {"path": f"some{number}.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
        config["data"]["predict_datasets"] = [source]
        assert lightning("predict", place, config, "--ckpt_path", "run/final") == 0
        lines = (place / "run" / "generated_predictions.jsonl").read_text().splitlines()
        found.append([(row["chosen"], row["rejected"]) for row in map(json.loads, lines)])
    assert len(found[0]) == 5
    for position, index in enumerate((3, 0, 4, 1, 2)):
        assert found[1][position] == pytest.approx(found[0][index], abs=1e-5)
