"""What the judging stages share: one DataModule for several runs, several verbs on one stage, statistics of a set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from lf_lightning import (
    DPO,
    KTO,
    RM,
    SFT,
    AdamW,
    BackboneSpec,
    DataModule,
    Full,
    InputError,
    ReferenceSpec,
    ScheduleSpec,
)
from tests.cli.runs import LLAMA
from tests.stages.judgement_runs import dataset

SCRATCH = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")
STORED = ReferenceSpec(precompute=True)


class Losses(Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["train/loss"]))


class Stop(Callback):
    """Break off a validation in its second micro-batch."""

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
        if index == 1:
            raise RuntimeError("the cell was stopped")


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        **{
            "max_steps": 3,
            "log_every_n_steps": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            **options,
        },
    )


def make(kind: type[Any], **options: Any) -> Any:
    seed_everything(7)
    stage = kind(SCRATCH, Full(), AdamW(lr=1e-2), ScheduleSpec(kind="constant"), **options)
    stage.configure_callbacks = list
    return stage


def data_of(folder: Path, kind: type[Any], **options: Any) -> DataModule:
    rows = dataset(folder, kind.__name__)
    defaults = {"max_length": 96, "global_batch_size": 4, "micro_batch_size": 2, "cache_dir": None, "shuffle": False}
    return DataModule(SCRATCH, kind.task, datasets=rows, seed=1, **{**defaults, **options})


def losses(stage: Any, data: DataModule) -> list[float]:
    watch = Losses()
    trainer(watch).fit(stage, data)
    return watch.seen


@pytest.mark.parametrize("options", [{"loss": "simpo"}, {"loss": "ipo", "reference": ReferenceSpec(dtype="float64")}])
def test_stored_log_probs_stay_with_the_stage_that_stored_them(options: dict[str, Any], tmp_path: Path):
    fresh = losses(make(DPO, **options), data_of(tmp_path, DPO))
    shared = data_of(tmp_path, DPO)
    losses(make(DPO, reference=STORED), shared)
    assert len(shared.stored_reference) == 1
    assert losses(make(DPO, **options), shared) == fresh
    assert not shared.stored_reference


@pytest.mark.parametrize("kind", [DPO, KTO])
@pytest.mark.parametrize("reference", [ReferenceSpec(), STORED])
def test_one_stage_validates_predicts_trains_and_tests(kind: type[Any], reference: ReferenceSpec, tmp_path: Path):
    rows = dataset(tmp_path, kind.__name__)
    options: dict[str, Any] = {"eval_datasets": rows, "test_datasets": rows, "predict_datasets": rows}
    data, stage = data_of(tmp_path, kind, **options), make(kind, reference=reference)
    trainer().predict(stage, data, return_predictions=False)
    (before,) = trainer().validate(stage, data, verbose=False)
    assert before["val/loss"] == pytest.approx({DPO: 0.6931472, KTO: 0.5}[kind], abs=1e-5)
    trainer().fit(stage, data)
    (after,) = trainer().test(stage, data, verbose=False)
    assert after["test/loss"] < before["val/loss"]
    (again,) = trainer().validate(stage, data, verbose=False)
    assert again["val/loss"] == pytest.approx(after["test/loss"], rel=1e-6)


def test_a_validation_that_broke_off_is_no_part_of_the_next(tmp_path: Path):
    rows = dataset(tmp_path, "DPO")
    data, stage = data_of(tmp_path, DPO, eval_datasets=rows), make(DPO)
    (want,) = trainer().validate(stage, data, verbose=False)
    with pytest.raises(RuntimeError, match="the cell was stopped"):
        trainer(Stop()).validate(stage, data, verbose=False)
    (got,) = trainer().validate(stage, data, verbose=False)
    assert got == pytest.approx(want, rel=1e-6)


def test_ld_alpha_changes_neither_ftx_nor_the_logged_log_probs(tmp_path: Path):
    rows = dataset(tmp_path, "DPO")
    data, stage = data_of(tmp_path, DPO, eval_datasets=rows), make(DPO, ftx=0.5)
    trainer().fit(stage, data)  # so that policy and reference differ, and with them what ld_alpha weighs
    values = []
    for ld_alpha in (1.0, 0.2):
        stage.ld_alpha = ld_alpha
        values.append(trainer().validate(stage, data, verbose=False)[0])
    for name in ("val/sft", "val/logps/chosen", "val/logps/rejected"):
        assert values[0][name] == values[1][name]
    assert values[0]["val/preference"] != values[1]["val/preference"]


@pytest.mark.parametrize(("kind", "other"), [(DPO, SFT), (DPO, RM), (KTO, DPO), (SFT, DPO), (RM, KTO)])
def test_data_of_another_task_is_refused(kind: type[Any], other: type[Any], tmp_path: Path):
    with pytest.raises(InputError, match=rf"data.task: must be {kind.task} for {kind.__name__}, got {other.task}"):
        trainer(enable_checkpointing=True).fit(kind(SCRATCH, Full()), data_of(tmp_path, other))


def test_a_loss_without_kl_runs_no_partner_and_one_pass_of_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = data_of(tmp_path, KTO, shuffle=True)
    stage = make(KTO, loss="apo_zero_unpaired", reference=STORED)
    trainer(max_steps=6).fit(stage, data)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reference log-probs")]
    assert len(said) == 1
    assert "12 rows computed" in said[0]
    (key,) = data.stored_reference
    assert key == ("train", 0)
    assert torch.equal(torch.from_numpy(data.stored_reference[key])[:, 1], torch.zeros(12, dtype=torch.float64))


def test_no_pair_is_ahead_while_policy_is_reference(tmp_path: Path):
    rows = dataset(tmp_path, "DPO")
    data, stage = data_of(tmp_path, DPO, eval_datasets=rows, eval_micro_batch_size=1), make(DPO, reference=STORED)
    (values,) = trainer().validate(stage, data, verbose=False)
    assert values["val/rewards/accuracies"] == 0.0
