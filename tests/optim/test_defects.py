"""What was wrong in LlamaFactory's optimizers and schedules, by the numbers of reference/llamafactory.md, section 8."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lf_lightning import (
    APOLLO,
    AdamW,
    BackboneSpec,
    BAdam,
    BAdamRatio,
    Full,
    GaLore,
    LoRA,
    LoRAPlus,
    Muon,
    ScheduleSpec,
)
from lf_lightning.models import load_backbone
from lf_lightning.optim import describe
from tests.cli.runs import LLAMA
from tests.optim.toy import build, same, toy, train


def test_defect_6_low_rank_and_block_optimizers_need_no_other_option() -> None:
    for spec in (GaLore(), APOLLO(), BAdam(), BAdamRatio()):  # there they fail with the default `optim`
        run = train(dataclasses.replace(spec, lr=1e-2), 3)
        assert run.losses[-1] < run.losses[0]


def test_defect_16_every_stage_takes_every_schedule() -> None:
    import inspect

    from lf_lightning.stages import STAGES

    for stage in STAGES:  # there PPO ignores lr_scheduler_kwargs, and schedules that need them crash
        assert inspect.signature(stage).parameters["schedule"].default == ScheduleSpec()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_defect_28_badam_decays_as_much_as_it_is_told(decay: float) -> None:
    for spec in (BAdam(weight_decay=decay), BAdamRatio(weight_decay=decay)):
        groups = build(spec, toy()).param_groups  # there 0.01 whatever is asked for, norms and biases included
        assert {group["weight_decay"] for group in groups} == {decay, 0.0}
        assert [{parameter.ndim for parameter in group["params"]} for group in groups] == [{2}, {1}]


def test_defect_29_rms_norms_are_not_decayed_and_muon_has_two_rates() -> None:
    model = toy()
    optimizer = build(Muon(1.0, adamw_lr=0.5, weight_decay=0.1), model)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found[id(model.norm.weight)] == (0.5, 0.0)  # there: decayed
    assert found[id(model.layers[0].up_proj.weight)] == (1.0, 0.1)
    assert found[id(model.embed.weight)] == (0.5, 0.1)  # there: one rate for all


def test_defect_30_where_apollo_applies_its_factor_is_heeded() -> None:
    back, front = (train(APOLLO(1e-2, rank=3, scale_front=each), 4) for each in (False, True))
    norms = [float(run.optimizer.state[run.model.layers[0].up_proj.weight]["norm"]) for run in (back, front)]
    assert norms[1] > 2 * norms[0]  # there: the option has no effect


def test_defect_31_the_state_of_a_layerwise_optimizer_is_in_the_checkpoint() -> None:
    for spec in (GaLore(1e-2, rank=3, layerwise=True), APOLLO(1e-2, rank=3, layerwise=True)):
        straight = train(spec, 6, save_at=3)
        moments = straight.saved["optimizer"]["state"]  # there: one dummy of size one
        assert len(moments) == len(list(toy().parameters()))
        assert all("exp_avg" in values for values in moments.values())
        assert same(train(spec, 3, saved=straight.saved).weights(), straight.weights())
        forgotten = {"model": straight.saved["model"], "optimizer": build(spec, toy()).state_dict()}
        assert not same(train(spec, 3, saved=forgotten).weights(), straight.weights())


def test_defect_32_a_target_is_a_name_and_no_piece_of_one() -> None:
    model = toy()
    optimizer = build(GaLore(rank=3, target=["1.up_proj"]), model)
    (group,) = [group for group in optimizer.param_groups if group["is_projected"]]
    assert [id(each) for each in group["params"]] == [id(model.layers[1].up_proj.weight)]


def test_defect_42_pure_bfloat16_means_bfloat16_whatever_the_files_hold(tmp_path: Path) -> None:
    whole = load_backbone(BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes"), Full(), vocab_size=259, seed=0)
    whole.causal_lm.save_pretrained(tmp_path)  # float32 files: there they train in float32
    spec = BackboneSpec(path=str(tmp_path), tokenizer="bytes", dtype="bfloat16")
    for optimizer, want in ((AdamW(weights="kahan"), torch.bfloat16), (AdamW(), torch.float32)):
        kept = load_backbone(spec, Full(), vocab_size=259, seed=0, keeps_bfloat16=optimizer.keeps_bfloat16)
        assert {parameter.dtype for parameter in kept.parameters()} == {want}


def test_defect_50_lora_plus_leaves_vectors_and_embeddings_their_own_rates(tmp_path: Path) -> None:
    spec = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")
    load_backbone(spec, Full(), vocab_size=259, seed=0).causal_lm.save_pretrained(tmp_path)
    adapted = load_backbone(BackboneSpec(path=str(tmp_path), tokenizer="bytes"), LoRA(rank=2), vocab_size=259, seed=0)
    layer: Any = adapted.causal_lm.model.layers[0].self_attn.q_proj
    layer.lora_magnitude_vector["default"] = nn.Linear(1, 4, bias=False)  # what DoRA adds
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.ones(4))
    adapted.causal_lm.model.embed_tokens.weight.requires_grad_(True)
    trained = describe(adapted)
    optimizer = LoRAPlus(lr=1.0, ratio=8.0, embedding_lr=0.25).build(trained)
    names = {id(each.parameter): each.name for each in trained}
    rates: dict[str, set[float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kind = next(part for part in ("lora_A", "lora_B", "magnitude", "embed") if part in names[id(parameter)])
            rates.setdefault(kind, set()).add(group["lr"])
    assert rates == {"lora_A": {1.0}, "lora_B": {8.0}, "magnitude": {1.0}, "embed": {0.25}}


def test_an_attention_head_is_as_large_as_the_configuration_says(tmp_path: Path) -> None:
    # adam-mini 1.1.1 takes hidden_size / num_heads, here 4
    architecture = {**LLAMA, "model_type": "qwen3", "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    spec = BackboneSpec(architecture=architecture, tokenizer="bytes")
    from lf_lightning.stages.optimization import _anatomy

    backbone = load_backbone(spec, Full(), vocab_size=259, seed=0)
    rows = {each.name: each.head_rows for each in describe(backbone, **_anatomy(backbone))}
    assert {value for name, value in rows.items() if "q_proj" in name or "k_proj" in name} == {8}
