"""The step contract under FSDP2: two ranks that share one model against one process that holds it, for every stage.

Every case is a real `Trainer.fit` (contract_run.py, one start-up for each side). What one process does is held against
plain PyTorch in test_contract.py, test_judgement_contract.py and test_rollout_contract.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from lf_lightning.models import Full, load_backbone
from tests.ranks import made_once
from tests.stages import test_contract, test_judgement_contract, test_rollout_contract
from tests.stages.contract_run import SEED, backbone_spec
from tests.stages.test_judgement_contract import furthest

STAGES = ("PT", "SFT", "RM", "DPO", "KTO", "PPO", "GRPO")
LAYOUTS = {  # of sizes that give two ranks unequal shares, and one of them a filler
    "padded": {"micro_batch_size": 1, "eval_micro_batch_size": 2, "layout": "padded"},
    "free": {"micro_batch_size": 2, "eval_micro_batch_size": 1, "layout": "padding_free"},
}
KINDS = (("Full", False), ("Full", True), ("LoRA", False))
"""Tuning, and whether embedding and output layer are one tensor."""
INIT: dict[str, dict[str, Any]] = {
    "SFT": {"loss": "asft", "asft_alpha": 0.5},
    "DPO": {"loss": "sigmoid", "beta": 0.3, "bco_weight": 0.5, "ftx": 0.2},
    "KTO": {"loss": "kto", "beta": 0.3},
    "RM": {"centering": 0.1},
    "PPO": {"constants": {"num_epochs": 2}},
    "GRPO": {"constants": {"group_size": 2, "num_epochs": 1}},
}


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The data of every stage."""
    data = {**test_contract.write_rows(folder), **test_judgement_contract.write_rows(folder)}
    prompts: dict[str, Any] = {}
    for key, texts in (("datasets", test_rollout_contract.TRAIN), ("eval_datasets", test_rollout_contract.VAL)):
        (folder / f"prompts_{key}.json").write_text(json.dumps([{"instruction": text} for text in texts]))
        prompts[key] = [{"path": str(folder / f"prompts_{key}.json")}]
    return {**data, **{stage: {**prompts, **test_rollout_contract.SIZES[stage]} for stage in ("PPO", "GRPO")}}


def cases(folder: Path) -> Iterator[dict[str, Any]]:
    rows = rows_of(folder)
    for tied in (False, True):
        base = {"tied": tied, "dtype": "float64", "attention": "sdpa"}
        model = load_backbone(backbone_spec(base), Full(), vocab_size=259, seed=SEED)
        model.causal_lm.save_pretrained(folder / f"base-{tied}")
    for index, (stage, (tuning, tied)) in enumerate(product(STAGES, KINDS)):
        init = dict(INIT.get(stage, {}))
        if stage in ("PPO", "GRPO"):
            generation = {"max_new_tokens": 6, "temperature": 0.7, "batch_size": 3}
            init |= {"rewards": [test_rollout_contract.SPREAD], "generation": generation}
        layout = LAYOUTS["padded" if index % 2 else "free"]
        data = {"shuffle": False, "max_length": 200, "global_batch_size": 3, **rows[stage], **layout}
        if stage != "PT":
            data["template"] = "auto"
        if stage in ("PPO", "GRPO"):
            data.pop("eval_micro_batch_size")
        yield {
            "name": f"{stage}-{tuning}-{'tied' if tied else 'untied'}",
            "stage": stage,
            "strategy": "fsdp2",
            "tuning": tuning,
            "base": str(folder / f"base-{tied}"),
            "dtype": "float64",
            "attention": "sdpa",
            "epochs": 1,
            "init": init,
            "data": data,
        }


Pairs = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Case -> what one process saw, and what each of two ranks did."""

    def make(folder: Path) -> None:
        listed = list(cases(folder))
        alone, shared = (test_contract.launch(listed, number, folder / f"{number}") for number in (1, 2))
        pairs = {each["name"]: (one, two) for each, (one,), two in zip(listed, alone, shared, strict=True)}
        torch.save(pairs, folder / "seen.pt")

    found: Pairs = torch.load(made_once(tmp_path_factory, "sharded", make) / "seen.pt", weights_only=False)
    return found


@pytest.mark.parametrize("name", [f"{s}-{t}-{'tied' if tied else 'untied'}" for s, (t, tied) in product(STAGES, KINDS)])
def test_two_ranks_that_share_a_model_train_and_measure_as_one_process_does(seen: Pairs, name: str) -> None:
    alone, shared = seen[name]
    assert len(alone["gradients"]) > 2
    for found in shared:
        assert found["rollouts"] == alone["rollouts"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-9)
        assert found["val"] == {key: pytest.approx(value, rel=1e-9, abs=1e-9) for key, value in alone["val"].items()}
        for step, (got, want) in enumerate(zip(found["gradients"], alone["gradients"], strict=True)):
            assert furthest(got, want) <= 1e-9 * (1 + step), f"step {step}"


def test_with_adapters_only_these_are_trained_and_all_of_them(seen: Pairs) -> None:
    for stage in STAGES:
        for record in seen[f"{stage}-LoRA-untied"][1]:
            names = set(record["gradients"][-1])
            assert {name for name in names if "lora_" not in name} <= {"head.summary.weight", "head.summary.bias"}
            assert all(gradient.any() for gradient in record["gradients"][-1].values())
