"""Every option of ppo and grpo changes what is trained, and odd responses are trained as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lf_lightning import (
    GRPO,
    PPO,
    AdamW,
    BackboneSpec,
    DataModule,
    Full,
    GRPOConstants,
    PPOConstants,
    RewardFunction,
    SamplingSpec,
    ScheduleSpec,
)
from lf_lightning.models import GenerationEngine, TransformersEngine
from tests.cli.runs import LLAMA, ROWS
from tests.stages.contract_rewards import spread
from tests.stages.rollout_runs import CONSTANTS, EXACT, FixedEngine

STOP = 2
SEED = "7"
"""Of the runs: what another test has seeded before must not matter."""
PROMPT_LENGTH = 30
"""Tokens of each of the first nine prompts."""
BACKBONE = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")


class Kept(Callback):
    """What is looked at while it trains."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics.items()
        self.logged.append({name.removeprefix("train/"): float(value) for name, value in metrics})

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.optimizers[0].register_step_post_hook(self.look)

    def look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """The norm of what the optimizer got."""
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        grads = [each.grad for each in parameters if each.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0)


def trained(
    stage: str,
    *,
    engine: GenerationEngine = TransformersEngine(),
    reward: Callable[..., Any] = spread,
    constants: dict[str, Any] = {},  # noqa: B006  # read only
    generation: dict[str, Any] = {},  # noqa: B006
    max_steps: int = 8,
    **changes: Any,
) -> tuple[dict[str, torch.Tensor], Kept]:
    """The weights after a few steps from plain Python, and what was logged on the way."""
    kind: Any = {"PPO": PPO, "GRPO": GRPO}[stage]
    chosen: Any = {"PPO": PPOConstants, "GRPO": GRPOConstants}[stage]
    of_data = {"rollout_size": 6, "global_batch_size": 4, "max_length": 96}
    of_data |= {name: changes.pop(name) for name in list(changes) if name in (*of_data, "max_samples")}
    torch.manual_seed(7)
    model = kind(
        BACKBONE,
        Full(),
        AdamW(lr=1e-2),
        ScheduleSpec(kind="constant"),
        rewards=[RewardFunction(reward)],
        constants=chosen(**{**CONSTANTS[stage], **constants}),
        generation=SamplingSpec(**{**EXACT, **generation}),
        engine=engine,
        **changes,
    )
    records = [{"instruction": row["instruction"]} for row in ROWS]
    data = DataModule(BACKBONE, kind.task, datasets=[{"records": records}], seed=7, cache_dir=None, **of_data)
    kept = Kept()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=max_steps, log_every_n_steps=1, callbacks=[kept], **quiet)
    trainer.fit(model, data)
    return {name: each.detach() for name, each in model.named_parameters()}, kept


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("plain"))
        patch.setenv("PL_GLOBAL_SEED", SEED)
        return {stage: trained(stage)[0] for stage in ("PPO", "GRPO")}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", SEED)


SHARED: dict[str, dict[str, Any]] = {
    "entropy_coef": {"entropy_coef": 0.1},
    "kl_coef": {"kl_coef": 1.0},
    "no reference": {"kl_coef": 0.0},
    "num_epochs": {"num_epochs": 3},
    "missing_eos_penalty": {"missing_eos_penalty": 2.0},
    "score_clip": {"score_clip": 0.3},
    "target_kl": {"target_kl": 1e-4},
    "ratio_threshold": {"ratio_threshold": 1.0001},
}
OF_PPO: dict[str, dict[str, Any]] = {
    **SHARED,
    "gamma": {"gamma": 0.5},
    "gae_lambda": {"gae_lambda": 0.2},
    "clip_range": {"clip_range": 0.001},
    "value_clip_range": {"value_clip_range": 0.001},
    "value_coef": {"value_coef": 1.0},
    "kl_controller": {"kl_controller": "fixed"},
    "kl_target": {"kl_target": 1e-6},
    "kl_horizon": {"kl_horizon": 10},
    "kl_estimator k2": {"kl_estimator": "k2"},
    "kl_estimator k3": {"kl_estimator": "k3"},
    "whiten_rewards": {"whiten_rewards": True},
    "whiten_advantages": {"whiten_advantages": False},
    "score_norm scale": {"score_norm": "scale"},
    "score_norm whiten": {"score_norm": "whiten"},
}
OF_GRPO: dict[str, dict[str, Any]] = {
    **SHARED,
    "group_size": {"group_size": 2},
    "dr_grpo": {"loss": "dr_grpo"},
    "dapo": {"loss": "dapo"},
    "scale_rewards batch": {"scale_rewards": "batch"},
    "scale_rewards none": {"scale_rewards": "none"},
    "importance": {"importance": "sequence"},
    "clip_range_low": {"clip_range_low": 0.001},
    "clip_range_high": {"clip_range_high": 0.001},
    "kl_estimator": {"kl_estimator": "k1"},
    "mask_truncated": {"mask_truncated": True},
}
BASES: dict[str, dict[str, Any]] = {  # what an option needs beside it before it can change anything
    "kl_target": {"kl_horizon": 10},
    "dapo": {},
    "missing_eos_penalty": {"whiten_advantages": False},
}


RESPONSES = [[70, 71, STOP], [80, 81, 82, 83, 84], [90], [91, STOP], [92, 93, 94], [STOP], [95, 96, 97]]
NATURAL = ("kl_target", "ratio_threshold")
"""Options that need a policy that moves towards its responses."""


