"""The step contract for ppo and grpo: from the stored rollout on, layouts and ranks change nothing.

Every case is a real `Trainer.fit` (contract_run.py). Its responses and raw scores are taken as they were drawn, and all
the rest is done again by a plain float64 loop: one response at a time, full logits, the formulas on Python numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lf_lightning.models import Full, ValueHeadSpec, add_value_head, load_backbone
from tests.stages.contract_run import ADAMW, SEED, backbone_spec, exact_norm
from tests.stages.test_contract import byte_ids, chunks, launch
from tests.stages.test_judgement_contract import furthest, texts

NUM_TRAIN, NUM_VAL = 7, 5
MAX_NEW_TOKENS = 9
TRAIN, VAL = texts(11, NUM_TRAIN), texts(12, NUM_VAL)
REWARDS = Path(__file__).with_name("contract_rewards.py")
SPREAD = {"function": f"{REWARDS}:spread"}
LENGTH = {"function": f"{REWARDS}:length", "arguments": {"per": 5.0}, "weight": -0.5}

PPO_DEFAULTS = {
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "value_clip_range": 0.2,
    "value_coef": 0.1,
    "entropy_coef": 0.0,
    "kl_coef": 0.2,
    "kl_controller": "adaptive",
    "kl_target": 6.0,
    "kl_horizon": 10000,
    "kl_estimator": "k1",
    "whiten_rewards": False,
    "whiten_advantages": True,
    "score_norm": "none",
    "score_clip": None,
    "missing_eos_penalty": 0.0,
    "num_epochs": 4,
}
GRPO_DEFAULTS = {
    "group_size": 8,
    "num_epochs": 1,
    "loss": "grpo",
    "scale_rewards": "auto",
    "importance": "token",
    "clip_range_low": 0.2,
    "clip_range_high": 0.2,
    "kl_coef": 0.04,
    "kl_estimator": "k3",
    "entropy_coef": 0.0,
    "mask_truncated": False,
    "missing_eos_penalty": 0.0,
    "score_clip": None,
}

# ---------------------------------------------------------------------- what the papers say, on Python numbers


class Drawn(NamedTuple):
    """A stored response."""

    prompt_ids: list[int]
    ids: list[int]
    is_stopped: bool
    score: float  # weighted sum of the rewards


class Made(NamedTuple):
    """Constants of a response; a number for each token."""

    old: list[float]
    values: list[float]
    reference: list[float]
    advantages: list[float]
    returns: list[float]


def prompt_ids(text: str) -> list[int]:
    return [1, *byte_ids(f"user\n{text}"), 2, *byte_ids("\n"), 1, *byte_ids("assistant\n")]


def said(backbone: Any, each: Drawn, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, values and entropies of the tokens of a response; (T,) each."""
    ids = torch.tensor([each.prompt_ids + each.ids])
    found = backbone.causal_lm(input_ids=ids, use_cache=False, output_hidden_states=True)
    start = len(each.prompt_ids) - 1
    table = (found.logits[0, start:-1] / temperature).log_softmax(-1)
    hidden = found.hidden_states[-1][0, start:-1]
    head = backbone.value_head
    values = hidden @ head.summary.weight[0] + head.summary.bias[0] if head is not None else torch.zeros(len(each.ids))
    log_probs = table.gather(1, torch.tensor(each.ids)[:, None]).squeeze(1)
    return log_probs, values, -(table.exp() * table).sum(1)


def estimate(log_prob: Any, reference: Any, kind: str) -> Any:
    difference = log_prob - reference
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference**2 / 2
    exponential = torch.exp if isinstance(difference, Tensor) else math.exp
    return exponential(-difference) - 1 + difference


def mean_and_deviation(numbers: list[float]) -> tuple[float, float]:
    mean = sum(numbers) / len(numbers)
    variance = sum((number - mean) ** 2 for number in numbers) / max(len(numbers) - 1, 1)
    return mean, variance


def whitened(rows: list[list[float]], *, shift: bool) -> list[list[float]]:
    mean, variance = mean_and_deviation([number for row in rows for number in row])
    return [[(number - mean) / math.sqrt(variance + 1e-8) + (0 if shift else mean) for number in row] for row in rows]


