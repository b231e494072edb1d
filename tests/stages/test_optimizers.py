"""Optimizers in a run: what a checkpoint holds, a resume bit for bit, and the combinations that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from torch import nn

from lf_lightning import (
    APOLLO,
    PPO,
    PT,
    Adafactor,
    AdamMini,
    AdamW,
    AdamW8bit,
    BackboneSpec,
    BAdam,
    BAdamRatio,
    Freeze,
    Full,
    GaLore,
    InputError,
    LoRA,
    LoRAPlus,
    Muon,
    PagedAdamW,
    RunCheckpoint,
    ScheduleSpec,
)
from lf_lightning.callbacks import last_checkpoint
from lf_lightning.callbacks.sentinels import ChangedWeights, GradientReach
from lf_lightning.models import Tuning, load_backbone
from lf_lightning.models.export import save_weights
from lf_lightning.optim import OptimizerSpec
from lf_lightning.stages.optimizer_doors import check_in_run
from tests.stages.test_base import LLAMA, SCRATCH, continued, pt_data, trainer, write_texts

FULL, LORA = Full(), LoRA(rank=2)
ONE: dict[str, Any] = {"micro_batch_size": 4}
"""One micro-batch a step."""
CASES: dict[str, tuple[OptimizerSpec, Tuning, str]] = {
    "AdamW layerwise": (AdamW(1e-2, layerwise=True), FULL, "float32"),
    "AdamW stochastic": (AdamW(1e-2, weights="stochastic"), FULL, "bfloat16"),
    "AdamW kahan layerwise": (AdamW(1e-2, weights="kahan", layerwise=True), FULL, "bfloat16"),
    "AdamW8bit": (AdamW8bit(1e-2, min_8bit_size=64), FULL, "float32"),
    "Adafactor": (Adafactor(1e-2), FULL, "float32"),
    "Muon": (Muon(1e-2), FULL, "float32"),
    "GaLore": (GaLore(1e-2, rank=4, interval=2, base="adamw_8bit"), FULL, "float32"),
    "APOLLO layerwise": (APOLLO(1e-2, rank=4, interval=2, layerwise=True), Freeze(num_layers=1), "float32"),
    "BAdam": (BAdam(1e-2, switch_interval=2), FULL, "bfloat16"),
    "BAdamRatio": (BAdamRatio(5e-2, update_ratio=0.3, switch_interval=2), FULL, "bfloat16"),
    "AdamMini": (AdamMini(1e-2), FULL, "float32"),
    "LoRAPlus": (LoRAPlus(1e-2, ratio=4.0), LORA, "bfloat16"),
}
SIX = (9, 30, 12, 22, 12, 17, 26, 14)
"""Lengths of 8 texts: two steps of 4 an epoch."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model for adapters."""
    folder = tmp_path_factory.mktemp("base")
    save_weights(load_backbone(SCRATCH, FULL, vocab_size=259, seed=1), folder, base=None, writes=True)
    return folder


