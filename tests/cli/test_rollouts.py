"""Ppo and grpo from the command line: kills and resumes, ranks, verbs, Python, and what a run leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer, seed_everything

from lf_lightning import (
    PPO,
    AdamW,
    BackboneSpec,
    DataModule,
    Full,
    PPOConstants,
    RewardFunction,
    RunCheckpoint,
    SamplingSpec,
    ScheduleSpec,
    cli,
)
from lf_lightning.__main__ import main
from tests.cli.runs import INIT, LLAMA, ROWS, lightning, log_rows, losses, weights, write
from tests.ranks import fork_ranks
from tests.stages.judgement_runs import fit as fit_judged
from tests.stages.rollout_runs import EXACT, LENGTH, REWARDS, SPREAD, fit, rolled

ELEVEN = {"trainer__max_steps": 11, "checkpoint__every_n_steps": 1, "checkpoint__save_top_k": -1}
"""Two rollouts and a half, of which the second ends an epoch."""
CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {  # stage, on a folder, options
    "ppo": ("PPO", False, {"constants": {"score_norm": "whiten", "kl_horizon": 20}}),
    "ppo lora": ("PPO", True, {"constants": {"kl_estimator": "k3"}, "model.init_args.rewards": [SPREAD, LENGTH]}),
    "ppo early stop": ("PPO", False, {"constants": {"target_kl": 1e-4, "num_epochs": 4}}),
    "grpo": ("GRPO", False, {"constants": {"importance": "sequence"}}),
}


class Interrupted(Callback):
    """Stop in the midst of a rollout."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def told(run: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    timed = ("elapsed_time", "remaining_time", "throughput")
    return [{name: value for name, value in row.items() if name not in timed} for row in log_rows(run)]