class Controller:
    """What PPO carries from rollout to rollout."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self.constants, self.kl_coef, self.seen = constants, constants["kl_coef"], list[float]()

    def scores(self, drawn: list[Drawn]) -> list[float]:
        c = self.constants
        scores = [each.score - (0 if each.is_stopped else c["missing_eos_penalty"]) for each in drawn]
        self.seen += scores
        mean, variance = mean_and_deviation(self.seen)
        if c["score_norm"] != "none":
            shift = mean if c["score_norm"] == "whiten" else 0.0
            scores = [(score - shift) / (math.sqrt(variance) + 1e-8) for score in scores]
        bound = c["score_clip"] or math.inf
        return [min(max(score, -bound), bound) for score in scores]

    def observe(self, kl: float, num_responses: int) -> None:
        c = self.constants
        if c["kl_controller"] == "adaptive":
            error = min(max(kl / c["kl_target"] - 1, -0.2), 0.2)
            self.kl_coef *= 1 + error * num_responses / c["kl_horizon"]


class Loop:
    """The plain loop of one case, on the responses that were drawn there."""

    def __init__(self, case: dict[str, Any], rollouts: list[Any]) -> None:
        self.case, self.rollouts = case, rollouts
        init, is_ppo = case["init"], case["stage"] == "PPO"
        self.constants = {**(PPO_DEFAULTS if is_ppo else GRPO_DEFAULTS), **init.get("constants", {})}
        self.weights = [reward.get("weight", 1.0) for reward in init["rewards"]]
        generation = init["generation"]
        self.temperature = generation["temperature"] if generation.get("do_sample", True) else 1.0
        spec = backbone_spec(case)
        self.policy = load_backbone(spec, Full(), vocab_size=259, seed=SEED)
        if is_ppo:
            add_value_head(self.policy, ValueHeadSpec(), tuning=Full(), path=None, seed=SEED, keeps_output_layer=True)
        self.policy.double().eval()
        self.reference = load_backbone(spec, Full(), vocab_size=259, seed=SEED).double().eval()
        self.controller = Controller(self.constants) if is_ppo else None

    def drawn(self, number: int) -> list[Drawn]:
        group = 1 if self.controller else self.constants["group_size"]
        per_rollout = self.case["data"]["rollout_size"] // group
        first = number * per_rollout % NUM_TRAIN if NUM_TRAIN % per_rollout == 0 else None
        per_epoch = -(-NUM_TRAIN // per_rollout)
        first = number % per_epoch * per_rollout if first is None else first
        prompts = [text for text in TRAIN[first : first + per_rollout] for _ in range(group)]
        return [
            Drawn(prompt_ids(text), list(ids), stopped, sum(w * s for w, s in zip(self.weights, scores, strict=True)))
            for text, (ids, stopped, scores) in zip(prompts, self.rollouts[number], strict=True)
        ]

    def made(self, drawn: list[Drawn]) -> list[Made]:
        c = self.constants
        with torch.no_grad():
            mine = [said(self.policy, each, self.temperature) for each in drawn]
            theirs = [said(self.reference, each, self.temperature) for each in drawn]
        old, values = [each[0].tolist() for each in mine], [each[1].tolist() for each in mine]
        reference = [each[0].tolist() for each in theirs]
        if self.controller is None:
            advantages = [[a] * len(each.ids) for a, each in zip(self.group_advantages(drawn), drawn, strict=True)]
            return [Made(*row) for row in zip(old, values, reference, advantages, values, strict=True)]
        rewards = [
            [-self.controller.kl_coef * estimate(a, b, c["kl_estimator"]) for a, b in zip(*pair, strict=True)]
            for pair in zip(old, reference, strict=True)
        ]
        for row, score in zip(rewards, self.controller.scores(drawn), strict=True):
            row[-1] += score
        kl = sum(a - b for pair in zip(old, reference, strict=True) for a, b in zip(*pair, strict=True)) / len(drawn)
        if c["kl_coef"]:
            self.controller.observe(kl, len(drawn))
        if c["whiten_rewards"]:
            rewards = whitened(rewards, shift=False)
        advantages = []
        for reward, value in zip(rewards, values, strict=True):
            row: list[float] = []
            for t in range(len(reward)):  # the sum of the definition, not the recursion
                deltas = [
                    reward[k] + c["gamma"] * (value[k + 1] if k + 1 < len(value) else 0.0) - value[k]
                    for k in range(t, len(reward))
                ]
                row.append(sum((c["gamma"] * c["gae_lambda"]) ** k * delta for k, delta in enumerate(deltas)))
            advantages.append(row)
        returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, values, strict=True)]
        if c["whiten_advantages"]:
            advantages = whitened(advantages, shift=True)
        return [Made(*row) for row in zip(old, values, reference, advantages, returns, strict=True)]

    def group_advantages(self, drawn: list[Drawn]) -> list[float]:
        c, found = self.constants, list[float]()
        bound = c["score_clip"] or math.inf
        scores = [each.score - (0 if each.is_stopped else c["missing_eos_penalty"]) for each in drawn]
        scores = [min(max(score, -bound), bound) for score in scores]
        scale = c["scale_rewards"]
        scale = ("none" if c["loss"] == "dr_grpo" else "group") if scale == "auto" else scale
        for group in chunks(scores, c["group_size"]):
            mean, variance = mean_and_deviation(group)
            if scale == "batch":
                _, variance = mean_and_deviation(scores)
            found += [(score - mean) / (1 if scale == "none" else math.sqrt(variance) + 1e-4) for score in group]
        return found

    def loss(self, rows: list[tuple[Drawn, Made]]) -> Tensor:
        return self.ppo_loss(rows) if self.controller else self.grpo_loss(rows)

    def ppo_loss(self, rows: list[tuple[Drawn, Made]]) -> Tensor:
        c, terms = self.constants, []
        for drawn, made in rows:
            log_probs, values, entropies = said(self.policy, drawn, self.temperature)
            for t in range(len(drawn.ids)):
                ratio, a = torch.exp(log_probs[t] - made.old[t]), made.advantages[t]
                policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - c["clip_range"], 1 + c["clip_range"]))
                value = (values[t] - made.returns[t]) ** 2
                if c["value_clip_range"] is not None:
                    near = values[t].clamp(
                        made.values[t] - c["value_clip_range"], made.values[t] + c["value_clip_range"]
                    )
                    value = torch.maximum(value, (near - made.returns[t]) ** 2)
                terms.append(policy + c["value_coef"] * value / 2 - c["entropy_coef"] * entropies[t])
        return torch.stack(terms).mean()

    def grpo_loss(self, rows: list[tuple[Drawn, Made]]) -> Tensor:
        c, per_response, lengths = self.constants, list[Tensor](), list[int]()
        for drawn, made in rows:
            if c["mask_truncated"] and not drawn.is_stopped:
                continue
            log_probs, _, entropies = said(self.policy, drawn, self.temperature)
            old = torch.tensor(made.old, dtype=torch.float64)
            log_ratio = log_probs - old
            if c["importance"] == "sequence":
                log_ratio = log_ratio.mean() + torch.zeros_like(log_ratio)
            ratio, a = torch.exp(log_ratio), made.advantages[0]
            policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - c["clip_range_low"], 1 + c["clip_range_high"]))
            kl = estimate(log_probs, torch.tensor(made.reference, dtype=torch.float64), c["kl_estimator"])
            per_response.append((policy + c["kl_coef"] * kl - c["entropy_coef"] * entropies).sum())
            lengths.append(len(drawn.ids))
        if not lengths:
            return sum((0.0 * each.sum() for each in self.policy.parameters()), torch.zeros(()).double())
        sums = torch.stack(per_response)
        if c["loss"] == "dapo":
            return sums.sum() / sum(lengths)
        return (sums / (torch.tensor(lengths) if c["loss"] == "grpo" else MAX_NEW_TOKENS)).mean()

    def run(self) -> dict[str, Any]:
        parameters = dict(self.policy.causal_lm.named_parameters())
        if self.policy.value_head is not None:
            parameters |= {f"head.{name}": each for name, each in self.policy.value_head.named_parameters()}
        optimizer = torch.optim.AdamW(parameters.values(), weight_decay=0.0, **ADAMW)
        gradients, losses = [], []
        for number in range(len(self.rollouts)):
            drawn = self.drawn(number)
            rows = list(zip(drawn, self.made(drawn), strict=True))
            for epoch in range(self.constants["num_epochs"]):
                order = np.random.default_rng([SEED, 0x2011, number, epoch]).permutation(len(rows))
                for chosen in chunks(order.tolist(), self.case["data"]["global_batch_size"]):
                    loss = self.loss([rows[index] for index in chosen])
                    optimizer.zero_grad()
                    loss.backward()
                    gradients.append({name: each.grad.clone() for name, each in parameters.items()})
                    losses.append(float(loss.detach()))
                    optimizer.step()
        return {"gradients": gradients, "losses": losses}


# ---------------------------------------------------------------------- cases

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded 4": {"micro_batch_size": 4, "layout": "padded"},
    "padded 1": {"micro_batch_size": 1, "layout": "padded"},
    "free 3": {"micro_batch_size": 3, "layout": "padding_free"},
    "tokens": {"micro_batch_tokens": 90, "layout": "padding_free"},
}
FEW = ("padded 1", "free 3")
ONE_AND_TWO_RANKS = [
    pytest.param(1, FEW[:1], id="1"),
    pytest.param(2, FEW[1:], id="2"),
    pytest.param(1, FEW[1:], id="1-rest", marks=pytest.mark.slow),
    pytest.param(2, FEW[:1], id="2-rest", marks=pytest.mark.slow),
]
"""Numbers of ranks, and the layouts in which every option is tried there."""
LONG = {"max_new_tokens": 70}  # so that some responses stop by themselves
SIZES = {"PPO": {"rollout_size": 4, "global_batch_size": 3}, "GRPO": {"rollout_size": 6, "global_batch_size": 4}}


def case(stage: str, constants: dict[str, Any], layout: str, **more: Any) -> dict[str, Any]:
    generation = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.7, "batch_size": 3, **more.pop("generation", {})}
    init = {"rewards": more.pop("rewards", [SPREAD]), "generation": generation, "constants": constants}
    data = {"shuffle": False, "max_length": 200, "template": "auto", **SIZES[stage], **LAYOUTS[layout]}
    data |= more.pop("data", {})
    base = {"tied": False, "dtype": "float64", "attention": "sdpa", "epochs": 1}
    return {**base, "stage": stage, "init": init, "data": data, "layout": layout, **more}


def all_cases(of_options: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Both stages in all layouts, and their options in those."""
    few = {"num_epochs": 2}
    for layout in LAYOUTS:
        yield case("PPO", few, layout, epochs=2)
        yield case("GRPO", {"group_size": 3, "num_epochs": 2}, layout)
    odd = {"gamma": 0.9, "gae_lambda": 0.8, "clip_range": 0.02, "value_clip_range": 0.01, "value_coef": 0.5}
    for layout in of_options:
        yield case("PPO", few | odd | {"entropy_coef": 0.05, "whiten_rewards": True}, layout, tied=True)
        yield case("PPO", few | {"kl_estimator": "k3", "kl_horizon": 20, "value_clip_range": None}, layout, epochs=2)
        scored = {"score_norm": "whiten", "score_clip": 0.6, "missing_eos_penalty": 1.0, "whiten_advantages": False}
        yield case("PPO", few | scored, layout, rewards=[SPREAD, LENGTH], epochs=2, generation=LONG)
        yield case("PPO", few | {"score_norm": "scale", "kl_estimator": "k2", "kl_controller": "fixed"}, layout)
        yield case("PPO", few | {"kl_coef": 0.0}, layout, data={"rollout_size": 12, "global_batch_size": 5})
        group = {"group_size": 2, "num_epochs": 2}
        yield case("GRPO", group | {"loss": "dr_grpo", "kl_coef": 0.0, "clip_range_high": 0.01}, layout)
        dapo = {"loss": "dapo", "clip_range_low": 0.01, "clip_range_high": 0.3, "mask_truncated": True}
        yield case("GRPO", group | dapo | {"entropy_coef": 0.03}, layout, generation=LONG)
        yield case("GRPO", group | {"importance": "sequence", "scale_rewards": "batch", "clip_range_low": 0.01}, layout)
        yield case("GRPO", group | {"kl_estimator": "k1", "score_clip": 0.5, "scale_rewards": "none"}, layout)
    yield case("PPO", few, "free 3", generation={"do_sample": False})
    yield case("PPO", few, "padded 4", dtype="float32")
    yield case("GRPO", {"group_size": 2, "num_epochs": 2}, "tokens", dtype="float32")


