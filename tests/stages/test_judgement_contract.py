"""The step contract for rm, dpo and kto: layouts, ranks, shared prompts and stored references change nothing.

Every case is a real `Trainer.fit` (contract_run.py) and is compared with a plain PyTorch loop in float64: one response
at a time, full logits, the formulas written out by hand over all units of the step.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, softplus
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lf_lightning.models import Full, ValueHeadSpec, add_value_head, load_backbone
from tests.stages.contract_run import ADAMW, SEED, backbone_spec, exact_norm
from tests.stages.test_contract import byte_ids, chunks, launch

NUM_TRAIN, NUM_VAL, STEP = 10, 5, 4
BETA = 0.3
CHATML_END = [2, *byte_ids("\n")]


class Pair(NamedTuple):
    """A prompt with its two responses, as text."""

    prompt: str
    chosen: str
    rejected: str
    margin: float


def texts(seed: int, number: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdefgh ") for _ in range(draw.randint(3, 14))) + "!" for _ in range(number)]


@cache
def pairs(seed: int, number: int) -> list[Pair]:
    parts = [texts(seed + shift, number) for shift in (0, 100, 200)]
    return [Pair(*row, margin=index % 3 / 2) for index, row in enumerate(zip(*parts, strict=True))]


def is_liked(index: int) -> bool:
    return index % 3 != 1


Rows = list[tuple[int, Pair]]
"""Position in the file, and what is there."""

TRAIN, VAL = pairs(1, NUM_TRAIN), pairs(2, NUM_VAL)


def write_rows(folder: Path) -> dict[str, dict[str, Any]]:
    ranked = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    liked = {"prompt": "instruction", "response": "output", "kto_tag": "liked"}
    options: dict[str, dict[str, Any]] = {"ranked": {}, "liked": {}}
    for key, rows in (("datasets", TRAIN), ("eval_datasets", VAL)):
        both = [{"instruction": r.prompt, "chosen": r.chosen, "rejected": r.rejected, "margin": r.margin} for r in rows]
        one = [{"instruction": r.prompt, "output": r.chosen, "liked": is_liked(i)} for i, r in enumerate(rows)]
        (folder / f"ranked_{key}.json").write_text(json.dumps(both))
        (folder / f"liked_{key}.json").write_text(json.dumps(one))
        options["ranked"][key] = [{"path": str(folder / f"ranked_{key}.json"), "ranking": True, "columns": ranked}]
        options["liked"][key] = [{"path": str(folder / f"liked_{key}.json"), "columns": liked}]
    scored = {
        key: [{**entry, "columns": {**ranked, "margin": "margin"}}] for key, (entry,) in options["ranked"].items()
    }
    return {"RM": scored, "DPO": options["ranked"], "KTO": options["liked"]}


# ---------------------------------------------------------------------- formulas, written out


def log_prob(model: Any, prompt: str, response: str) -> Tensor:
    """Log-prob of each token of a response; (T,)."""
    before = [1, *byte_ids(f"user\n{prompt}"), 2, *byte_ids("\n"), 1, *byte_ids("assistant\n")]
    answer = [*byte_ids(response), *CHATML_END]
    logits = model(input_ids=torch.tensor([before + answer]), use_cache=False).logits[0]
    table = logits[len(before) - 1 : -1].log_softmax(-1)
    return table.gather(1, torch.tensor(answer)[:, None]).squeeze(1)


class Numbers(NamedTuple):
    """Of the units of a step: log-ratios, policy means and reference-free lengths; (U,) each."""

    chosen: Tensor
    rejected: Tensor
    mean_chosen: Tensor
    mean_rejected: Tensor
    policy_mean_chosen: Tensor
    policy_mean_rejected: Tensor


def pair_numbers(policy: Any, reference: Any, rows: list[Pair], ld_alpha: float = 1.0) -> Numbers:
    columns: list[list[Tensor]] = [[] for _ in Numbers._fields]
    for row in rows:
        sides = []
        for model in (policy, reference):
            both = [log_prob(model, row.prompt, text) for text in (row.chosen, row.rejected)]
            common = min(len(part) for part in both)
            sides.append([(part[:common].sum() + ld_alpha * part[common:].sum(), len(part)) for part in both])
        (pc, lc), (pr, lr) = sides[0]
        (rc, _), (rr, _) = [(value.detach(), length) for value, length in sides[1]]
        values = (pc - rc, pr - rr, (pc - rc) / lc, (pr - rr) / lr, pc / lc, pr / lr)
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    return Numbers(*map(torch.stack, columns))


def odds(mean: Tensor) -> Tensor:
    return mean - torch.log(1 - torch.exp(mean))


def kto_pair(n: Numbers) -> Tensor:
    kl_chosen, kl_rejected = (ratio.mean().clamp(min=0).detach() for ratio in (n.chosen, n.rejected))
    halves = torch.sigmoid(BETA * (n.chosen - kl_rejected)), torch.sigmoid(BETA * (kl_chosen - n.rejected))
    return 1 - (halves[0] + halves[1]) / 2


def discopop(n: Numbers) -> Tensor:
    x = BETA * (n.chosen - n.rejected)
    share = torch.sigmoid(x / 0.05)
    return (1 - share) * softplus(-x) + share * torch.exp(-x)


def exo(n: Numbers, e: float = 1e-3) -> Tensor:
    q = torch.sigmoid(BETA * (n.chosen - n.rejected))
    return q * (torch.log(q) - math.log(1 - e)) + (1 - q) * (torch.log(1 - q) - math.log(e))


FORMULAS: dict[str, Callable[[Numbers], Tensor]] = {
    "sigmoid": lambda n: -logsigmoid(BETA * (n.chosen - n.rejected)),
    "hinge": lambda n: relu(1 - BETA * (n.chosen - n.rejected)),
    "ipo": lambda n: (n.mean_chosen - n.mean_rejected - 1 / (2 * BETA)) ** 2,
    "kto_pair": kto_pair,
    "robust": lambda n: (
        (-0.9 * logsigmoid(BETA * (n.chosen - n.rejected)) + 0.1 * logsigmoid(-BETA * (n.chosen - n.rejected))) / 0.8
    ),
    "exo_pair": exo,
    "nca_pair": lambda n: (
        -logsigmoid(BETA * n.chosen) - 0.5 * logsigmoid(-BETA * n.chosen) - 0.5 * logsigmoid(-BETA * n.rejected)
    ),
    "bco_pair": lambda n: -logsigmoid(BETA * n.chosen) - logsigmoid(-BETA * n.rejected),
    "sppo_hard": lambda n: (n.chosen - 0.5 / BETA) ** 2 + (n.rejected + 0.5 / BETA) ** 2,
    "apo_zero": lambda n: 1 - torch.sigmoid(BETA * n.chosen) + torch.sigmoid(BETA * n.rejected),
    "apo_down": lambda n: torch.sigmoid(BETA * n.chosen) + 1 - torch.sigmoid(BETA * (n.chosen - n.rejected)),
    "discopop": discopop,
    "sigmoid_norm": lambda n: -logsigmoid(BETA * (n.mean_chosen - n.mean_rejected)),
    "orpo": lambda n: (
        -n.policy_mean_chosen - BETA * logsigmoid(odds(n.policy_mean_chosen) - odds(n.policy_mean_rejected))
    ),
    "simpo": lambda n: -logsigmoid(BETA * (n.policy_mean_chosen - n.policy_mean_rejected) - 0.5),
}


class Baseline:
    """The running mean of BCO: one observation a step, in training only."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def observe(self, n: Numbers) -> None:
        self.seen.append(float(BETA * (n.chosen.mean() + n.rejected.mean()).detach() / 2))

    @property
    def delta(self) -> float:
        return sum(self.seen) / max(len(self.seen), 1)


