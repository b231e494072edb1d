"""The step contract on meshes of four ranks: copies that are cut, and ranks that compute each layer together.

Every case is a real `Trainer.fit` (contract_run.py, one start-up for each side), held against one process. Gradients
are clipped, so that a norm over the wrong ranks would show from the second step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lf_lightning.models import Full, load_backbone
from tests.stages import test_contract
from tests.stages.contract_run import SEED, backbone_spec
from tests.stages.test_judgement_contract import furthest
from tests.stages.test_rollout_contract import SPREAD
from tests.stages.test_sharded_contract import INIT, LAYOUTS, Pairs, rows_of

COPIES, TOGETHER = {"replicate": 2}, {"tensor_parallel": 2}
QWEN = {"model_type": "qwen3", "head_dim": 4}  # with a norm over each head
CASES: dict[str, dict[str, Any]] = {  # of the norms the tests make Llama's exact, not Qwen's
    "copies SFT": {"strategy": COPIES, "tied": True},
    "copies DPO LoRA": {"strategy": COPIES, "stage": "DPO", "tuning": "LoRA"},
    "copies RM": {"strategy": COPIES, "stage": "RM"},
    "copies PPO": {"strategy": COPIES, "stage": "PPO"},
    "together PT": {"strategy": TOGETHER, "stage": "PT"},
    "together SFT": {"strategy": TOGETHER, "tied": True},
    "together SFT Qwen": {"strategy": TOGETHER, "architecture": QWEN, "tolerance": 1e-5},
    "together DPO": {"strategy": TOGETHER, "stage": "DPO", "tied": True},
    "together KTO": {"strategy": TOGETHER, "stage": "KTO", "gradient_checkpointing": True},
}
QUICK = ("copies RM", "together SFT Qwen")


def cases(folder: Path, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    rows = rows_of(folder)
    for index, (name, changes) in enumerate((name, CASES[name]) for name in names):
        case = {
            "name": name.replace(" ", "-"),
            "stage": "SFT",
            "tuning": "Full",
            "tied": False,
            "dtype": "float64",
            "attention": "sdpa",
            "epochs": 1,
            "max_grad_norm": 0.1,
            **changes,
        }
        base = folder / case["name"]
        model = load_backbone(backbone_spec(case), Full(), vocab_size=259, seed=SEED)
        model.causal_lm.save_pretrained(base)
        stage = case["stage"]
        init = dict(INIT.get(stage, {}))
        data = {"shuffle": False, "max_length": 200, "global_batch_size": 5, **rows[stage]}
        data |= LAYOUTS["padded" if index % 2 else "free"]
        if stage != "PT":
            data["template"] = "auto"
        if stage == "PPO":
            init |= {"rewards": [SPREAD], "generation": {"max_new_tokens": 6, "temperature": 0.7, "batch_size": 3}}
            data.pop("eval_micro_batch_size")
            data["global_batch_size"] = 3
        yield {**case, "base": str(base), "init": init, "data": data}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pairs]:
    """Runs the quick cases or the others, each once: case -> what one process saw, and what each of four ranks did."""
    known: Pairs = {}

    def run(name: str) -> Pairs:
        if name not in known:
            folder = tmp_path_factory.mktemp("mesh")
            names = tuple(each for each in CASES if (each in QUICK) == (name in QUICK))
            listed = list(cases(folder, names))
            alone, shared = (test_contract.launch(listed, number, folder) for number in (1, 4))
            known.update({each: (one, four) for each, (one,), four in zip(names, alone, shared, strict=True)})
        return known

    return run


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else (pytest.mark.slow,)) for name in CASES]
)
def test_four_ranks_on_a_mesh_train_and_measure_as_one_process_does(seen: Callable[[str], Pairs], name: str) -> None:
    alone, shared = seen(name)[name]
    tolerance = CASES[name].get("tolerance", 1e-9)
    assert len(alone["gradients"]) >= 2
    assert max(values["train/grad_norm"] for values in alone["logged"]) > 0.1
    for found in shared:
        assert found["rollouts"] == alone["rollouts"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=tolerance)
        norms = [[values["train/grad_norm"] for values in each["logged"]] for each in (found, alone)]
        assert norms[0] == pytest.approx(norms[1], rel=tolerance)
        assert found["val"] == {
            key: pytest.approx(value, rel=tolerance, abs=tolerance) for key, value in alone["val"].items()
        }
        for step, (got, want) in enumerate(zip(found["gradients"], alone["gradients"], strict=True)):
            assert furthest(got, want) <= tolerance * (1 + step), f"step {step}"


def test_ranks_that_compute_layers_together_read_the_same_units_and_others_do_not(
    seen: Callable[[str], Pairs],
) -> None:
    for name, (alone, shared) in seen(QUICK[0]).items():
        units = [found["micro_batches"] for found in shared]
        if "tensor_parallel" in CASES[name]["strategy"]:
            assert units[0] == units[1]
            assert units[2] == units[3]
            for one, other in (shared[:2], shared[2:]):
                assert len(one["copies"]) > 3
                assert all(torch.equal(one["copies"][key], other["copies"][key]) for key in one["copies"]), "drifted"
            shared = shared[::2]
        counts = [sum(number for step in found["micro_batches"] for number, _, _ in step) for found in shared]
        assert sum(counts) == sum(number for step in alone["micro_batches"] for number, _, _ in step)
