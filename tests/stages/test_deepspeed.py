"""DeepSpeed's ZeRO-1, 2 and 3 on two ranks against one process, for every stage; and their checkpoints.

All that two ranks do is one launch of deepspeed_run.py; the other side is made in this process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lf_lightning import (
    DPO,
    PT,
    RM,
    SFT,
    AdamW,
    BackboneSpec,
    Full,
    InputError,
    LoRA,
    ReferenceSpec,
)
from lf_lightning.callbacks import last_checkpoint
from lf_lightning.models import load_backbone
from lf_lightning.optim import OptimizerSpec
from lf_lightning.stages import deepspeed
from tests.ranks import fork_ranks, made_once
from tests.stages import deepspeed_run, test_sharded_contract
from tests.stages.contract_run import fit
from tests.stages.deepspeed_run import RUNS, STRATEGIES, train
from tests.stages.test_judgement_contract import furthest

CLIP = 0.01
"""Of the steps of asft, whose gradients are small."""
TOLERANCE = 5e-5
"""Of a gradient in float32 after up to six steps, relative to the largest entry of its tensor."""
KIND_OF = {"deepspeed_1": "Full-tied", "deepspeed_2": "LoRA-untied", "deepspeed_3": "Full-untied"}
EACH = {("SFT", strategy, kind) for strategy, kind in KIND_OF.items()}
OTHERS = {("PT", "deepspeed_1"), ("KTO", "deepspeed_2"), ("DPO", "deepspeed_3"), ("RM", "deepspeed_3")}
ALSO = {(stage, strategy, "LoRA-untied") for stage, strategy in OTHERS} | {("KTO", "deepspeed_3", "Full-tied")}
ROLLOUTS = {("PPO", "deepspeed_1", "LoRA-untied"), ("GRPO", "deepspeed_2", "Full-untied")}
QUICK = sorted(EACH | {("DPO", "deepspeed_3", "LoRA-untied"), ("RM", "deepspeed_3", "LoRA-untied")})
REST = sorted((ALSO | ROLLOUTS) - set(QUICK))
QUICK_RUNS, OTHER_RUNS = RUNS[:1], RUNS[1:]
NAMES = [
    *("-".join(pair) for pair in QUICK),
    *(pytest.param("-".join(pair), marks=pytest.mark.slow) for pair in REST),
]
RUN_NAMES = [
    *("-".join(run) for run in QUICK_RUNS),
    *(pytest.param("-".join(run), marks=pytest.mark.slow) for run in OTHER_RUNS),
]
Folders = Callable[[str], Path]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")


def cases(folder: Path, pairs: list[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
    known = {case["name"]: case for case in test_sharded_contract.cases(folder)}
    for stage, strategy, kind in pairs:
        case = {
            **known[f"{stage}-{kind}"],
            "strategy": strategy,
            "dtype": "float32",
            "name": f"{stage}-{strategy}-{kind}",
        }
        yield {**case, "max_grad_norm": CLIP if stage == "SFT" else 0.4, "loses": 1 if stage == "SFT" else None}


def write(folder: Path, pairs: list[tuple[str, str, str]], runs: tuple[tuple[str, str], ...]) -> None:
    """What two ranks write of some cases and runs."""
    listed = list(cases(folder, pairs))
    (folder / "cases.json").write_text(json.dumps(listed))
    (folder / "rows.json").write_text(json.dumps(test_sharded_contract.rows_of(folder)))
    spec = BackboneSpec(path=str(folder / "base-False"), tokenizer="bytes", dtype="bfloat16")
    half = load_backbone(spec, Full(), vocab_size=259, seed=1, trains=False)
    half.causal_lm.save_pretrained(folder / "half")
    whole = load_backbone(spec, Full(), vocab_size=259, seed=1).causal_lm
    whole.float().save_pretrained(folder / "base")

    def on_a_rank() -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        deepspeed_run.run(listed, runs, folder)

    fork_ranks(on_a_rank, 2, folder)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Name of a case or a run -> what two ranks have written of it, and of the others that are as quick."""

    def find(name: str) -> Path:
        is_quick = name in {"-".join(each) for each in (*QUICK, *QUICK_RUNS)}
        pairs, runs = (QUICK, QUICK_RUNS) if is_quick else (REST, OTHER_RUNS)
        return made_once(tmp_path_factory, f"deepspeed-{is_quick}", lambda folder: write(folder, pairs, runs))

    return find


@needs_deepspeed
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_under_deepspeed_train_and_measure_as_one_process_does(folder_of: Folders, name: str) -> None:
    folder = folder_of(name)
    case = next(each for each in json.loads((folder / "cases.json").read_text()) if each["name"] == name)
    alone = fit(case, 1, folder)
    assert len(alone["gradients"]) > 2
    for rank in (0, 1):
        found = torch.load(folder / f"{name}.{rank}.pt")
        assert found["rollouts"] == alone["rollouts"]
        assert found["val"] == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in alone["val"].items()}
        for got, want in zip(found["logged"], alone["logged"], strict=True):  # norms before clipping too
            assert got == {key: pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True) for key, value in want.items()}
        for step, (got, want) in enumerate(zip(found["gradients"], alone["gradients"], strict=True)):
            if step == case["loses"]:  # given up: one side still shows its gradient
                continue
            assert furthest(got, want) <= TOLERANCE