@pytest.mark.parametrize("step", [4, 5, 7])
@pytest.mark.parametrize("name", CASES)
def test_a_resume_reaches_the_weights_of_a_run_without_a_break(
    name: str, step: int, here: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    stage, on_folder, options = CASES[name]
    changes: dict[str, Any] = {**ELEVEN, **options, "lora": model if on_folder else None}
    changes |= {"data__val_size": 3, "trainer__val_check_interval": 3}
    straight = fit(here, stage, "straight", **changes)
    plain = cli.make_gate

    def with_callback(*arguments: Any, **more: Any) -> Any:
        gate = plain(*arguments, **more)
        gate.trainer.callbacks.append(Interrupted(step))
        return gate

    monkeypatch.setattr("lf_lightning.callbacks.plots.plot_curve", lambda *_, **__: None)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "make_gate", with_callback)
        try:
            code: Any = lightning("fit", here, rolled(stage, **changes))
        except SystemExit as stopped:
            code = stopped.code
    assert code == 130
    assert lightning("fit", here, rolled(stage, **changes), "--ckpt_path", "last") == 0
    assert weights(here / "run" / "final") == weights(straight / "final")
    assert told(here / "run") == told(straight)
    assert (here / "run" / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_an_early_stop_changes_nothing_until_the_next_rollout(here: Path):
    run = fit(here, "PPO", constants={"target_kl": 1e-4, "num_epochs": 4}, trainer__max_steps=10)
    stops = [row["early_stop"] for row in log_rows(run) if "early_stop" in row]
    assert stops[:2] == [0.0, 1.0]
    assert 0.0 in stops[8:]


def test_a_step_that_the_ratio_takes_away_is_logged(here: Path):
    run = fit(here, "PPO", constants={"ratio_threshold": 1.0001}, trainer__max_steps=8)
    found = [(row["policy/ratio"] > 1.0001, row["ratio_stop"]) for row in log_rows(run)]
    assert {far for far, _ in found} == {True, False}
    assert all(far == stop for far, stop in found)


@pytest.mark.parametrize(
    ("controller", "changed", "goes_on"),
    [("fixed", 0.9, 0.9), ("adaptive", 0.9, 0.9), ("adaptive", 0.2, None)],
)
def test_the_price_of_the_kl_is_that_of_the_configuration_after_a_resume(
    controller: str, changed: float, goes_on: float | None, here: Path
):
    constants = {"kl_controller": controller, "kl_coef": 0.2, "kl_horizon": 20}
    fit(here, "PPO", constants=constants, checkpoint__every_n_steps=4)
    longer = rolled("PPO", constants={**constants, "kl_coef": changed}, trainer__max_steps=8)
    assert lightning("fit", here, longer, "--ckpt_path", "last") == 0
    prices = [row["objective/kl_coef"] for row in log_rows(here / "run")]
    assert prices[:4] == [0.2] * 4
    if goes_on is None:  # the controller's own, which has moved
        assert prices[4] not in (0.2, 0.9)
    else:
        assert prices[4] == goes_on


def test_what_predict_draws_does_not_depend_on_the_batch_size(here: Path):
    run, found = fit(here, "PPO"), []
    for size in (1, 8):
        options = {"eval_do_sample": True, "batch_size": size}
        changes = rolled("PPO", generation=options, data__predict_datasets=[{"path": "rows.json"}])
        assert lightning("predict", here, changes, "--ckpt_path", "run/final") == 0
        found.append((run / "generated_predictions.jsonl").read_text())
    assert found[0] == found[1]
    assert len({json.loads(line)["predict"] for line in found[0].splitlines()}) > 6


def test_plain_python_trains_what_the_command_line_trains(here: Path):
    run = fit(here, "PPO", data__val_size=3, trainer__val_check_interval=2)
    seed_everything(7)
    backbone = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")
    stage = PPO(
        backbone,
        Full(),
        AdamW(lr=1e-2),
        ScheduleSpec(kind="constant"),
        rewards=[RewardFunction(f"{REWARDS}:spread")],
        constants=PPOConstants(num_epochs=2),
        generation=SamplingSpec(**EXACT),
    )
    rows = [{"path": str(here / "rows.json")}]
    data = DataModule(
        backbone, "ppo", datasets=rows, max_length=96, global_batch_size=4, rollout_size=6, val_size=3, cache_dir=None
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=4,
        log_every_n_steps=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        default_root_dir=here / "python",
        callbacks=[RunCheckpoint(every_n_steps=2)],
        enable_progress_bar=False,
    )
    trainer.fit(stage, data)
    assert weights(here / "python" / "final") == weights(run / "final")
    assert losses(here / "python") == losses(run)
    again = ["--config", "python/config.yaml", "--trainer.default_root_dir", "again"]
    assert main(["fit", *again]) == 0
    assert weights(here / "again" / "final") == weights(run / "final")


def test_a_run_leaves_its_scores_samples_curves_and_the_critic(here: Path):
    run = fit(
        here, "PPO", data__val_size=3, trainer__val_check_interval=2, **{"model.init_args.rewards": [SPREAD, LENGTH]}
    )
    logged = [row for row in log_rows(run) if "loss" in row]
    assert {"reward", "rewards/spread", "rewards/length", "objective/kl", "policy/clipfrac", "value/error"} <= set(
        logged[0]
    )
    assert logged[0]["policy/ratio"] == 1.0
    assert logged[0]["reward"] == pytest.approx(logged[0]["rewards/spread"] - 0.5 * logged[0]["rewards/length"])
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(each["current_steps"], each["row"]) for each in samples] == [
        (2, 0),
        (2, 1),
        (2, 2),
        (4, 0),
        (4, 1),
        (4, 2),
    ]
    evaluated = [row for row in log_rows(run) if "eval_reward" in row]
    for row, part in zip(evaluated, (samples[:3], samples[3:]), strict=True):
        assert row["eval_reward"] == pytest.approx(sum(each["reward"] for each in part) / 3)
        assert row["eval_kl"] == pytest.approx(sum(each["kl"] for each in part) / 3)
        assert row["eval_response_length"] == pytest.approx(sum(each["length"] for each in part) / 3)
    for name in ("reward", "eval_reward", "objective_kl", "eval_kl"):
        assert (run / f"training_{name}.png").is_file()
    assert (run / "final" / "value_head.safetensors").is_file()