def run(cases: list[dict[str, Any]], num_ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    """What every rank saw of every case, from one launch."""
    options: dict[str, Any] = {}
    for key, rows in (("datasets", TRAIN), ("eval_datasets", VAL)):
        (folder / f"{key}.json").write_text(json.dumps([{"instruction": text} for text in rows]))
        options[key] = [{"path": str(folder / f"{key}.json")}]
    named = [{**each, "name": f"case-{i}", "data": {**each["data"], **options}} for i, each in enumerate(cases)]
    return launch(named, num_ranks, folder)


@cache
def right_answer(case_text: str, rollouts_text: str) -> dict[str, Any]:
    return Loop(json.loads(case_text), json.loads(rollouts_text)).run()


def differences(each: dict[str, Any], records: list[dict[str, Any]]) -> Iterator[str]:
    """Where a case departs from the plain loop."""
    shared = {name: each["data"][name] for name in ("rollout_size", "global_batch_size")}
    key = json.dumps({**each, "layout": "", "dtype": each["dtype"], "data": shared})
    tolerance = {"float64": 1e-10, "float32": 1e-5}[each["dtype"]]
    shown = f"{each['stage']} {each['init']['constants']} {each['layout']} {each['dtype']}"
    for rank, record in enumerate(records):
        want = right_answer(key, json.dumps(record["rollouts"]))
        if len(record["gradients"]) != len(want["gradients"]):
            yield f"{shown}, rank {rank}: {len(record['gradients'])} steps, not {len(want['gradients'])}"
        for step, (got, right) in enumerate(zip(record["gradients"], want["gradients"], strict=False)):
            # every step begins with weights that the rounding of the steps before has touched
            if not (distance := furthest(got, right)) <= tolerance * (1 + step):
                yield f"{shown}, rank {rank}, step {step}: gradients differ by {distance:.1e}"
        for step, (got, right) in enumerate(zip(record["losses"], want["losses"], strict=False)):
            if not abs(got - right) <= tolerance * (1 + step) * max(abs(right), 1):
                yield f"{shown}, rank {rank}, step {step}: loss {got}, not {right}"


def unequal(cases: list[dict[str, Any]], records: list[list[dict[str, Any]]]) -> Iterator[str]:
    """Where layouts or ranks of one case draw other responses, or measure something else."""
    first: dict[str, dict[str, Any]] = {}
    for each, ranks in zip(cases, records, strict=True):
        shared = [each[name] for name in ("stage", "init", "tied", "dtype", "epochs")]
        key = json.dumps([*shared, each["data"]["rollout_size"]])
        for record in ranks:
            want = first.setdefault(key, record)
            if record["rollouts"] != want["rollouts"]:
                yield f"{key} {each['layout']}: other responses"
            for name, value in want["val"].items():
                if record["val"][name] != pytest.approx(value, rel=1e-9, abs=1e-9):
                    yield f"{key} {each['layout']} {name}: {record['val'][name]}, not {value}"
            if [sample[1:4] for sample in record["samples"]] != [sample[1:4] for sample in want["samples"]]:
                yield f"{key} {each['layout']}: other samples"


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


@pytest.mark.parametrize(("num_ranks", "of_options"), ONE_AND_TWO_RANKS)
def test_no_layout_and_no_number_of_ranks_changes_gradients_losses_or_metrics(
    num_ranks: int, of_options: tuple[str, ...], tmp_path: Path
) -> None:
    cases = list(all_cases(of_options))
    records = run(cases, num_ranks, tmp_path)
    found = [line for each, ranks in zip(cases, records, strict=True) for line in differences(each, ranks)]
    found += list(unequal(cases, records))
    assert not found, "\n".join(found)


def test_five_prompts_on_three_ranks_need_fillers_that_add_nothing(tmp_path: Path) -> None:
    sizes = {"rollout_size": 5, "global_batch_size": 5, "max_samples": 5}
    cases = [case("PPO", {"num_epochs": 2}, layout, data=sizes) for layout in ("padded 1", "free 3")]
    records = run(cases, 3, tmp_path)
    found = [line for each, ranks in zip(cases, records, strict=True) for line in differences(each, ranks)]
    assert not found, "\n".join(found)
    shares = [units for ranks in records for each in ranks for step in each["micro_batches"] for units, _, _ in step]
    assert 0 in shares, "no case had a filler"
    assert sum(sum(each["evaluated_units"]) for each in records[0]) == NUM_VAL


def test_the_ratio_is_exactly_1_at_the_first_minibatch(tmp_path: Path) -> None:
    cases = [
        case(stage, {"num_epochs": 2} | group, layout, dtype="float32")
        for stage, group in (("PPO", {}), ("GRPO", {"group_size": 2}))
        for layout in LAYOUTS
    ]
    for (record,) in run(cases, 1, tmp_path):
        first = record["logged"][0]
        assert first["train/policy/ratio"] == 1.0
        assert first["train/policy/approxkl"] == first["train/policy/policykl"] == first["train/policy/clipfrac"] == 0
        assert record["logged"][-1]["train/policy/ratio"] != 1.0
