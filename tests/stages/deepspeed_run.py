"""All that two DeepSpeed ranks are asked, in one launch: the step contract, and runs that save and go on.

Writes <folder>/<name>.<rank>.pt for each case, then <folder>/runs/<strategy>-<kind>.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lf_lightning import RM, SFT, AdamW, BackboneSpec, DataModule, Full, LoRA, RunCheckpoint, ScheduleSpec
from lf_lightning.callbacks import last_checkpoint
from tests.stages.contract_run import fit

STRATEGIES = ("deepspeed_1", "deepspeed_2", "deepspeed_3")
RUNS = (
    ("deepspeed_2", "mixed"),
    ("deepspeed_3", "lora"),
    ("deepspeed_3", "head"),
)
"""Strategy and kind of model of the runs that save and go on."""
KINDS = {"full": (SFT, Full()), "mixed": (SFT, Full()), "lora": (SFT, LoRA(rank=2)), "head": (RM, LoRA(rank=2))}


def train(folder: Path, strategy: str, kind: str, *, max_steps: int, run: Path, resumes: bool = False) -> None:
    """A run with dropout, weight decay and a falling rate, which saves every second step."""
    seed_everything(7)
    stage_class, tuning = KINDS[kind]
    backbone = BackboneSpec(path=str(folder / ("half" if kind == "lora" else "base")), tokenizer="bytes")
    optimizer = AdamW(lr=1e-2, weight_decay=0.1)
    stage = stage_class(backbone, tuning, optimizer, ScheduleSpec(kind="linear"), max_grad_norm=0.5)
    rows = json.loads((folder / "rows.json").read_text())["RM" if kind == "head" else "SFT"]
    rows = {**rows, "max_length": 200, "global_batch_size": 3, "micro_batch_size": 1, "eval_micro_batch_size": 2}
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=strategy,
        max_steps=max_steps,
        precision="bf16-mixed" if kind == "mixed" else "32-true",
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
        callbacks=[RunCheckpoint(every_n_steps=2)],
    )
    ckpt_path = last_checkpoint(run) if resumes else None
    trainer.fit(stage, DataModule(backbone, stage.task, **rows), ckpt_path=ckpt_path, weights_only=True)


def save_and_go_on(folder: Path, strategy: str, kind: str) -> None:
    """Four steps at once; and the same with a break after the second, by another trainer."""
    straight = folder / "runs" / f"{strategy}-{kind}"
    train(folder, strategy, kind, max_steps=4, run=straight)
    broken = straight.with_name(f"{straight.name}-broken")
    if torch.distributed.get_rank() == 0:
        shutil.copytree(straight, broken)
        shutil.rmtree(broken / "checkpoints" / "step-00000004")
    torch.distributed.barrier()
    train(folder, strategy, kind, max_steps=4, run=broken, resumes=True)


def run(cases: list[dict[str, Any]], runs: tuple[tuple[str, str], ...], folder: Path) -> None:
    """Fit every case on this rank, then run and continue some kinds of model."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for case in cases:
        record = fit(case, 2, folder)
        torch.save(record, folder / f"{case['name']}.{torch.distributed.get_rank()}.pt")
    for strategy, kind in runs:
        save_and_go_on(folder, strategy, kind)