@cache
def weights_with(stage: str, is_natural: bool, *constants: tuple[str, Any]) -> dict[str, torch.Tensor]:
    engine = TransformersEngine() if is_natural else FixedEngine(RESPONSES)
    return trained(stage, engine=engine, constants=dict(constants), max_steps=16)[0]


@pytest.mark.parametrize(("stage", "name"), [("PPO", name) for name in OF_PPO] + [("GRPO", name) for name in OF_GRPO])
def test_an_option_changes_what_is_trained(stage: str, name: str):
    options = (OF_PPO if stage == "PPO" else OF_GRPO)[name]
    base = BASES.get(name, {}) if stage == "PPO" else {}
    one, other = (weights_with(stage, name in NATURAL, *each.items()) for each in (base, {**base, **options}))
    assert not same(one, other)


def test_the_same_options_train_the_same():
    one = weights_with("PPO", False)
    weights_with.cache_clear()
    assert same(weights_with("PPO", False), one)


@pytest.mark.parametrize("stage", ["PPO", "GRPO"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0.5), ("top_p", 0.3), ("top_k", 2), ("max_new_tokens", 3), ("do_sample", False)],
)
def test_how_responses_are_drawn_changes_what_is_trained(
    stage: str, name: str, value: Any, plain: dict[str, dict[str, torch.Tensor]]
):
    assert not same(trained(stage, generation={name: value})[0], plain[stage])


@pytest.mark.parametrize("stage", ["PPO", "GRPO"])
def test_how_many_are_answered_at_once_changes_no_response(stage: str, plain: dict[str, dict[str, torch.Tensor]]):
    found = trained(stage, generation={"batch_size": 3})[0]
    assert all(torch.allclose(found[name], each, atol=1e-6) for name, each in plain[stage].items())


@pytest.mark.parametrize("size", [4, 12])
def test_the_size_of_a_rollout_changes_what_is_trained(size: int, plain: dict[str, dict[str, torch.Tensor]]):
    assert not same(trained("PPO", rollout_size=size)[0], plain["PPO"])


# ---------------------------------------------------------------------- odd responses


def test_an_empty_response_one_without_a_stop_token_and_one_at_the_limit_are_trained():
    engine = FixedEngine([[STOP], [70, 71, 72, 73, 74], [75, STOP]])
    weights, kept = trained("PPO", engine=engine, max_length=len("<bos>") + 40, max_steps=4)
    assert all(each.isfinite().all() for each in weights.values())
    assert kept.logged[0]["stop_ratio"] == pytest.approx(4 / 6)
    assert kept.logged[0]["response_length"] == pytest.approx((1 + 5 + 2) * 2 / 6)
    assert kept.logged[0]["policy/ratio"] == 1.0


def test_a_prompt_one_short_of_the_limit_is_answered_by_one_token():
    _, kept = trained("PPO", max_length=PROMPT_LENGTH + 1, max_samples=9, max_steps=2)
    assert kept.logged[0]["prompt_length"] == PROMPT_LENGTH
    assert kept.logged[0]["response_length"] == 1.0


def test_responses_of_one_token_each_are_trained():
    for stage in ("PPO", "GRPO"):
        weights, kept = trained(stage, engine=FixedEngine([[STOP]]), max_steps=4)
        assert all(each.isfinite().all() for each in weights.values())
        assert kept.logged[0]["response_length"] == 1.0


def test_equal_scores_of_a_group_push_nothing():
    def always_one(prompts: Any, responses: Any, batch: Any) -> list[float]:
        return [1.0] * len(prompts)

    weights, kept = trained("GRPO", reward=always_one, constants={"kl_coef": 0.0}, max_steps=2)
    assert [row["group/all_equal"] for row in kept.logged] == [1.0, 1.0]
    assert [row["grad_norm"] for row in kept.logged] == [0.0, 0.0]
    assert all(each.isfinite().all() for each in weights.values())


def test_a_dataset_smaller_than_a_rollout_trains():
    _, kept = trained("PPO", max_samples=3, rollout_size=24, global_batch_size=2, max_steps=6)
    assert len(kept.logged) == 6
    assert kept.logged[-1]["reward"] != kept.logged[0]["reward"]  # the second epoch is another rollout


@pytest.mark.parametrize("stage", ["PPO", "GRPO"])
def test_the_gradient_is_clipped_at_every_step(stage: str):
    _, kept = trained(stage, max_grad_norm=1e-3)
    assert len(kept.norms) == 8
    assert all(norm <= 1e-3 * (1 + 1e-4) for norm in kept.norms)
    assert sum(row["grad_norm"] > 1e-3 for row in kept.logged) >= 6


def test_the_policy_is_drawn_from_without_dropout():
    backbone = BackboneSpec(architecture={**LLAMA, "attention_dropout": 0.5}, tokenizer="bytes")
    stage = PPO(backbone, Full(), rewards=[RewardFunction(spread)], generation=SamplingSpec(**EXACT))
    data = DataModule(backbone, "ppo", datasets=[{"records": ROWS}], max_length=96, seed=7, cache_dir=None)
    kept = Kept()
    Trainer(accelerator="cpu", devices=1, max_steps=1, log_every_n_steps=1, callbacks=[kept], logger=False).fit(
        stage, data
    )
    assert kept.logged[0]["policy/ratio"] == 1.0
    assert kept.logged[0]["policy/approxkl"] == 0.0