def dpo_losses(init: dict[str, Any], n: Numbers, baseline: Baseline, *, training: bool) -> Tensor:
    loss = FORMULAS[init["loss"]](n)
    if weight := init.get("bco_weight"):
        if training:
            baseline.observe(n)
        bco = -logsigmoid(BETA * n.chosen - baseline.delta) - logsigmoid(baseline.delta - BETA * n.rejected)
        loss = (loss + weight * bco) / (1 + weight)
    return loss - init.get("ftx", 0.0) * n.policy_mean_chosen


def kto_losses(init: dict[str, Any], models: tuple[Any, Any], rows: Rows, partners: list[str | None]) -> Tensor:
    policy, reference = models
    ratios, means, kl = [], [], []
    for (_, row), partner in zip(rows, partners, strict=True):
        mine = log_prob(policy, row.prompt, row.chosen)
        ratios.append(mine.sum() - log_prob(reference, row.prompt, row.chosen).sum().detach())
        means.append(mine.mean())
        if partner is not None:
            with torch.no_grad():
                kl.append((log_prob(policy, row.prompt, partner) - log_prob(reference, row.prompt, partner)).sum())
    ratio, mean = torch.stack(ratios), torch.stack(means)
    z = torch.stack(kl).mean().clamp(min=0) if kl else torch.zeros(())
    liked = torch.tensor([is_liked(index) for index, _ in rows])
    if init["loss"] == "kto":
        good, bad = 1 - torch.sigmoid(BETA * (ratio - z)), 1 - torch.sigmoid(BETA * (z - ratio))
    else:
        good, bad = 1 - torch.sigmoid(BETA * ratio), torch.sigmoid(BETA * ratio)
    losses = torch.where(liked, init.get("desirable_weight", 1.0) * good, init.get("undesirable_weight", 1.0) * bad)
    return losses - init.get("ftx", 0.0) * torch.where(liked, mean, 0.0)


