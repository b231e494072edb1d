"""Rewards that fail, services that come and go, and options of ppo and grpo that cannot be meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import INIT, ROWS, lightning, log_rows, losses, merged, weights, write
from tests.stages.rollout_runs import REWARDS, SPREAD, fit, rolled

RULE = """
import os

def scored(prompts, responses, batch):
    return [len(set(response)) / 4 for response in responses]

def once_wrong(prompts, responses, batch):
    if os.path.exists("wrong"):
        return [float("nan")] * len(responses)
    return scored(prompts, responses, batch)

def on_one_rank(prompts, responses, batch):
    if os.environ.get("LOCAL_RANK") == "1":
        raise KeyError("no such word")
    return scored(prompts, responses, batch)
"""


class Scorer(ThreadingHTTPServer):
    """Answers as LlamaFactory's services do: the number of letters of each text, in eighths.

    Args:
        port: Where; 0 chooses.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.num_requests, self.answers = 0, list[Any]()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score"

    def stop(self) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.num_requests += 1
        answer = {"scores": [len(text) / 8 for text in body["messages"]]}
        answer = server.answers.pop(0) if server.answers else answer
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    server = Scorer()
    yield server
    server.stop()


def asked(scorer: Scorer, **options: Any) -> dict[str, Any]:
    """Options of a run that a service scores."""
    reward = {"class_path": "RewardService", "init_args": {"url": scorer.url, "backoff": 0.1, **options}}
    return {f"{INIT}.rewards": [reward], "trainer__max_steps": 12, "checkpoint__every_n_steps": 4}


def gone_for(scorer: Scorer, seconds: float, *, after: int) -> threading.Thread:
    """Take the service away for a while, once it has answered so many requests."""

    def leave() -> None:
        while scorer.num_requests < after:
            time.sleep(0.005)
        scorer.stop()
        time.sleep(seconds)
        Scorer(scorer.server_port)

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    return thread


def check_outage(scorer: Scorer, here: Path, seconds: float, **options: Any) -> None:
    healthy = fit(here, "PPO", "healthy", **asked(scorer, **options))
    thread = gone_for(scorer, seconds, after=scorer.num_requests + 1)
    run = fit(here, "PPO", **asked(scorer, **options))
    thread.join()
    assert weights(run / "final") == weights(healthy / "final")
    assert losses(run) == losses(healthy)


def test_a_service_that_is_gone_for_a_while_changes_nothing(scorer: Scorer, here: Path):
    check_outage(scorer, here, 1.0)


@pytest.mark.slow
def test_a_service_that_is_gone_for_ten_seconds_changes_nothing_with_the_defaults(scorer: Scorer, here: Path):
    check_outage(scorer, here, 10.0, backoff=1.0)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"scores": [1.0]}, "must give 6 scores to 6 texts, got 1."),
        ({"scores": [1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]}, "must give finite numbers, got nan as score 2 of 6."),
        ({"detail": "busy"}, 'must answer {"scores": [...]}, got \'{"detail": "busy"}\'.'),
    ],
)
def test_a_wrong_answer_stops_in_one_line_and_the_run_goes_on_from_there(
    answer: Any, says: str, scorer: Scorer, here: Path, capfd: pytest.CaptureFixture[str]
):
    healthy = fit(here, "PPO", "healthy", **asked(scorer))
    right = rolled("PPO", **asked(scorer))
    assert lightning("fit", here, merged(right, {"trainer.max_steps": 4})) == 0
    scorer.answers = [answer]
    capfd.readouterr()
    assert lightning("fit", here, right, "--ckpt_path", "last") == 1
    told = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(told) == 1
    assert says in told[0]
    assert "--ckpt_path last" in told[0]
    assert lightning("fit", here, right, "--ckpt_path", "last") == 0
    assert weights(here / "run" / "final") == weights(healthy / "final")


def test_a_rule_that_gives_nan_stops_in_one_line(here: Path, capfd: pytest.CaptureFixture[str]):
    (here / "rule.py").write_text(RULE)
    (here / "wrong").write_text("")
    reward = {"class_path": "RewardFunction", "init_args": {"function": "rule.py:once_wrong"}}
    assert lightning("fit", here, rolled("GRPO", **{f"{INIT}.rewards": [reward]})) == 1
    (told,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line.lower()]
    assert "model.init_args.rewards: once_wrong: must give finite scores, got nan for response 1 of" in told