class Look(Callback):
    """Losses and gradient norms of a run, and how its weights began."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.start: dict[str, torch.Tensor] = {}
        self.end: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start = {name: each.detach().clone() for name, each in pl_module.backbone.named_parameters()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.end = {name: each.detach().clone() for name, each in pl_module.backbone.named_parameters()}

    @property
    def changed(self) -> set[str]:
        return {name for name, each in self.start.items() if not torch.equal(each, self.end[name])}


def stage_of(name: str, base: Path, **options: Any) -> PT:
    spec, tuning, dtype = CASES[name]
    backbone = BackboneSpec(path=str(base), tokenizer="bytes", dtype=dtype)
    schedule = ScheduleSpec(kind="linear", min_ratio=0.5)
    norm = None if spec.is_layerwise else 1.0
    return PT(backbone, tuning, spec, schedule, **{"max_grad_norm": norm, **options})


def run_of(folder: Path, name: str, base: Path, texts: str, **options: Any) -> Look:
    """Six steps with a checkpoint after each; it continues where the folder holds one."""
    seed_everything(3, verbose=False)
    look, stage = Look(), stage_of(name, base)
    keep = RunCheckpoint(every_n_steps=options.pop("every", 3))
    run = trainer(folder, look, keep, ChangedWeights(at_least=0.0), GradientReach(2), max_epochs=3, **options)
    run.fit(stage, pt_data(texts, stage.backbone_spec, **ONE), ckpt_path=last_checkpoint(folder), weights_only=True)
    return look


@pytest.mark.parametrize("name", CASES)
def test_a_run_learns_trains_what_it_should_and_is_resumed_bit_for_bit(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_texts(tmp_path, SIX)
    straight = run_of(tmp_path / "straight", name, base, texts)
    assert "got no gradient" not in capsys.readouterr().err
    assert len(straight.losses) == 6
    assert straight.losses[-1] < straight.losses[0] - 0.1
    assert all(norm > 0 for norm in straight.norms)
    spec, tuning, _ = CASES[name]
    trained = {each for each in straight.start if ("lora_" in each if isinstance(tuning, LoRA) else True)}
    if isinstance(tuning, Freeze):
        trained = {each for each in straight.start if ".layers.1." in each}
    if isinstance(spec, BAdam):
        trained = {each for each in straight.start if ".layers." in each}
    if isinstance(spec, BAdamRatio):
        trained = {each for each in straight.start if "embed" not in each and "lm_head" not in each}
    assert straight.changed == trained
    assert {straight.end[each].dtype for each in trained} == {
        torch.bfloat16 if spec.keeps_bfloat16 and isinstance(tuning, Full) else torch.float32
    }
    folder = continued(tmp_path / "straight", tmp_path / "again", 3)
    rest = run_of(folder, name, base, texts)
    assert rest.losses == straight.losses[3:]
    assert rest.norms == straight.norms[3:]
    file = "adapter_model.safetensors" if isinstance(tuning, LoRA) else "model.safetensors"
    ours, theirs = (load_file(each / "final" / file) for each in (folder, tmp_path / "straight"))
    assert all(torch.equal(ours[each], theirs[each]) for each in theirs)
    path = "checkpoints/step-00000006/trainer_state/state.ckpt"
    states = [torch.load(each / path, weights_only=True) for each in (folder, tmp_path / "straight")]
    one, other = (state["optimizer_states"][0] for state in states)
    assert one["param_groups"] == other["param_groups"]
    assert str(sorted(one["state"].items())) == str(sorted(other["state"].items()))
    assert one["state"], "moments are there"


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spec", "tuning", "options", "message"),
    [
        (GaLore(), LORA, {}, r"optimizer\.class_path: GaLore trains whole weights, got tuning LoRA\. .*Full or Freeze"),
        (APOLLO(), LORA, {}, "APOLLO trains whole weights, got tuning LoRA"),
        (BAdam(), LORA, {}, "BAdam trains whole weights, got tuning LoRA"),
        (BAdamRatio(), LORA, {}, "BAdamRatio trains whole weights, got tuning LoRA"),
        (LoRAPlus(), FULL, {}, "LoRAPlus needs a LoRA, got tuning Full"),
        (AdamW(weights="kahan"), Freeze(), {}, "weights: must be float32 unless the tuning is Full, got kahan"),
        (AdamW(weights="kahan"), FULL, {"dtype": "float32"}, r"weights: must be float32 with backbone\.dtype: float32"),
        (AdamW(layerwise=True), FULL, {}, r"max_grad_norm: must be null with optimizer\.init_args\.layerwise: true"),
        (
            AdamW(layerwise=True),
            FULL,
            {"max_grad_norm": None, "non_finite": "skip"},
            "non_finite: must be stop with optimizer",
        ),
    ],
)
def test_specs_that_do_not_fit_together_are_refused(
    spec: OptimizerSpec, tuning: Tuning, options: dict[str, Any], message: str
) -> None:
    backbone = BackboneSpec(architecture=LLAMA, tokenizer="bytes", dtype=options.pop("dtype", "auto"))
    with pytest.raises(InputError, match=rf"^model\.init_args\..*{message}"):
        PT(backbone, tuning, spec, **options)


def test_layerwise_is_refused_where_a_step_may_be_given_up() -> None:
    from lf_lightning import RewardFunction
    from tests.stages.test_rollout_contract import SPREAD

    with pytest.raises(InputError, match="layerwise: must be false with PPO"):
        PPO(SCRATCH, FULL, AdamW(layerwise=True), rewards=[RewardFunction(**SPREAD)], max_grad_norm=None)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (PagedAdamW(), {}, "PagedAdamW needs a GPU, got the CPU"),
        (AdamW8bit(paged=True), {}, r"init_args\.paged: needs a GPU, got the CPU"),
        (AdamW8bit(), {"strategy": "fsdp2", "devices": 2}, r"trainer\.strategy: must be auto or ddp with AdamW8bit"),
        (Adafactor(), {"strategy": "fsdp2", "devices": 2}, "must be auto or ddp with Adafactor, got fsdp2"),
        (GaLore(), {"strategy": "fsdp2", "devices": 2}, "must be auto or ddp with GaLore, got fsdp2"),
        (APOLLO(), {"strategy": "fsdp2", "devices": 2}, "must be auto or ddp with APOLLO, got fsdp2"),
        (AdamMini(), {"strategy": "fsdp2", "devices": 2}, "must be auto or ddp with AdamMini, got fsdp2"),
        (BAdam(), {"strategy": "ddp", "devices": 2}, "must be auto with BAdam, got ddp"),
        (BAdamRatio(), {"strategy": "ddp", "devices": 2}, "must be auto with BAdamRatio, got ddp"),
        (AdamW(layerwise=True), {"strategy": "ddp", "devices": 2}, r"trainer\.devices: must be 1 with optimizer"),
        (AdamW(layerwise=True), {}, r"data\.micro_batch_size: must be at least data\.global.* got 2\. Set 4"),
    ],
)  # fmt: skip
def test_trainers_and_batches_that_an_optimizer_cannot_work_with_are_refused(
    spec: OptimizerSpec, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = Trainer(accelerator="cpu", **{"devices": 1, "logger": False, **options}, enable_checkpointing=False)
    with pytest.raises(InputError, match=message):
        check_in_run(spec, run, pt_data(write_texts(tmp_path)))


def test_what_is_sharded_can_have_what_works_there() -> None:
    run = Trainer(accelerator="cpu", devices=2, strategy="fsdp2", logger=False, enable_checkpointing=False)
    for spec in (AdamW(), AdamW(weights="kahan"), LoRAPlus(), Muon()):
        check_in_run(spec, run, None)


def test_python_runs_are_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    stage = PT(SCRATCH, FULL, AdamW(layerwise=True), max_grad_norm=None)
    with pytest.raises(InputError, match=r"data\.micro_batch_size: must be at least"):
        trainer(tmp_path).fit(stage, pt_data(write_texts(tmp_path)))
    assert stage._backbone is None


def test_a_norm_that_is_not_finite_stops_a_layerwise_run(tmp_path: Path) -> None:
    from lf_lightning.types import TrainingStopped
    from tests.stages.test_base import At, break_gradient

    stage = PT(SCRATCH, FULL, AdamW(1e-2, layerwise=True), max_grad_norm=None)
    with pytest.raises(TrainingStopped, match="step 2: the gradient is not finite"):
        trainer(tmp_path, At(1, break_gradient)).fit(stage, pt_data(write_texts(tmp_path), **ONE))
    assert all(each.isfinite().all() for each in stage.parameters())


def test_float16_weights_are_not_kept_for_an_optimizer_of_bfloat16(base: Path, tmp_path: Path) -> None:
    backbone = BackboneSpec(path=str(base), tokenizer="bytes", dtype="float16")
    stage = PT(backbone, FULL, BAdam())
    with pytest.raises(InputError, match=r"backbone\.dtype: must be bfloat16 or float32 with BAdam, got float16"):
        trainer(tmp_path).fit(stage, pt_data(write_texts(tmp_path), backbone))


def test_a_model_knows_heads_blocks_and_embeddings(base: Path, tmp_path: Path) -> None:
    from lf_lightning.optim import describe
    from lf_lightning.stages.optimization import _anatomy

    backbone = load_backbone(BackboneSpec(path=str(base), tokenizer="bytes"), FULL, vocab_size=259, seed=1)
    found = {each.name.removeprefix("model."): each for each in describe(backbone, **_anatomy(backbone))}
    assert isinstance(backbone, nn.Module)
    assert found["model.embed_tokens.weight"].role == "embedding"
    assert found["lm_head.weight"].role == "head"
    assert found["model.norm.weight"].role == "vector"
    assert found["model.layers.1.mlp.up_proj.weight"][2:] == ("linear", 1, None)
    assert found["model.layers.0.self_attn.k_proj.weight"][2:] == ("linear", 0, 4)
    assert found["model.layers.0.self_attn.v_proj.weight"][2:] == ("linear", 0, None)