def rm_losses(init: dict[str, Any], backbone: Any, rows: list[Pair]) -> Tensor:
    losses = []
    for row in rows:
        scores = []
        for text in (row.chosen, row.rejected):
            before = [1, *byte_ids(f"user\n{row.prompt}"), 2, *byte_ids("\n"), 1, *byte_ids("assistant\n")]
            ids = torch.tensor([[*before, *byte_ids(text), *CHATML_END]])
            hidden = backbone.causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            head = backbone.value_head.summary
            scores.append(hidden @ head.weight[0] + head.bias[0])
        loss = -logsigmoid(scores[0] - scores[1] - row.margin)
        losses.append(loss + init.get("centering", 0.0) * (scores[0] + scores[1]) ** 2)
    return torch.stack(losses)


def partners_of(rows: Rows, everything: list[Pair], *, fixed: bool) -> list[str | None]:
    """The response that each row of a step is held against: the next one's, or always that of the row before."""
    if fixed:
        return [everything[index - 1].chosen for index, _ in rows]
    responses = [row.chosen for _, row in rows]
    return [None] if len(rows) == 1 else [*responses[1:], responses[0]]


class Loop:
    """The plain loop of one case."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case, self.init = case, case["init"]
        spec = backbone_spec(case)
        self.policy = load_backbone(spec, Full(), vocab_size=259, seed=SEED)
        if case["stage"] == "RM":
            add_value_head(self.policy, ValueHeadSpec(), tuning=Full(), path=None, seed=SEED)
        self.policy.double().eval()
        self.reference = load_backbone(spec, Full(), vocab_size=259, seed=SEED).double().causal_lm.eval()
        self.baseline = Baseline()

    def losses(self, rows: Rows, *, training: bool) -> Tensor:
        model, stage = self.policy.causal_lm, self.case["stage"]
        if stage == "RM":
            return rm_losses(self.init, self.policy, [row for _, row in rows])
        if stage == "DPO":
            n = pair_numbers(model, self.reference, [row for _, row in rows], self.init.get("ld_alpha", 1.0))
            return dpo_losses(self.init, n, self.baseline, training=training)
        everything = TRAIN if training else VAL
        partners = partners_of(rows, everything, fixed=self.case["data"].get("kl_pairs") == "dataset")
        return kto_losses(self.init, (model, self.reference), rows, partners)

    def run(self) -> dict[str, Any]:
        parameters = dict(self.policy.causal_lm.named_parameters())
        if self.policy.value_head is not None:
            parameters |= {f"head.{name}": each for name, each in self.policy.value_head.named_parameters()}
        trained = {name: each for name, each in parameters.items() if each.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), weight_decay=0.0, **ADAMW)
        gradients, losses = [], []
        for rows in chunks(list(enumerate(TRAIN)), self.case["data"]["global_batch_size"]) * self.case["epochs"]:
            loss = self.losses(rows, training=True).mean()
            optimizer.zero_grad()
            loss.backward()
            gradients.append({name: each.grad.clone() for name, each in trained.items()})
            losses.append(float(loss.detach()))
            optimizer.step()
        with torch.no_grad():
            val = float(self.losses(list(enumerate(VAL)), training=False).mean())
        return {"gradients": gradients, "losses": losses, "val": val}


# ---------------------------------------------------------------------- cases

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded 4": {"micro_batch_size": 4, "layout": "padded", "eval_micro_batch_size": 5},
    "padded 1": {"micro_batch_size": 1, "layout": "padded", "eval_micro_batch_size": 2},
    "apart 2": {"micro_batch_size": 2, "layout": "padding_free", "share_prompt": False, "eval_micro_batch_size": 3},
    "shared 3": {"micro_batch_size": 3, "layout": "padding_free", "share_prompt": True, "eval_micro_batch_size": 1},
    "tokens": {"micro_batch_tokens": 150, "layout": "padding_free"},
}
FEW = ("padded 1", "shared 3")
ONE_AND_TWO_RANKS = [
    pytest.param(1, (FEW[0], "tokens"), id="1"),
    pytest.param(2, (FEW[1], "padded 4"), id="2"),
    pytest.param(1, (FEW[1], "apart 2"), id="1-rest", marks=pytest.mark.slow),
    pytest.param(2, (FEW[0], "apart 2"), id="2-rest", marks=pytest.mark.slow),
]
"""Numbers of ranks, and the layouts of options there: of most of them, and of those that act on parts of responses."""


def case(stage: str, init: dict[str, Any], layout: str, **more: Any) -> dict[str, Any]:
    data = {"shuffle": False, "max_length": 200, "global_batch_size": STEP, "template": "auto"}
    special = more.pop("data", {})
    data |= LAYOUTS[layout] | special
    shown = "-".join(f"{value}" for value in (stage, *init.values(), *more.values(), *special.values(), layout))
    name = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in shown)
    base = {"tied": False, "dtype": "float64", "attention": "sdpa", "epochs": 1}
    return {**base, "name": name, "stage": stage, "init": init, "data": data, **more}


def all_cases(of_options: str, of_parts: str) -> list[dict[str, Any]]:
    """All stages in all layouts, and their losses and options in one."""
    cases = []
    for loss in FORMULAS:
        init: dict[str, Any] = {"loss": loss, "beta": BETA}
        if loss == "robust":
            init["constants"] = {"label_smoothing": 0.1}
        cases += [
            case("DPO", init, layout) for layout in (LAYOUTS if loss in ("sigmoid", "kto_pair") else (of_options,))
        ]
    sigmoid = {"loss": "sigmoid", "beta": BETA}
    stored = {"reference": {"precompute": True}}
    cases.append(case("DPO", {**sigmoid, "bco_weight": 0.5, "ftx": 0.2}, of_parts, epochs=2))
    cases.append(case("DPO", {**sigmoid, "ld_alpha": 0.4}, of_parts, tied=True))
    cases.append(case("DPO", {**sigmoid, "ld_alpha": 0.4, **stored}, of_parts))
    for init in (
        {"loss": "kto", "beta": BETA},
        {"loss": "kto", "beta": BETA, "ftx": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        {"loss": "apo_zero_unpaired", "beta": BETA},
    ):
        cases += [case("KTO", init, layout) for layout in (LAYOUTS if init["loss"] == "kto" else (of_options,))]
    kto = {"loss": "kto", "beta": BETA}
    cases.append(case("KTO", {**kto, "ftx": 0.1}, of_options, data={"kl_pairs": "dataset"}))
    cases.append(case("KTO", {**kto, **stored}, of_options, epochs=2))
    cases.append(case("KTO", kto, of_options, data={"global_batch_size": 3}))  # a last step of one
    for layout in LAYOUTS:
        cases.append(case("RM", {}, layout, tied=layout == "tokens"))
        cases.append(case("RM", {"centering": 0.1}, layout, epochs=2))
    cases.append(case("DPO", sigmoid, "shared 3", dtype="float32"))
    cases.append(case("KTO", kto, "tokens", dtype="float32"))
    cases.append(case("RM", {"centering": 0.01}, "shared 3", dtype="float32"))
    return cases


def run(cases: list[dict[str, Any]], num_ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    """What every rank saw of every case, from one launch."""
    rows = write_rows(folder)
    return launch([{**each, "data": {**each["data"], **rows[each["stage"]]}} for each in cases], num_ranks, folder)


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference of any entry, relative to the largest entry of its tensor; some are zero by right."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-4)) for name in want)


@cache
def right_answer(key: str) -> dict[str, Any]:
    return Loop(json.loads(key)).run()


def differences(each: dict[str, Any], records: list[dict[str, Any]]) -> list[str]:
    """Where a case departs from the plain loop."""
    data = {name: each["data"][name] for name in ("kl_pairs", "global_batch_size") if name in each["data"]}
    want = right_answer(json.dumps({**each, "name": "", "data": data}))
    tolerance, found = {"float64": 1e-10, "float32": 1e-5}[each["dtype"]], []
    for rank, record in enumerate(records):
        place = f"{each['name']}, rank {rank}"
        if len(record["gradients"]) != len(want["gradients"]):
            found.append(f"{place}: {len(record['gradients'])} steps, not {len(want['gradients'])}")
        for step, (got, right) in enumerate(zip(record["gradients"], want["gradients"], strict=False)):
            # every step begins with weights that the rounding of the steps before has touched
            if not (distance := furthest(got, right)) <= tolerance * (1 + step):
                found.append(f"{place}, step {step}: gradients differ by {distance:.1e}")
        values = [*zip(record["losses"], want["losses"], strict=False), (record["val"]["val/loss"], want["val"])]
        found += [f"{place}: loss {a}, not {b}" for a, b in values if not abs(a - b) <= tolerance * max(abs(b), 1)]
    return found


def metric_differences(cases: list[dict[str, Any]], records: list[list[dict[str, Any]]]) -> list[str]:
    """Where metrics of one case differ between its layouts or ranks."""
    first: dict[str, tuple[str, dict[str, float]]] = {}
    found = []
    for each, ranks in zip(cases, records, strict=True):
        key = json.dumps([each[name] for name in ("stage", "init", "tied", "dtype", "epochs")])
        key += json.dumps([each["data"]["global_batch_size"], each["data"].get("kl_pairs")])
        for record in ranks:
            name, want = first.setdefault(key, (each["name"], record["val"]))
            got = record["val"]
            found += [
                f"{each['name']} {metric}: {got[metric]}, in {name} {value}"
                for metric, value in want.items()
                if got[metric] != pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True)
            ]
    return found


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


@pytest.mark.parametrize(("num_ranks", "layouts"), ONE_AND_TWO_RANKS)
def test_no_layout_and_no_number_of_ranks_changes_gradients_losses_or_metrics(
    num_ranks: int, layouts: tuple[str, str], tmp_path: Path
) -> None:
    cases = all_cases(*layouts)
    assert len({each["name"] for each in cases}) == len(cases)
    records = run(cases, num_ranks, tmp_path)
    found = [line for each, ranks in zip(cases, records, strict=True) for line in differences(each, ranks)]
    found += metric_differences(cases, records)
    assert not found, "\n".join(found)


def test_on_three_ranks_fillers_add_nothing(tmp_path: Path) -> None:
    sizes = {"micro_batch_size": 1, "layout": "padded", "global_batch_size": 4}
    cases = [
        case("RM", {}, "padded 1", data=sizes),
        case("DPO", {"loss": "kto_pair", "beta": BETA, "ftx": 0.1}, "padded 1", data=sizes),
        case("KTO", {"loss": "kto", "beta": BETA}, "padded 1", data=sizes),
        case("KTO", {"loss": "kto", "beta": BETA, "ftx": 0.2}, "shared 3"),
    ]
    records = run(cases, 3, tmp_path)
    found = [line for each, ranks in zip(cases, records, strict=True) for line in differences(each, ranks)]
    assert not found, "\n".join(found)
    shares = [
        units for ranks in records for record in ranks for step in record["micro_batches"] for units, _, _ in step
    ]
    assert 0 in shares, "no case had a filler"
