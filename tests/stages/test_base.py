"""The optimizer step that all stages share: when it is given up, clipped, scheduled, drawn, resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn

from lf_lightning import PT, SFT, AdamW, BackboneSpec, DataModule, Full, InputError, LoRA, RunCheckpoint, ScheduleSpec
from lf_lightning.callbacks import last_checkpoint
from lf_lightning.models import Tuning, load_backbone
from lf_lightning.models.export import save_weights
from lf_lightning.types import TrainingStopped

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
SCRATCH = BackboneSpec(architecture=LLAMA, tokenizer="bytes")
FULL = Full()
ADAMW = AdamW(lr=1e-2, eps=1e-2)


class Watch(Callback):
    """Look at a run: what the optimizer gets, which rows it sees, how random layers are seeded."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.options: list[dict[str, Any]] = []
        self.seeds: list[int] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.rows: list[list[list[list[int]]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([micro_batch.input_ids.tolist() for micro_batch in batch.micro_batches])

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        self.seeds.append(torch.initial_seed())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        parameters = [(name, each) for name, each in pl_module.named_parameters() if each.grad is not None]
        self.gradients.append({name: each.grad.clone() for name, each in parameters})
        self.options.append({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.norms.append(float(trainer.callback_metrics["train/grad_norm"]))


class At(Callback):
    """Do something at the beginning of one step, from 0, and undo it at its end."""

    def __init__(self, step: int, act: Callable[[Any], Any]) -> None:
        self.step, self.act, self._handle = step, act, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self._handle = self.act(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def break_loss(stage: Any) -> Any:
    """Make the hidden states not a number."""
    return stage.backbone.causal_lm.model.norm.register_forward_hook(lambda *inputs: inputs[-1] * math.nan)


def break_gradient(stage: Any) -> Any:
    """Make one gradient infinite; the loss stays finite."""
    return stage.backbone.causal_lm.model.norm.weight.register_hook(lambda gradient: gradient + math.inf)


def write_texts(folder: Path, lengths: tuple[int, ...] = (3, 17, 9, 30, 5, 22, 12, 7, 26, 14)) -> str:
    path = folder / "texts.json"
    letters = "abcdefghijklmnopqrstuvwxyz abcdefghi"
    path.write_text(json.dumps([{"text": letters[index : index + length]} for index, length in enumerate(lengths)]))
    return str(path)


def pt_data(path: str, spec: BackboneSpec = SCRATCH, **options: Any) -> DataModule:
    arguments = {"template": "default", "max_length": 64, "global_batch_size": 4, "micro_batch_size": 2}
    arguments |= {"seed": 3, "cache_dir": None}
    return DataModule(spec, "pt", datasets=[{"path": path, "formatting": "text"}], **{**arguments, **options})


def pt_stage(spec: BackboneSpec = SCRATCH, tuning: Tuning = FULL, optimizer: AdamW = ADAMW, **options: Any) -> PT:
    return PT(spec, tuning, optimizer, **{"schedule": ScheduleSpec(kind="constant"), **options})


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    arguments: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{**arguments, **options},
    )


def fit(folder: Path, stage: PT, data: DataModule, *callbacks: Callback, **options: Any) -> Watch:
    """A run without checkpoints, and what there was to see of it."""
    seed_everything(3)
    stage.seed = 3
    watch = Watch()
    trainer(folder / "run", watch, *callbacks, **options).fit(stage, data)
    return watch


def weights_of(stage: PT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in stage.backbone.causal_lm.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# ---------------------------------------------------------------------- steps that are not finite


@pytest.mark.parametrize(("act", "what"), [(break_loss, "loss"), (break_gradient, "gradient")])
def test_a_step_that_is_not_finite_stops_the_run_and_is_named(tmp_path: Path, act: Any, what: str) -> None:
    stage = pt_stage()
    with pytest.raises(TrainingStopped, match=f"step 2: the {what} is not finite, got .*(nan|inf)"):
        fit(tmp_path, stage, pt_data(write_texts(tmp_path)), At(1, act))


class WeightsOfEachStep(Callback):
    """Weights, moments and rate after every step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[list[Tensor]] = []
        self.global_steps: list[int] = []
        self.skipped: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(weights_of(pl_module))
        states = trainer.optimizers[0].state.values()
        self.moments.append([state[name].clone() for state in states for name in ("exp_avg", "exp_avg_sq", "step")])
        self.global_steps.append(trainer.global_step)
        self.skipped.append(pl_module.guard.num_skipped_steps)


@pytest.mark.parametrize("act", [break_loss, break_gradient])
def test_a_skipped_step_changes_neither_weights_nor_moments_and_still_counts(tmp_path: Path, act: Any) -> None:
    after = WeightsOfEachStep()
    stage = pt_stage(non_finite="skip", schedule=ScheduleSpec(kind="linear"))
    watch = fit(tmp_path, stage, pt_data(write_texts(tmp_path)), At(1, act), after)
    assert same(after.weights[1], after.weights[0])
    assert all(torch.equal(new, old) for new, old in zip(after.moments[1], after.moments[0], strict=True))
    assert not same(after.weights[2], after.weights[1])
    assert after.global_steps == [1, 2, 3]
    assert after.skipped == [0, 1, 1]
    assert watch.rates == pytest.approx([0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_the_log_of_a_skipped_step_is_still_json(tmp_path: Path) -> None:
    stage = pt_stage(non_finite="skip")
    fit(tmp_path, stage, pt_data(write_texts(tmp_path)), At(1, break_loss))
    lines = (tmp_path / "run" / "trainer_log.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert len([json.loads(line, parse_constant=refuse) for line in lines]) == 3


# ---------------------------------------------------------------------- clipping


def test_the_logged_norm_is_the_one_before_clipping_and_the_update_is_the_clipped_one(tmp_path: Path) -> None:
    stage = pt_stage(max_grad_norm=0.1)
    watch = fit(tmp_path, stage, pt_data(write_texts(tmp_path)))
    plain = load_backbone(SCRATCH, Full(), vocab_size=259, seed=3).causal_lm
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0)
    for gradients, logged in zip(watch.gradients, watch.norms, strict=True):
        for name, parameter in plain.named_parameters():
            parameter.grad = gradients[f"_backbone.model.{name}"].clone()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        optimizer.step()
        assert logged == pytest.approx(float(norm), rel=1e-6)
        assert logged > 0.2, "the norm must be above the limit for this test to say anything"
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(weights_of(stage)[name], parameter.detach(), rtol=0, atol=1e-7)


def test_without_a_limit_the_gradient_is_used_as_it_is(tmp_path: Path) -> None:
    weights = []
    for limit in (None, 1e9, 0.1):
        stage = pt_stage(max_grad_norm=limit)
        fit(tmp_path / str(limit), stage, pt_data(write_texts(tmp_path)))
        weights.append(weights_of(stage))
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_limit_that_is_not_positive_is_refused(limit: float) -> None:
    with pytest.raises(InputError, match=r"max_grad_norm: must be positive or null, got .* Use null"):
        pt_stage(max_grad_norm=limit)


# ---------------------------------------------------------------------- schedule


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_the_schedule_counts_optimizer_steps(tmp_path: Path, micro_batch_size: int) -> None:
    stage = pt_stage(schedule=ScheduleSpec(kind="linear", warmup_steps=2))
    data = pt_data(write_texts(tmp_path), micro_batch_size=micro_batch_size)
    watch = fit(tmp_path, stage, data, max_epochs=2)
    assert watch.rates == pytest.approx([0.0, 0.005, 0.01, 0.0075, 0.005, 0.0025])


def test_a_run_that_max_steps_ends_is_scheduled_to_its_end(tmp_path: Path) -> None:
    stage = pt_stage(schedule=ScheduleSpec(kind="linear"))
    watch = fit(tmp_path, stage, pt_data(write_texts(tmp_path)), max_epochs=-1, max_steps=5)
    assert watch.rates == pytest.approx([0.01, 0.008, 0.006, 0.004, 0.002])


# ---------------------------------------------------------------------- randomness


def lora_base(folder: Path) -> BackboneSpec:
    """A base model that adapters can name, in a folder."""
    base = folder / "base"
    base.mkdir()
    save_weights(load_backbone(SCRATCH, Full(), vocab_size=259, seed=1), base, base=None, writes=True)
    return BackboneSpec(path=str(base), tokenizer="bytes")


class Disturb(Callback):
    """Draw random numbers where nobody expects it."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.rand(batch_idx + 5)
        if batch_idx == 1:
            torch.manual_seed(99)


def test_dropout_is_a_function_of_seed_step_and_micro_batch(tmp_path: Path) -> None:
    spec, path = lora_base(tmp_path), write_texts(tmp_path)
    stages = [pt_stage(spec, LoRA(dropout=0.5)) for _ in range(3)]
    first = fit(tmp_path / "a", stages[0], pt_data(path, spec))
    second = fit(tmp_path / "b", stages[1], pt_data(path, spec), Disturb())
    assert first.losses == second.losses
    assert first.seeds == second.seeds
    assert len(first.seeds) == len(set(first.seeds)) == 5, "two micro-batches in steps 0 and 1, one in the last"
    seed_everything(4)
    stages[2].seed = 3  # the same weights and order, another draw
    watch = Watch()
    at_step_0 = At(0, lambda stage: setattr(stage, "seed", 4))
    trainer(tmp_path / "c", watch, at_step_0).fit(stages[2], pt_data(path, spec))
    assert watch.rows == first.rows
    assert not set(watch.seeds) & set(first.seeds)


def test_without_random_layers_the_draw_changes_nothing(tmp_path: Path) -> None:
    first = fit(tmp_path / "a", pt_stage(), pt_data(write_texts(tmp_path)))
    second = fit(tmp_path / "b", pt_stage(), pt_data(write_texts(tmp_path)), At(1, lambda s: setattr(s, "seed", 9)))
    assert first.losses == second.losses


# ---------------------------------------------------------------------- nothing to learn


def test_a_micro_batch_without_a_label_adds_nothing(tmp_path: Path) -> None:
    # blocks of 8 of 17 tokens: the last block holds one token, which predicts nothing
    path = write_texts(tmp_path, (16,))
    options: dict[str, Any] = {"packing": "blocks", "max_length": 8, "shuffle": False}
    apart = fit(tmp_path / "a", pt_stage(), pt_data(path, global_batch_size=3, micro_batch_size=1, **options))
    together = fit(tmp_path / "b", pt_stage(), pt_data(path, global_batch_size=3, micro_batch_size=3, **options))
    assert [[len(row) for row in batch] for batch in apart.rows[0]] == [[8], [8], [1]]
    assert apart.losses == pytest.approx(together.losses, rel=1e-6)
    for name, gradient in apart.gradients[0].items():
        scale = float(together.gradients[0][name].abs().max())
        torch.testing.assert_close(gradient, together.gradients[0][name], rtol=0, atol=1e-5 * scale)


def test_a_step_without_a_label_has_a_gradient_of_zero(tmp_path: Path) -> None:
    options: dict[str, Any] = {"packing": "blocks", "max_length": 8, "shuffle": False}
    data = pt_data(write_texts(tmp_path, (16,)), global_batch_size=2, **options)
    watch = fit(tmp_path, pt_stage(), data)
    assert len(watch.losses) == 2
    assert watch.losses[1] == 0.0
    assert watch.norms[1] == 0.0
    assert watch.gradients[1].keys() == watch.gradients[0].keys()
    assert all(not gradient.any() for gradient in watch.gradients[1].values())


# ---------------------------------------------------------------------- resume


def continued(straight: Path, folder: Path, step: int) -> Path:
    """The run folder as it was just after the checkpoint of a step."""
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "final")
    for checkpoint in (folder / "checkpoints").iterdir():
        if checkpoint.name > f"step-{step:08d}":
            shutil.rmtree(checkpoint)
    return folder


def stage_of(kind: str, spec: BackboneSpec) -> PT:
    tuning = LoRA(dropout=0.1) if kind == "lora" else Full()
    return pt_stage(spec, tuning, schedule=ScheduleSpec(kind="cosine", warmup_ratio=0.2))


def run_of_6(folder: Path, kind: str, spec: BackboneSpec, path: str, **options: Any) -> Watch:
    """Six steps in two epochs with validation; it continues where the folder holds a checkpoint."""
    seed_everything(3)
    watch = Watch()
    run = trainer(folder, watch, RunCheckpoint(every_n_steps=options.pop("every", 1)), max_epochs=2)
    data = pt_data(path, spec, val_size=0.2, **options)
    run.fit(stage_of(kind, spec), data, ckpt_path=last_checkpoint(folder), weights_only=True)
    return watch


def state_of(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints/step-00000006/trainer_state/state.ckpt", weights_only=True)


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    timed = ("elapsed_time", "remaining_time", "throughput")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


TWELVE = (3, 17, 9, 30, 5, 22, 12, 7, 26, 14, 11, 19, 8)
"""Lengths of 13 texts, of which 3 validate: 10 units in steps of 4, 4, 2."""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_is_bit_identical_to_the_one_that_was_never_interrupted(tmp_path: Path, kind: str) -> None:
    spec = lora_base(tmp_path)
    path = write_texts(tmp_path, TWELVE)
    straight = tmp_path / "straight"
    whole = run_of_6(straight, kind, spec, path)
    assert len(whole.losses) == 6
    assert [sum(len(batch) for batch in step) for step in whole.rows] == [2, 2, 1, 2, 2, 1]
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    for step, where in ((2, "in the first epoch"), (3, "at the end of an epoch"), (5, "in the second epoch")):
        folder = continued(straight, tmp_path / f"from-{step}", step)
        rest = run_of_6(folder, kind, spec, path)
        assert rest.rows == whole.rows[step:], where
        assert rest.losses == whole.losses[step:], where
        assert rest.seeds == whole.seeds[len(whole.seeds) - len(rest.seeds) :], where
        assert same(load_file(folder / "final" / weights), load_file(straight / "final" / weights)), where
        assert log_of(folder) == log_of(straight), where
        ours, theirs = state_of(folder)["optimizer_states"][0], state_of(straight)["optimizer_states"][0]
        assert ours["param_groups"] == theirs["param_groups"], where
        for index, moments in theirs["state"].items():
            assert same(ours["state"][index], moments), where


def test_checkpoints_do_not_change_the_run_and_a_finished_run_trains_nothing_more(tmp_path: Path) -> None:
    spec = lora_base(tmp_path)
    path = write_texts(tmp_path, TWELVE)
    first = run_of_6(tmp_path / "a", "lora", spec, path)
    second = run_of_6(tmp_path / "b", "lora", spec, path, every=None)
    assert first.losses == second.losses
    shutil.rmtree(tmp_path / "a" / "final")
    again = run_of_6(tmp_path / "a", "lora", spec, path)
    assert again.losses == []
    finals = [load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("a", "b")]
    assert same(*finals)


def test_a_resume_with_other_micro_batches_goes_on_to_rounding(tmp_path: Path) -> None:
    spec = lora_base(tmp_path)
    path = write_texts(tmp_path, TWELVE)
    whole = run_of_6(tmp_path / "straight", "full", spec, path)
    folder = continued(tmp_path / "straight", tmp_path / "other", 2)
    rest = run_of_6(folder, "full", spec, path, micro_batch_size=1)
    assert [len(step) for step in rest.rows] == [2, 4, 4, 2]
    assert rest.losses == pytest.approx(whole.losses[2:], rel=1e-5)


def test_a_resume_with_another_global_batch_size_goes_on_with_the_next_unit(tmp_path: Path) -> None:
    spec = lora_base(tmp_path)
    path = write_texts(tmp_path, TWELVE)
    whole = run_of_6(tmp_path / "straight", "full", spec, path, layout="padded", micro_batch_size=1)
    folder = continued(tmp_path / "straight", tmp_path / "other", 1)
    options = {"global_batch_size": 2, "accept_changes": True}
    rest = run_of_6(folder, "full", spec, path, layout="padded", micro_batch_size=1, **options)

    def units(steps: list[list[list[list[int]]]]) -> list[list[int]]:
        return sorted(row for step in steps for micro_batch in step for row in micro_batch)

    assert units(rest.rows[:3]) == units(whole.rows[1:3]), "the rest of the first epoch: 6 units in steps of 2"


def test_the_configuration_beats_the_checkpoint(tmp_path: Path) -> None:
    spec = lora_base(tmp_path)
    path = write_texts(tmp_path, TWELVE)
    run_of_6(tmp_path / "straight", "full", spec, path)
    folder = continued(tmp_path / "straight", tmp_path / "changed", 3)
    optimizer = AdamW(lr=4e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.25)
    stage = pt_stage(spec, Full(), optimizer, schedule=ScheduleSpec(kind="linear"))
    seed_everything(3)
    watch = Watch()
    run = trainer(folder, watch, RunCheckpoint(every_n_steps=None), max_epochs=2)
    run.fit(stage, pt_data(path, spec, val_size=0.2), ckpt_path=last_checkpoint(folder), weights_only=True)
    assert watch.rates == pytest.approx([4e-3 * 3 / 6, 4e-3 * 2 / 6, 4e-3 * 1 / 6])
    used = [(each["betas"], each["eps"], each["weight_decay"]) for each in watch.options]
    assert used == [((0.8, 0.95), 1e-6, 0.25)] * 3
    assert [float(state["step"]) for state in run.optimizers[0].state.values()] == [6.0] * 21, "the moments go on"


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    spec = lora_base(tmp_path)
    run_of_6(tmp_path / "straight", "full", spec, write_texts(tmp_path, TWELVE))
    folder = continued(tmp_path / "straight", tmp_path / "other", 3)
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 8))
    data = DataModule(spec, "sft", datasets=[{"path": str(tmp_path / "rows.json")}], template="chatml", cache_dir=None)
    with pytest.raises(InputError, match="must be PT, the stage of this checkpoint, got SFT"):
        trainer(folder).fit(SFT(spec, Full()), data, ckpt_path=last_checkpoint(folder), weights_only=True)


# ---------------------------------------------------------------------- memory, types, evaluation alone


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    path = write_texts(tmp_path)
    spec = BackboneSpec(architecture=LLAMA, tokenizer="bytes", gradient_checkpointing=True)
    plain = fit(tmp_path / "a", pt_stage(), pt_data(path))
    saving = fit(tmp_path / "b", pt_stage(spec), pt_data(path, spec))
    assert plain.losses == pytest.approx(saving.losses, rel=1e-6)
    for name, gradient in plain.gradients[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(saving.gradients[0][name], gradient, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_adapters_train_in_float32_over_a_bfloat16_base(tmp_path: Path, precision: str, layout: str) -> None:
    base = lora_base(tmp_path)
    spec = BackboneSpec(path=base.path, tokenizer="bytes", dtype="bfloat16")
    stage = pt_stage(spec, LoRA())
    data = pt_data(write_texts(tmp_path), spec, layout=layout)
    watch = fit(tmp_path, stage, data, precision=precision, max_epochs=3)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in stage.backbone.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert watch.losses[-1] < watch.losses[0]


def test_validate_measures_the_weights_of_a_folder(tmp_path: Path) -> None:
    path = write_texts(tmp_path, TWELVE)
    stage = pt_stage()
    run = trainer(tmp_path / "run")
    run.fit(stage, pt_data(path, val_size=3))
    trained = float(run.callback_metrics["val/loss"])
    for folder, equal in ((tmp_path / "run" / "final", True), (None, False)):
        other = pt_stage()
        other.weights_folder = folder
        judge = trainer(tmp_path / "judge")
        judge.validate(other, pt_data(path, val_size=3), verbose=False)
        assert (float(judge.callback_metrics["val/loss"]) == pytest.approx(trained, rel=1e-6)) is equal
