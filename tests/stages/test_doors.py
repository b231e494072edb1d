"""What a trainer may ask of a stage, from Python too, and what a resume refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lf_lightning import (
    RM,
    SFT,
    AdamW,
    BackboneSpec,
    DataModule,
    Freeze,
    Full,
    InputError,
    LoRA,
    RunCheckpoint,
    ScheduleSpec,
)
from lf_lightning.callbacks import last_checkpoint
from lf_lightning.data.sources import resolve_sources
from lf_lightning.models import load_backbone
from lf_lightning.models.export import save_weights
from lf_lightning.stages.doors import check_run, check_sharing
from lf_lightning.stages.fsdp2 import FSDP2Strategy
from lf_lightning.stages.means import SetMeans
from lf_lightning.stages.non_finite import NonFinite
from lf_lightning.types import LossSums, TrainingStopped
from tests.callbacks.python_run import fit
from tests.cli.runs import LLAMA, ROWS, steps

SCRATCH = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")


def ask(**changes: Any) -> None:
    asked: dict[str, Any] = {"strategy": "auto", "precision": "32-true", "accelerator": "cpu", "task": "sft"}
    check_run(**{**asked, **changes})


@pytest.mark.parametrize(
    ("strategy", "shown", "instead"),
    [
        (FSDPStrategy, "FSDPStrategy", "use fsdp2"),
        (DeepSpeedStrategy, "DeepSpeedStrategy", "use deepspeed_1, deepspeed_2 or deepspeed_3"),
        (ModelParallelStrategy, "ModelParallelStrategy", "its options give HSDP and tensor parallelism"),
        ("deepspeed_stage_3", "deepspeed_stage_3", "use deepspeed_1, deepspeed_2 or deepspeed_3"),
        ("fsdp", "fsdp", "use fsdp2"),
        ("xla", "xla", "Choose one of these"),
    ],
)
def test_a_strategy_that_the_step_contract_does_not_know_is_refused(strategy: Any, shown: str, instead: str) -> None:
    with pytest.raises(
        InputError, match=rf"trainer\.strategy: must be auto, ddp, fsdp2, .*, got {shown}\. .*{instead}"
    ):
        ask(strategy=strategy)


GPT2 = BackboneSpec(architecture={"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2}, tokenizer="bytes")
PHI = BackboneSpec(architecture={**LLAMA, "model_type": "phi3"}, tokenizer="bytes")
ODD = BackboneSpec(architecture={**LLAMA, "num_key_value_heads": 1}, tokenizer="bytes")
TOGETHER = r"trainer\.strategy\.init_args\.tensor_parallel: "


@pytest.mark.parametrize(
    ("options", "stage", "verb", "said"),
    [
        (
            {"replicate": 3},
            SFT(SCRATCH, Full()),
            "fit",
            r"init_args\.replicate: must divide the number of ranks, 4, got 3",
        ),
        ({"tensor_parallel": 3}, SFT(SCRATCH, Full()), "fit", TOGETHER + "must divide the number of ranks, 4, got 3"),
        ({"tensor_parallel": 2}, SFT(SCRATCH, LoRA()), "fit", TOGETHER + "must be 1 with tuning LoRA, got 2"),
        ({"tensor_parallel": 2}, RM(SCRATCH, Full()), "fit", TOGETHER + "must be 1 for rm, got 2"),
        ({"tensor_parallel": 2}, SFT(SCRATCH, Full()), "predict", TOGETHER + "must be 1 for predict, got 2"),
        ({"tensor_parallel": 2}, SFT(GPT2, Full()), "fit", TOGETHER + "needs a family with a plan .* got gpt2"),
        (
            {"tensor_parallel": 2},
            SFT(PHI, Full()),
            "fit",
            TOGETHER + "cuts linear layers .* asks for colwise_gather_output",
        ),
        ({"tensor_parallel": 2}, SFT(ODD, Full()), "fit", TOGETHER + "must divide .* num_key_value_heads, 1, got 2"),
        (
            {"tensor_parallel": 4},
            SFT(SCRATCH, Full()),
            "fit",
            TOGETHER + "must divide .* num_attention_heads, 2, got 4",
        ),
    ],
)
def test_groups_of_ranks_that_cannot_be_are_refused(options: Any, stage: Any, verb: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_sharing(on_four_ranks(**options), stage, verb=verb)


def on_four_ranks(**options: Any) -> FSDP2Strategy:
    strategy = FSDP2Strategy(**options)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    return strategy


def test_groups_of_ranks_that_can_be_are_let_through() -> None:
    check_sharing(on_four_ranks(replicate=2), RM(SCRATCH, LoRA()), verb="predict")
    check_sharing(on_four_ranks(tensor_parallel=2), SFT(SCRATCH, Freeze(num_layers=1)), verb="validate")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replicate": 0}, r"init_args\.replicate: must be at least 1, got 0"),
        ({"tensor_parallel": -1}, r"init_args\.tensor_parallel: must be at least 1, got -1"),
        ({"replicate": 2, "tensor_parallel": 2}, "replicate and tensor_parallel exclude each other, got 2 and 2"),
        ({"timeout_seconds": 0}, r"init_args\.timeout_seconds: must be positive, got 0"),
    ],
)
def test_options_of_fsdp2_out_of_range_are_refused(options: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        FSDP2Strategy(**options)


@pytest.mark.parametrize("strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp2", "deepspeed_2"])
@pytest.mark.parametrize("precision", [None, 32, "32-true", "bf16-mixed"])
def test_what_is_known_is_let_through(strategy: str, precision: Any) -> None:
    ask(strategy=strategy, precision=precision, task="ppo")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"accelerator": "cpu"}, "needs a GPU"),
        ({"accelerator": "gpu", "strategy": "fsdp2"}, "with strategy fsdp2"),
        ({"accelerator": "gpu", "strategy": "deepspeed_2"}, "with strategy deepspeed_2"),
        ({"accelerator": "auto", "task": "grpo"}, "for rollouts"),
    ],
)
def test_16_mixed_is_refused_where_it_would_go_wrong(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=f"trainer.precision: .*{why}.*Use bf16-mixed"):
        ask(precision="16-mixed", **changes)
    ask(precision="16-mixed", accelerator="gpu")


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_that_casts_the_weights_is_refused_from_python(tmp_path: Path, precision: str) -> None:
    with pytest.raises(InputError, match=rf"trainer\.precision: must be 32-true, bf16-mixed .*, got {precision}"):
        fit(tmp_path, precision=precision)


def test_the_best_checkpoint_is_kept_and_one_that_was_not_measured_is_not_taken_for_it(tmp_path: Path) -> None:
    keeps = RunCheckpoint(every_n_steps=1, save_top_k=1, monitor="val/loss", mode="max")
    fit(tmp_path, keeps, max_steps=5, val_size=2, val_check_interval=2, check_val_every_n_epoch=None)
    assert set(keeps.values) == {2, 4}
    best = max(keeps.values, key=lambda step: keeps.values[step])
    assert steps(tmp_path / "run") == [f"step-{step:08d}" for step in sorted({best, 5})]


def test_a_resume_remembers_the_value_of_the_checkpoint_that_it_begins_with(tmp_path: Path) -> None:
    options: dict[str, Any] = {"val_size": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
    first = RunCheckpoint(every_n_steps=2, monitor="val/loss")
    fit(tmp_path, first, max_steps=2, **options)
    second = RunCheckpoint(every_n_steps=2, monitor="val/loss")
    fit(tmp_path, second, ckpt_path=last_checkpoint(tmp_path / "run"), max_steps=4, **options)
    assert second.values[2] == first.values[2]
    assert set(second.values) == {2, 4}


def test_a_resume_from_an_older_checkpoint_moves_the_later_ones_aside(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=6)
    state = tmp_path / "run" / "checkpoints" / "step-00000002" / "trainer_state" / "state.ckpt"
    fit(tmp_path, ckpt_path=state, max_steps=3)
    assert steps(tmp_path / "run") == ["step-00000002"]
    moved = tmp_path / "run" / "previous-1" / "checkpoints"
    assert sorted(path.name for path in moved.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_resume_from_another_runs_checkpoint_does_not_mix_the_two(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        fit(tmp_path / name, max_steps=2)
    with pytest.raises(InputError, match="must be a new run folder, got one with 1 complete checkpoints"):
        fit(tmp_path / "two", ckpt_path=last_checkpoint(tmp_path / "one" / "run"), max_steps=4)


def test_a_resume_in_another_order_of_units_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    fit(tmp_path, max_steps=2)
    with pytest.raises(InputError, match=r"data\.val_size: must be the same as in the checkpoint, 0\.0, got 2"):
        fit(tmp_path, ckpt_path=last_checkpoint(tmp_path / "run"), max_steps=4, val_size=2)


def test_a_value_that_is_not_a_number_shows_in_the_mean_of_a_set() -> None:
    means = SetMeans(["nll"])
    means.begin(torch.float64)
    for value in (20.0, float("nan")):
        means.update(LossSums(terms={"nll": torch.tensor(value)}, metrics={}), {"nll": 10})
    assert str(means.compute()["nll"]) == "nan"


def test_the_mean_of_a_set_is_its_sum_over_its_count() -> None:
    means = SetMeans(["nll"])
    means.begin(torch.float64)
    for value, count in ((20.0, 10), (7.0, 1), (0.0, 0)):
        means.update(LossSums(terms={"nll": torch.tensor(value)}, metrics={}), {"nll": count})
    assert means.compute() == {"nll": 27 / 11}


def test_two_datasets_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rows.json").write_text(json.dumps(ROWS))
    entries: list[Any] = [{"path": str(tmp_path / folder / "rows.json")} for folder in ("a", "b")]
    with pytest.raises(InputError, match=r"data\.datasets: 'rows' names two datasets"):
        resolve_sources(entries, "data")
    named = resolve_sources([{**entries[0], "name": "first"}, entries[1]], "data")
    assert [source.name for source in named] == ["first", "rows"]


def test_freeze_trains_over_a_half_precision_folder(tmp_path: Path) -> None:
    base = load_backbone(SCRATCH, Full(), vocab_size=259, seed=1)
    base.causal_lm.to(torch.bfloat16)
    folder = tmp_path / "base"
    folder.mkdir()
    save_weights(base, folder, base=None, writes=True)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    spec = BackboneSpec(path=str(folder), tokenizer="bytes")
    stage = SFT(spec, Freeze(num_layers=1), AdamW(lr=1e-2), ScheduleSpec(kind="constant"))
    data = DataModule(spec, datasets=[{"path": str(tmp_path / "rows.json")}], global_batch_size=4, cache_dir=None)
    Trainer(accelerator="cpu", max_steps=2, default_root_dir=tmp_path / "run", logger=False).fit(stage, data)
    trained = {parameter.dtype for parameter in stage.backbone.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in stage.backbone.parameters() if not parameter.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})
    assert stage.tokens.total > 0


def test_the_scaler_is_given_a_gradient_to_skip_where_the_loss_is_not_finite() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    guard = NonFinite("skip")
    guard.check_loss(3, {"loss": float("nan")}, [weight], scaled=True)
    assert weight.grad.tolist() == [float("inf"), float("inf")]
    guard.check_gradient(3, float("inf"), [weight], scaled=True, seen=True)
    assert guard.num_skipped_steps == 1


def test_an_overflow_is_the_scalers_twenty_times_in_a_row_and_then_stops_the_run() -> None:
    guard = NonFinite("stop")
    for step in range(1, 20):
        guard.check_gradient(step, float("inf"), [], scaled=True, seen=False)
    assert guard.num_skipped_steps == 19
    with pytest.raises(TrainingStopped, match="step 20: the gradient is not finite, got norm inf"):
        guard.check_gradient(20, float("inf"), [], scaled=True, seen=False)