@needs_deepspeed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_without_a_finite_metric_changes_nothing_and_counts(folder_of: Folders, strategy: str) -> None:
    name = f"SFT-{strategy}-{KIND_OF[strategy]}"
    found = torch.load(folder_of(name) / f"{name}.0.pt")
    assert [row["train/skipped_steps"] for row in found["logged"]] == [0, 1, 1, 1]
    assert found["logged"][1]["train/grad_norm"] == 0
    assert found["logged"][0]["train/grad_norm"] > CLIP, "steps are clipped"


@needs_deepspeed
@pytest.mark.parametrize("run", RUN_NAMES)
def test_a_run_that_is_broken_off_and_continued_ends_with_the_same_bits(folder_of: Folders, run: str) -> None:
    folder = folder_of(run)
    finals = [folder / "runs" / name / "final" for name in (run, f"{run}-broken")]
    files = sorted(path.name for path in finals[0].glob("*.safetensors"))
    assert files, "weights are written"
    for name in files:
        straight, broken = (load_file(final / name) for final in finals)
        assert straight.keys() == broken.keys()
        assert all(torch.equal(straight[key], broken[key]) for key in straight)
    logs = [(final.parent / "trainer_log.jsonl").read_text().splitlines() for final in finals]
    losses = [[json.loads(line)["loss"] for line in log if "loss" in json.loads(line)] for log in logs]
    assert losses[0] == losses[1]


@needs_deepspeed
@pytest.mark.parametrize("run", RUN_NAMES)
def test_its_checkpoint_continues_on_one_process_without_deepspeed(folder_of: Folders, run: str) -> None:
    folder = folder_of(run)
    kind = run.split("-")[1]
    own = folder / "runs" / run
    other = folder / "runs" / f"{run}-alone"
    (other / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "trainer_log.jsonl"):
        (other / name).write_bytes((own / name).read_bytes())
    shutil.copytree(own / "checkpoints" / "step-00000002", other / "checkpoints" / "step-00000002")
    train(folder, "auto", kind, max_steps=4, run=other, resumes=True)
    for path in (own / "final").glob("*.safetensors"):
        want, got = load_file(path), load_file(other / "final" / path.name)
        assert got.keys() == want.keys()
        for key in want:
            # of weights after AdamW, whose steps are signs where gradients are 0. In bfloat16 DeepSpeed adds gradients
            # of activations up in another order; both orders are equally far from float64.
            bound = 1e-3 if kind == "head" else 2e-2
            assert (got[key] - want[key]).abs().max() <= bound * want[key].abs().max().clamp(min=1e-1), key
    state = torch.load(own / "checkpoints/step-00000002/trainer_state/state.ckpt", weights_only=True)
    assert state["state_dict"] == {}
    assert last_checkpoint(own) is not None


# ---------------------------------------------------------------------- refusals


class Other(OptimizerSpec):
    """Another optimizer."""

    def build(self, parameters: Any) -> Any:
        """None."""


def zero(stage: int) -> Any:
    strategy = object.__new__(deepspeed.ZeroStrategy)
    strategy.zero_stage = stage
    return strategy


SPEC = BackboneSpec(path="model")
SNAPSHOT = ReferenceSpec(kind="snapshot")


@pytest.mark.parametrize(
    ("stage", "level", "line"),
    [
        (lambda: PT(SPEC, Full(), Other()), 1, r"model\.init_args\.optimizer: must be AdamW .*got Other\. Use AdamW"),
        (lambda: SFT(BackboneSpec(path="m", dtype="float64")), 2, r"backbone\.dtype: .*got float64\. Use float32"),
        (lambda: DPO(SPEC, reference=ReferenceSpec(precompute=True)), 3, r"reference\.precompute: must be false"),
        (lambda: DPO(SPEC, LoRA(adapter="a")), 3, r"reference\.kind: deepspeed_3 .* got snapshot"),
        (lambda: DPO(SPEC, reference=SNAPSHOT), 3, r"reference\.kind: deepspeed_3 .* got snapshot"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_before_a_model_is_loaded(stage: Any, level: int, line: str) -> None:
    with pytest.raises(InputError, match=line):
        deepspeed.check_stage(stage(), zero(level))


def test_generation_is_refused_where_weights_are_cut_and_scoring_pairs_is_not() -> None:
    with pytest.raises(InputError, match=r"trainer\.strategy: must be another one for generating .*got deepspeed_3"):
        deepspeed.check_stage(SFT(SPEC), zero(3), verb="predict")
    deepspeed.check_stage(SFT(SPEC), zero(2), verb="predict")
    deepspeed.check_stage(RM(SPEC), zero(3), verb="predict")


def test_what_it_can_do_is_let_through() -> None:
    deepspeed.check_stage(DPO(SPEC, reference=ReferenceSpec(precompute=True)), zero(2))
    deepspeed.check_stage(DPO(SPEC, reference=SNAPSHOT), zero(1))
    deepspeed.check_stage(DPO(SPEC, LoRA(), AdamW()), zero(3))
    deepspeed.check_stage(PT(SPEC, Full(), Other()), "another strategy")


def test_where_the_package_is_missing_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need the package deepspeed, got none\. Install it with .*lf-lightning\["):
        deepspeed.check_installed()


@pytest.mark.slow
def test_nothing_imports_deepspeed_before_it_is_asked_for() -> None:
    code = "import sys, lf_lightning.cli; sys.exit('deepspeed' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(root)})
