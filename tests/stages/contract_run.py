"""Fits cases of the step contract with a real Trainer, on ranks that test_contract.py forks; keeps what each saw."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.distributed.tensor import DTensor
from torch.nn.functional import rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import lf_lightning
from lf_lightning import (
    BackboneSpec,
    DataModule,
    Full,
    GRPOConstants,
    LoRA,
    PPOConstants,
    PreferenceConstants,
    ReferenceSpec,
    RewardFunction,
    SamplingSpec,
    ScheduleSpec,
    ValueHeadSpec,
)
from lf_lightning.stages.fsdp2 import FSDP2Strategy
from lf_lightning.types import FeedbackBatch, LossSums, PreferenceBatch, PromptBatch, RolloutBatch, TokenBatch

SEED = 3
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform predictions, so that every gradient matters
}
ADAMW = {"lr": 1e-2, "eps": 1e-2}  # a large eps: rounding of a gradient near zero must not become a sign


def backbone_spec(case: dict[str, Any]) -> BackboneSpec:
    """The model of a case."""
    if "base" in case:
        more = {"gradient_checkpointing": case.get("gradient_checkpointing", False)}
        return BackboneSpec(
            path=case["base"], tokenizer="bytes", dtype=case["dtype"], attention=case["attention"], **more
        )
    architecture = {**LLAMA, "tie_word_embeddings": case["tied"], **case.get("architecture", {})}
    return BackboneSpec(architecture=architecture, tokenizer="bytes", dtype=case["dtype"], attention=case["attention"])


def exact_norm(norm: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
    """Llama's norm in the type of its input: transformers' own rounds to float32 inside."""
    return rms_norm(hidden, hidden.shape[-1:], norm.weight, norm.variance_epsilon)


def tokens_of(micro_batch: Any) -> TokenBatch:
    """The tokens of a micro-batch of any kind."""
    if isinstance(micro_batch, PreferenceBatch | RolloutBatch):
        return micro_batch.tokens
    return micro_batch.responses if isinstance(micro_batch, FeedbackBatch) else micro_batch


SPECS = {"reference": ReferenceSpec, "constants": PreferenceConstants, "value_head": ValueHeadSpec}
SPECS |= {"generation": SamplingSpec}
CONSTANTS = {"PPO": PPOConstants, "GRPO": GRPOConstants}


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    """The options of the stage of a case."""
    specs = {**SPECS, "constants": CONSTANTS.get(case["stage"], PreferenceConstants)}
    given = dict(case.get("init", {}))
    rewards = {"rewards": [RewardFunction(**each) for each in given.pop("rewards")]} if "rewards" in given else {}
    return {**{name: specs[name](**value) if name in specs else value for name, value in given.items()}, **rewards}


def whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    """A copy of a gradient, whole where it is cut over the ranks."""
    gradient = parameter.grad
    if gradient is None:  # DeepSpeed keeps it to itself
        from deepspeed.utils import safe_get_full_grad

        gradient = safe_get_full_grad(parameter)
    if gradient is None:  # the step was given up
        return torch.zeros_like(parameter)
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


class Recorder(Callback):
    """Keep the gradients, losses and micro-batches of every step, as this rank sees them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.micro_batches: list[list[tuple[int, int, tuple[int, ...]]]] = []
        self.evaluated_units: list[int] = []
        self.seeds: list[int] = []
        self.rollouts: list[list[tuple[tuple[int, ...], bool, tuple[float, ...]]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep units, tokens and shape of each micro-batch."""
        tokens = [tokens_of(each) for each in batch.micro_batches]
        if kept := vars(pl_module).get("kept"):
            self.rollouts[kept.number :] = [[each[1:] for each in kept.responses]]
        self.micro_batches.append([(each.num_units, each.num_tokens, tuple(each.input_ids.shape)) for each in tokens])

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        """Keep what random layers were seeded with."""
        self.seeds.append(torch.initial_seed())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        """Keep the gradients."""
        parameters = dict(pl_module.backbone.causal_lm.named_parameters())
        head = pl_module.backbone.value_head
        parameters |= {} if head is None else {f"head.{name}": each for name, each in head.named_parameters()}
        trained = {name: each for name, each in parameters.items() if each.requires_grad}
        self.gradients.append({name: whole(parameter) for name, parameter in trained.items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the logged loss."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        values = trainer.callback_metrics.items()
        self.logged.append({name: float(value) for name, value in values if name.startswith("train/")})

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        """Keep how many units the batch holds."""
        if isinstance(batch, PromptBatch):
            self.evaluated_units.append(sum(row >= 0 for row in batch.rows))
            return
        (micro_batch,) = batch.micro_batches
        self.evaluated_units.append(micro_batch.num_units)


def strategy_of(case: dict[str, Any]) -> str | FSDP2Strategy:
    """The strategy of a case: by its name, or fsdp2 with options."""
    asked = case.get("strategy", "ddp")
    return FSDP2Strategy(**asked) if isinstance(asked, dict) else asked


class Loses:
    """The sums of a stage, but that a metric is lost in one step, which its gradient does not show."""

    def __init__(self, stage: Any, step: int) -> None:
        self.stage, self.step, self.sums = stage, step, stage.micro_batch_loss

    def __call__(self, micro_batch: Any) -> LossSums:
        """As the stage, or with nan."""
        found: LossSums = self.sums(micro_batch)
        if not self.stage.trainer.training or self.stage.trainer.global_step != self.step:
            return found
        return found._replace(metrics={name: value * torch.nan for name, value in found.metrics.items()})


def fit(case: dict[str, Any], num_ranks: int, folder: Path) -> dict[str, Any]:
    """Train one case and tell what this rank saw."""
    seed_everything(SEED)
    spec = backbone_spec(case)
    chosen = case.get("optimizer", {"class_path": "AdamW", "init_args": ADAMW})
    stage = getattr(lf_lightning, case["stage"])(
        spec,
        LoRA(rank=2) if case.get("tuning") == "LoRA" else Full(),
        getattr(lf_lightning, chosen["class_path"])(**chosen["init_args"]),
        ScheduleSpec(kind="constant"),
        max_grad_norm=case.get("max_grad_norm"),
        non_finite="skip",
        **options_of(case),
    )
    if case.get("loses") is not None:
        stage.micro_batch_loss = Loses(stage, case["loses"])
    stage.configure_callbacks = list  # no run folder: only the numbers of the step are looked at
    data = DataModule(spec, case["stage"].lower(), cache_dir=str(folder / "cache"), **case["data"])
    recorder = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        strategy=strategy_of(case) if num_ranks > 1 else "auto",
        devices=num_ranks,
        max_epochs=case["epochs"],
        log_every_n_steps=1,
        callbacks=[recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    trainer.fit(stage, data)
    weights = {name: whole(each.detach()) for name, each in stage.backbone.named_parameters() if each.requires_grad}
    return {
        "weights": weights if "optimizer" in case else {},
        "layout": data.layout,
        "gradients": recorder.gradients,
        "losses": recorder.losses,
        "micro_batches": recorder.micro_batches,
        "evaluated_units": recorder.evaluated_units,
        "seeds": recorder.seeds,
        "rollouts": recorder.rollouts,
        "samples": [tuple(sample) for sample in vars(stage).get("samples", [])],
        "val": {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
        "logged": recorder.logged,
        "copies": copies_of(stage),
    }


def fit_all(cases: list[dict[str, Any]], num_ranks: int, folder: Path) -> None:
    """Fit every case on this rank and write what it saw to <folder>/<name>.<rank>.pt."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    LlamaRMSNorm.forward = exact_norm
    for case in cases:
        record = fit(case, num_ranks, folder)
        rank = torch.distributed.get_rank() if num_ranks > 1 else 0
        torch.save(record, folder / f"{case['name']}.{rank}.pt")


def copies_of(stage: Any) -> dict[str, torch.Tensor]:
    """This rank's part of the parameters that it holds as others do which compute layers with it."""
    cut = {name: each for name, each in stage.named_parameters() if isinstance(each, DTensor)}
    same = {
        name: each for name, each in cut.items() if each.device_mesh.ndim == 2 and each.placements[1].is_replicate()
    }
    return {name: each.to_local().detach().clone() for name, each in same.items()}