def test_the_other_verbs_go_on_from_what_fit_left(here: Path):
    run = fit(here, "PPO", data__val_size=3, trainer__val_check_interval=4)
    fitted = [row for row in log_rows(run) if "eval_reward" in row][-1]
    sets = {name: [{"path": str(here / "rows.json")}] for name in ("data__test_datasets", "data__predict_datasets")}
    changes = rolled("PPO", data__val_size=3, **sets)
    assert lightning("validate", here, changes, "--ckpt_path", "run/final") == 0
    results = json.loads((run / "all_results.json").read_text())
    for name in ("eval_reward", "eval_kl", "eval_response_length", "eval_stop_ratio"):
        assert results[name] == pytest.approx(fitted[name], abs=1e-6)
    assert lightning("test", here, changes, "--ckpt_path", "run/final") == 0
    assert "test_reward" in json.loads((run / "all_results.json").read_text())
    assert lightning("predict", here, changes, "--ckpt_path", "run/final") == 0
    lines = [json.loads(line) for line in (run / "generated_predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [row["output"] for row in ROWS]


def test_a_reward_model_of_our_rm_stage_scores_for_our_ppo_stage(here: Path, model: Path):
    judge = fit_judged(here, "RM", "judge", lora=model, trainer__max_steps=6) / "final"
    (here / "rows.json").write_text(json.dumps(ROWS))
    options = {"path": str(judge)}
    runs = [
        fit(here, "PPO", kind, lora=model, **{"model.init_args.rewards": [{"class_path": kind, "init_args": options}]})
        for kind in ("RewardModel", "RewardAdapter")
    ]
    whole, shared = ([row["reward"] for row in log_rows(run) if "reward" in row] for run in runs)
    assert shared == pytest.approx(whole, rel=1e-5)
    assert len(set(whole)) == 1  # four steps on one rollout
    names = json.loads((runs[1] / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert names == str(model)
    assert sorted(path.name for path in (runs[1] / "final").glob("*.safetensors")) == [
        "adapter_model.safetensors",
        "value_head.safetensors",
    ]


# ---------------------------------------------------------------------- kills, ranks


def command(here: Path, path: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "lf_lightning", "fit", "--config", path, *more]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_run_that_was_killed_ends_with_the_same_weights(name: str, here: Path, root: Path):
    stage, _, options = CASES[name]
    changes = {**options, "trainer__max_steps": 60, "checkpoint__every_n_steps": 1, "checkpoint__save_top_k": 3}
    straight = fit(here, stage, "straight", **changes)
    path, run = write(here, rolled(stage, **changes)), here / "run"
    environment, draw = {**os.environ, "PYTHONPATH": str(root)}, random.Random(3)
    for number in range(2):
        more = ["--ckpt_path", "last"] if number else []
        with (here / "out.txt").open("ab") as out:
            process = subprocess.Popen(
                command(here, path, *more), stdout=out, stderr=out, env=environment, start_new_session=True
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
    assert lightning("fit", here, rolled(stage, **changes), "--ckpt_path", "last") == 0
    assert weights(run / "final") == weights(straight / "final")
    assert losses(run) == losses(straight)


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("stage", ["PPO", "GRPO"])
def test_two_ranks_give_what_one_gives(stage: str, sampled: bool, here: Path, root: Path):
    found = []
    for ranks in (1, 2):
        place = {"trainer__devices": ranks, "trainer__strategy": "ddp" if ranks > 1 else "auto"}
        options = {**place, "data__val_size": 3, "trainer__val_check_interval": 2, "generation": {"do_sample": sampled}}
        path = write(here, rolled(stage, f"run{ranks}", **options), f"run{ranks}.yaml")
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(
            command(here, path), capture_output=True, text=True, env=environment, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(here / f"run{ranks}")
    assert losses(found[1]) == pytest.approx(losses(found[0]), rel=1e-5, abs=1e-5)
    one, two = ([value for row in told(run) for value in row.values()] for run in found)
    assert two == pytest.approx(one, rel=1e-4, abs=1e-4)


def test_ranks_whose_weights_are_cut_score_uneven_shares_by_an_adapter(here: Path, model: Path):
    judge = fit_judged(here, "RM", "judge", lora=model, trainer__max_steps=2) / "final"
    (here / "rows.json").write_text(json.dumps(ROWS))
    reward = {"class_path": "RewardAdapter", "init_args": {"path": str(judge), "batch_size": 1}}
    changes = {"lora": model, "data__rollout_size": 5, f"{INIT}.rewards": [reward], "trainer__max_steps": 2}
    one = fit(here, "PPO", "one", **changes)
    changes |= {"trainer__devices": 2, "trainer__strategy": "fsdp2", "checkpoint__every_n_steps": None}
    path = write(here, rolled("PPO", "two", **changes), "two.yaml")

    def on_a_rank() -> None:
        assert main(["fit", "--config", path]) == 0

    fork_ranks(on_a_rank, 2, here)
    rewards = [[row["reward"] for row in log_rows(run)] for run in (one, here / "two")]
    assert rewards[1] == pytest.approx(rewards[0], rel=1e-5)
