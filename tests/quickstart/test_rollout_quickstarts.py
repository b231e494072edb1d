"""The quickstarts of ppo and grpo, and a rule that one token satisfies: the score rises from chance."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.quickstart.test_quickstarts import SEEDS, clock, lf_lightning, log, opened

HELD_OUT = 100
STEPS = {"ppo": 160, "grpo": 60}
"""Enough for more than nine tenths, with a constant rate."""


def scores(folder: Path) -> tuple[float, float]:
    """Mean score of the first rollout, and of the greedy answers at the end."""
    rows = log(folder)
    first = next(row["reward"] for row in rows if "reward" in row)
    return first, [row["eval_reward"] for row in rows if "eval_reward" in row][-1]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_first_steps_of_a_quickstart_bring_the_score_from_chance_to_above_nine_tenths(stage: str, tmp_path: Path):
    options = {"max_steps": STEPS[stage], "log_every_n_steps": 1, "val_check_interval": STEPS[stage]}
    more = [f"--trainer.{name}={value}" for name, value in options.items()]
    run = ["--config", f"configs/{stage}/quickstart.yaml", f"--trainer.default_root_dir={tmp_path}"]
    lf_lightning("fit", *run, *more, "--model.init_args.schedule.kind=constant")
    first, last = scores(tmp_path)
    assert 0 < first < 0.2
    assert last > 0.9
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == HELD_OUT
    loud, soft = ([each for each in samples if word in each["prompt"]] for word in ("loudly", "softly"))
    for part in (loud, soft):  # it is the prompt that decides
        assert sum(each["reward"] for each in part) > 0.8 * len(part) > 0
    model, tokenizer = opened(tmp_path / "final")
    assert model.num_parameters() > 600_000
    assert tokenizer.chat_template


EMIT: dict[str, Any] = {
    "seed_everything": 7,
    "trainer": {
        "max_steps": 60,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "val_check_interval": 60,
    },
    "checkpoint": {"every_n_steps": None},
    "model": {
        "init_args": {
            "backbone": {
                "architecture": {
                    "model_type": "llama",
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "max_position_embeddings": 256,
                    "initializer_range": 0.05,
                },
                "tokenizer": "bytes",
            },
            "tuning": {"class_path": "Full"},
            "optimizer": {"class_path": "AdamW", "init_args": {"lr": 5e-3, "betas": [0.9, 0.98]}},
            "schedule": {"kind": "constant"},
            "rewards": [
                {
                    "class_path": "RewardFunction",
                    "init_args": {"function": "lf_lightning.quickstart.rewards:holds", "arguments": {"text": "X"}},
                }
            ],
            "generation": {"max_new_tokens": 8, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "batch_size": 64},
        },
    },
    "data": {
        "datasets": ["pairs"],
        "eval_datasets": ["pairs_heldout"],
        "dataset_dir": str(ROOT / "lf_lightning" / "quickstart"),
        "max_length": 96,
        "rollout_size": 64,
        "global_batch_size": 64,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["PPO", "GRPO"])
def test_a_policy_learns_to_emit_one_token(stage: str, tmp_path: Path):
    config = json.loads(json.dumps(EMIT))
    config["trainer"]["default_root_dir"] = str(tmp_path / "run")
    config["model"]["class_path"] = stage
    config["model"]["init_args"]["constants"] = {"kl_coef": 0.0, **({"num_epochs": 2} if stage == "GRPO" else {})}
    (tmp_path / "emit.yaml").write_text(yaml.safe_dump(config))
    lf_lightning("fit", "--config", str(tmp_path / "emit.yaml"))
    first, last = scores(tmp_path / "run")
    assert first < 0.1
    assert last > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_whole_quickstart_scores_more_than_nine_tenths_on_held_out_prompts(stage: str, seed: int, tmp_path: Path):
    start = clock()
    options = [f"--seed_everything={seed}", f"--trainer.default_root_dir={tmp_path}"]
    lf_lightning("fit", "--config", f"configs/{stage}/quickstart.yaml", *options)
    wall, busy = (after - before for before, after in zip(start, clock(), strict=True))
    first, last = scores(tmp_path)
    assert first < 0.2
    assert last > 0.9
    assert [row["reward"] for row in log(tmp_path) if "reward" in row][-1] > 0.9  # drawn, not greedy
    print(f"\n| {stage} | {seed} | {last:.2f} | {wall:.0f} | {busy:.0f} |")