def test_a_rule_that_fails_on_one_rank_stops_all_in_one_line(here: Path, root: Path):
    (here / "rule.py").write_text(RULE)
    reward = {"class_path": "RewardFunction", "init_args": {"function": "rule.py:on_one_rank"}}
    place = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    path = write(here, rolled("PPO", **{f"{INIT}.rewards": [reward]}, **place))
    done = subprocess.run(
        [sys.executable, "-m", "lf_lightning", "fit", "--config", path],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "on_one_rank: must not fail, got KeyError: 'no such word' (" in done.stderr


# ---------------------------------------------------------------------- what is said, and refused

CONSTANTS, GENERATION = f"{INIT}.constants", f"{INIT}.generation"


def reward(kind: str, **options: Any) -> dict[str, Any]:
    return {f"{INIT}.rewards": [{"class_path": kind, "init_args": options}]}


BAD: dict[str, tuple[str, dict[str, Any], str]] = {  # stage, changes, what the line says
    "no reward": ("PPO", {f"{INIT}.rewards": []}, "rewards: must name at least one reward, got none. Add"),
    "no such function": ("PPO", reward("RewardFunction", function="nowhere:f"), "No module named 'nowhere'"),
    "no such name": ("PPO", reward("RewardFunction", function=f"{REWARDS}:sprea"), "Did you mean spread?"),
    "no such class": ("GRPO", {f"{INIT}.rewards": [{"class_path": "RewardModle"}]}, "Did you mean RewardModel?"),
    "no such option": ("PPO", reward("RewardModel", pth="x"), "Did you mean path?"),
    "no such folder": ("PPO", reward("RewardModel", path="./none"), "must be a folder or a hub name, got ./none"),
    "adapter without LoRA": ("PPO", reward("RewardAdapter", path="x"), "RewardAdapter needs a policy tuned with LoRA"),
    "no address": ("PPO", reward("RewardService", url="localhost"), "must be an address with http:// or https://"),
    "unset token": (
        "PPO",
        reward("RewardService", url="http://localhost/x", token_env="NO_SUCH_TOKEN"),
        "token_env: must name a variable that is set, got NO_SUCH_TOKEN",
    ),
    "gamma": ("PPO", {f"{CONSTANTS}.gamma": 1.5}, "constants.gamma: must be in [0, 1], got 1.5."),
    "flat constant": ("PPO", {f"{INIT}.gamma": 0.9}, "It is one of constants: set model.init_args.constants.gamma."),
    "typo": ("PPO", {f"{CONSTANTS}.clip_rang": 0.1}, "Did you mean clip_range?"),
    "of the other stage": ("GRPO", {f"{CONSTANTS}.gamma": 1.0}, "the class chosen has no such option"),
    "estimator": ("PPO", {f"{CONSTANTS}.kl_estimator": "k4"}, "must be one of k1, k2, k3, got k4"),
    "group of one": ("GRPO", {f"{CONSTANTS}.group_size": 1}, "constants.group_size: must be at least 2, got 1."),
    "small rollout": ("PPO", {"data.rollout_size": 2}, "data.rollout_size: must be at least data.global_batch_size, 4"),
    "cut group": ("GRPO", {"data.rollout_size": 8}, "must be a multiple of model.init_args.constants.group_size, 3"),
    "rollout of sft": ("SFT", {"data.rollout_size": 8}, "data.rollout_size: is of ppo and grpo only, got 8 with sft."),
    "beams": ("PPO", {f"{GENERATION}.num_beams": 2}, "generation.num_beams: must be 1 for rollouts"),
    "penalty": ("PPO", {f"{GENERATION}.repetition_penalty": 1.1}, "generation.repetition_penalty: must be 1"),
    "precompute": ("PPO", {f"{INIT}.reference": {"precompute": True}}, "reference.precompute: must be false"),
    "dropout of the head": ("PPO", {f"{INIT}.value_head": {"dropout": 0.1}}, "value_head.dropout: must be 0 for PPO"),
    "a policy as classifier": (
        "PPO",
        {f"{INIT}.value_head": {"save_as": "sequence_classification"}},
        "value_head.save_as: must be value_head for PPO",
    ),
    "a head of grpo": ("GRPO", {f"{INIT}.value_head": {"init": "new"}}, "value_head"),
    "packing": (
        "PPO",
        {"data.packing": "knapsack"},
        "data.packing: must be none for ppo, which learns its own",
    ),
    "workers": ("PPO", {"data.num_workers": 2}, "data.num_workers: prompts are encoded in this process with ppo"),
    "no room": ("PPO", {"data.max_length": 20}, "leaves no room in data.max_length 20. Fix the row"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused_in_one_line(name: str, here: Path, capfd: pytest.CaptureFixture[str]):
    stage, changes, says = BAD[name]
    base = rolled("PPO" if stage == "SFT" else stage)
    if stage == "SFT":
        base = merged(base, {"model.class_path": "SFT", **{f"{INIT}.{name}": ... for name in ("rewards", "constants")}})
    assert lightning("fit", here, merged(base, changes)) == 2
    error = capfd.readouterr().err
    (told,) = [line for line in error.splitlines() if line.startswith("lf-lightning: error: ")]
    assert says in told
    assert "Traceback" not in error
    assert not (here / "run" / "final").exists()


def test_a_cut_distribution_is_told_once_and_a_whole_one_not(here: Path, capfd: pytest.CaptureFixture[str]):
    for generation, number in (({"top_p": 0.7, "top_k": 50}, 1), ({}, 0), ({"do_sample": False}, 0)):
        assert (
            lightning("fit", here, rolled("PPO", generation=generation, trainer__max_steps=2), "--overwrite=true") == 0
        )
        said = capfd.readouterr()
        assert (said.out + said.err).count("so ratio and KL are biased") == number
    assert "nothing new is ever tried" in said.out + said.err


def test_several_rewards_are_weighted_and_logged_apart(here: Path):
    same = {"class_path": "RewardFunction", "init_args": {"function": f"{REWARDS}:spread", "weight": 0.25}}
    run = fit(here, "GRPO", **{f"{INIT}.rewards": [SPREAD, same]})
    row = next(row for row in log_rows(run) if "reward" in row)
    assert row["rewards/spread-0"] == row["rewards/spread-1"]
    assert row["reward"] == pytest.approx(1.25 * row["rewards/spread-0"])


def test_a_rule_sees_what_the_data_gives(here: Path):
    (here / "rule.py").write_text(
        "def seen(prompts, responses, batch):\n"
        "    rows = zip(prompts, batch.references, batch.is_stopped, batch.response_ids, strict=True)\n"
        "    with open('seen.txt', 'a') as handle:\n"
        "        handle.writelines(f'{p!r} {r!r} {s} {len(i)}\\n' for p, r, s, i in rows)\n"
        "    return [0.0] * len(prompts)\n"
    )
    fit(here, "PPO", **reward("RewardFunction", function="rule.py:seen"), data__shuffle=False, trainer__max_steps=1)
    seen = sorted((here / "seen.txt").read_text().splitlines())
    assert len(seen) == 6
    for line, row in zip(seen, sorted(ROWS[:6], key=lambda row: row["instruction"]), strict=True):
        assert f"{row['instruction']}<|im_end|>" in line
        assert f" {row['output']!r} " in line


def test_a_reward_and_an_engine_of_ones_own_are_named_by_their_class(here: Path):
    (here / "my_own.py").write_text(
        "from lf_lightning import Reward, TransformersEngine\n\n\n"
        "class Count(Reward):\n"
        "    def __init__(self, letter: str, weight: float = 1.0):\n"
        "        self.letter, self.weight = letter, weight\n\n"
        "    def score(self, prompts, responses, batch):\n"
        "        rows = zip(batch.response_ids, responses)\n"
        "        return [len(ids) + response.count(self.letter) for ids, response in rows]\n"
        "\n\nclass Quiet(TransformersEngine):\n"
        "    def generate(self, *arguments, **more):\n"
        "        return [ids[:2] for ids in super().generate(*arguments, **more)]\n"
    )
    changes = reward("my_own.Count", letter="e", weight=0.5) | {f"{INIT}.engine": {"class_path": "my_own.Quiet"}}
    run = fit(here, "PPO", **changes, trainer__max_steps=2)
    row = next(row for row in log_rows(run) if "reward" in row)
    assert row["response_length"] == 2.0
    assert row["reward"] == pytest.approx(1.0, abs=0.2)
    assert lightning("fit", here, merged(rolled("PPO"), changes | {f"{INIT}.rewards": []})) == 2
