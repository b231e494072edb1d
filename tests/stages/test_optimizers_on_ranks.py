"""Optimizers on two ranks, which hold whole weights or share them, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lf_lightning.models import Full, load_backbone
from tests.stages import contract_run, test_contract
from tests.stages.contract_run import SEED, backbone_spec
from tests.stages.test_contract import furthest

STEPS = 4
ADAM: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2}
LOW: dict[str, Any] = {"rank": 4, "interval": 2}
CASES: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "ddp-8bit": ("ddp", "AdamW8bit", {**ADAM, "min_8bit_size": 64}, "Full", "float32"),
    "ddp-adafactor": ("ddp", "Adafactor", {"lr": 1e-2, "eps": [1e-4, 1e-3]}, "Full", "float32"),
    "ddp-muon": ("ddp", "Muon", ADAM, "Full", "float32"),
    "ddp-galore": ("ddp", "GaLore", {**ADAM, **LOW}, "Full", "float32"),
    "ddp-apollo": ("ddp", "APOLLO", {**ADAM, **LOW}, "Full", "float32"),
    "ddp-mini": ("ddp", "AdamMini", ADAM, "Full", "float32"),
    "ddp-plus": ("ddp", "LoRAPlus", ADAM, "LoRA", "float32"),
    "ddp-stochastic": ("ddp", "AdamW", {**ADAM, "weights": "stochastic"}, "Full", "bfloat16"),
    "fsdp2-muon": ("fsdp2", "Muon", ADAM, "Full", "float32"),
    "fsdp2-plus": ("fsdp2", "LoRAPlus", ADAM, "LoRA", "float32"),
    "fsdp2-kahan": ("fsdp2", "AdamW", {**ADAM, "weights": "kahan"}, "Full", "bfloat16"),
    "fsdp2-stochastic": ("fsdp2", "AdamW", {**ADAM, "weights": "stochastic"}, "Full", "bfloat16"),
}
"""Strategy, optimizer, options, tuning, type of the weights."""
# What rounding comes to: bfloat16 weights and iterations, quantized moments.
FAR: dict[str, float] = {
    "ddp-8bit": 2e-2,
    "ddp-muon": 2e-2,
    "ddp-stochastic": 3e-2,
    "fsdp2-muon": 2e-2,
    "fsdp2-kahan": 3e-2,
    "fsdp2-stochastic": 3e-2,
}


def case(name: str, folder: Path) -> dict[str, Any]:
    strategy, optimizer, options, tuning, dtype = CASES[name]
    return {
        "name": name,
        "stage": "PT",
        "strategy": strategy,
        "tuning": tuning,
        "base": str(folder / "base"),
        "dtype": dtype,
        "attention": "sdpa",
        "epochs": 1,
        "optimizer": {"class_path": optimizer, "init_args": options},
        "data": {
            "datasets": [{"path": str(folder / "texts.json"), "formatting": "text"}],
            "shuffle": False,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "layout": "padded",
        },
    }


Seen = dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Case -> what one process saw, and what each of two ranks did."""
    from tests.stages.test_base import write_texts

    folder = tmp_path_factory.mktemp("optimizers")
    write_texts(folder, (9, 30, 12, 22, 12, 17, 26, 14, 8, 21, 19, 11, 24, 16, 10, 15))
    source = backbone_spec({"tied": False, "dtype": "float32", "attention": "sdpa"})
    load_backbone(source, Full(), vocab_size=259, seed=SEED).causal_lm.save_pretrained(folder / "base")
    listed = [case(name, folder) for name in CASES]
    ranks = test_contract.launch(listed, 2, folder)
    return {each["name"]: (contract_run.fit(each, 1, folder), two) for each, two in zip(listed, ranks, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_does(seen: Seen, name: str) -> None:
    alone, shared = seen[name]
    assert len(alone["losses"]) == STEPS
    for found in shared:
        assert found["losses"] == pytest.approx(alone["losses"], rel=FAR.get(name, 1e-4))
        assert furthest(found["weights"], alone["weights"]) <= FAR.get(name, 1e-4) * STEPS
    first, second = (found["weights"] for found in shared)
    assert all(torch.equal(first[key], second[key]) for key in first), "the ranks hold the same model"
