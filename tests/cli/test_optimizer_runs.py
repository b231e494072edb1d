"""Optimizers and schedules from the command line: refusals before a model is loaded, and the schedule without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lf_lightning.__main__ import main
from tests.cli.runs import config, lightning, losses, write

OPTIMIZER = "model.init_args.optimizer"
LORA = {"class_path": "LoRA"}


def chosen(name: str, **options: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": options}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({OPTIMIZER: chosen("AdamW", layerwise=True)}, "model.init_args.max_grad_norm: must be null with"),
        (
            {OPTIMIZER: chosen("GaLore", layerwise=True), "model.init_args.max_grad_norm": None},
            "data.micro_batch_size: must be at least data.global_batch_size, 4, with",
        ),
        (
            {
                OPTIMIZER: chosen("Adafactor", layerwise=True),
                "model.init_args.max_grad_norm": None,
                "data.micro_batch_size": 4,
                "trainer.devices": 2,
            },
            "trainer.devices: must be 1 with optimizer.init_args.layerwise: true, got 2 ranks. Set 1.",
        ),
        ({OPTIMIZER: chosen("PagedAdamW")}, f"{OPTIMIZER}.class_path: PagedAdamW needs a GPU, got the CPU."),
        ({OPTIMIZER: chosen("AdamW8bit", paged=True)}, f"{OPTIMIZER}.init_args.paged: needs a GPU, got the CPU."),
        (
            {OPTIMIZER: chosen("AdamMini"), "trainer.devices": 2, "trainer.strategy": "fsdp2"},
            "trainer.strategy: must be auto or ddp with AdamMini, got fsdp2.",
        ),
        ({OPTIMIZER: chosen("BAdam"), "trainer.devices": 2}, "trainer.strategy: must be auto with BAdam, got ddp."),
        ({OPTIMIZER: chosen("LoRAPlus")}, f"{OPTIMIZER}.class_path: LoRAPlus needs a LoRA, got tuning Full."),
        (
            {OPTIMIZER: chosen("APOLLO"), "model.init_args.tuning": LORA},
            f"{OPTIMIZER}.class_path: APOLLO trains whole weights, got tuning LoRA.",
        ),
        (
            {OPTIMIZER: chosen("AdamW", weights="kahan"), "model.init_args.backbone.dtype": "float32"},
            f"{OPTIMIZER}.init_args.weights: must be float32 with backbone.dtype: float32, got kahan.",
        ),
        ({OPTIMIZER: chosen("Muon", momentum=2.0)}, f"{OPTIMIZER}.init_args.momentum: must be in [0, 1), got 2.0."),
        ({OPTIMIZER: chosen("Muon", rank=2)}, f"{OPTIMIZER}.init_args.rank: the class chosen has no such option."),
        ({OPTIMIZER: chosen("GaLor")}, f"{OPTIMIZER}.class_path: must "),
        (
            {"model.init_args.schedule": {"kind": "cosine", "power": 2.0}},
            "model.init_args.schedule.power: must be left out unless kind is polynomial, got 2.0 with kind: cosine.",
        ),
        ({"model.init_args.schedule": {"kind": "cosin"}}, "model.init_args.schedule.kind: must be one of constant"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(
    changes: dict[str, Any], says: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert lightning("fit", here, config(**changes)) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"lf-lightning: error: {says}")
    assert error.count("\n") == 1
    assert not (here / "run").exists()


def test_a_run_with_galore_layer_by_layer_goes_on_from_its_checkpoint(here: Path) -> None:
    changes: dict[str, Any] = {
        OPTIMIZER: chosen("GaLore", lr=1e-2, rank=4, interval=2, layerwise=True),
        "model.init_args.max_grad_norm": None,
        "data.micro_batch_size": 4,
    }
    straight, halved = config("straight", **changes), config("halved", **{**changes, "trainer.max_steps": 2})
    assert lightning("fit", here, straight) == 0
    assert lightning("fit", here, halved) == 0
    halved["trainer"]["max_steps"] = 4
    assert lightning("fit", here, halved, "--ckpt_path", "last") == 0
    assert losses(here / "halved") == losses(here / "straight")
    assert losses(here / "straight")[-1] < losses(here / "straight")[0] - 0.3


def scheduled(here: Path, *arguments: str, **changes: Any) -> int:
    return main(["schedule", "--config", write(here, config(**changes)), *arguments])


def test_the_schedule_is_printed_and_drawn_without_a_run(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = {"kind": "linear", "warmup_steps": 2}
    changes = {"model.init_args.schedule": spec, OPTIMIZER: chosen("Muon", lr=1e-2, adamw_lr=4e-3)}
    assert scheduled(here, "-o", "rates.png", **changes) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["step", "lr", "adamw_lr"],
        ["1", "0.0000e+00", "0.0000e+00"],
        ["2", "5.0000e-03", "2.0000e-03"],
        ["3", "1.0000e-02", "4.0000e-03"],
        ["4", "5.0000e-03", "2.0000e-03"],
    ]
    assert lines[-1] == "drawn in rates.png"
    assert (here / "rates.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in here.iterdir()) == ["rates.png", "rows.json", "run.yaml"]


@pytest.mark.parametrize(
    ("changes", "arguments", "num_steps"),
    [
        ({}, ["--steps", "25"], 25),
        ({"trainer.max_steps": 1000}, [], 1000),
        ({"trainer.max_steps": -1}, [], 9),  # three epochs of 12 rows in steps of 4
        ({"trainer.max_steps": -1, "trainer.max_epochs": 5, "trainer.limit_train_batches": 2}, [], 10),
        ({"trainer.max_steps": 4, "trainer.max_epochs": 1, "trainer.limit_train_batches": 0.7}, [], 2),
    ],
)
def test_the_schedule_has_the_steps_of_the_run(
    changes: dict[str, Any], arguments: list[str], num_steps: int, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert scheduled(here, *arguments, **changes) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1].split()[0].replace(",", "") == str(num_steps)
    assert len(lines) <= 13


@pytest.mark.parametrize(
    ("arguments", "changes", "says"),
    [
        (["-o", "rates.txt"], {}, "--output: must end in .png, .svg or .pdf, got rates.txt."),
        (["-o", "no/rates.png"], {}, "--output: no/rates.png cannot be written, got No such file or directory."),
        (["--steps", "0"], {}, "schedule: argument --steps: must be a whole number of at least 1"),
        ([], {"trainer.max_steps": -1, "trainer.max_time": "00:01:00:00"}, "trainer.max_time: ends the run at"),
        ([], {"trainer.max_steps": -1, "trainer.max_epochs": -1}, "trainer.max_steps: must say where the run ends"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_shown_is_one_line(
    arguments: list[str], changes: dict[str, Any], says: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert scheduled(here, *arguments, **changes) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"lf-lightning: error: {says}")
    assert error.count("\n") == 1


def test_the_schedule_explains_itself(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--help"]) == 0
    assert "--steps N" in capfd.readouterr().out
