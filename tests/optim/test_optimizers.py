"""Every optimizer: it learns a toy, trains what it should, comes back bit for bit, and heeds its options."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import lf_lightning
from lf_lightning import (
    APOLLO,
    Adafactor,
    AdamMini,
    AdamW,
    AdamW8bit,
    BAdam,
    BAdamRatio,
    GaLore,
    InputError,
    LoRAPlus,
    Muon,
    PagedAdamW,
)
from lf_lightning.optim import LayerwiseOptimizer, OptimizerSpec, describe, group_options
from lf_lightning.optim.apollo import _limited
from tests.optim.toy import HEAD, NUM_BLOCKS, WIDTH, WORDS, build, changed, same, toy, train

HALF = torch.bfloat16
LOW: dict[str, Any] = {"rank": 3, "interval": 3}
CASES: dict[str, tuple[OptimizerSpec, torch.dtype]] = {
    "AdamW": (AdamW(1e-2), torch.float32),
    "AdamW fused": (AdamW(1e-2, fused=True), torch.float32),
    "AdamW layerwise": (AdamW(1e-2, layerwise=True), torch.float32),
    "AdamW kahan": (AdamW(1e-2, weights="kahan"), HALF),
    "AdamW stochastic": (AdamW(1e-2, weights="stochastic"), HALF),
    "AdamW stochastic layerwise": (AdamW(1e-2, weights="stochastic", layerwise=True), HALF),
    "AdamW8bit": (AdamW8bit(1e-2, min_8bit_size=64), torch.float32),
    "Adafactor": (Adafactor(1e-2), torch.float32),
    "Adafactor layerwise with a mean": (Adafactor(1e-2, beta1=0.9, layerwise=True), torch.float32),
    "Muon": (Muon(1e-2), torch.float32),
    "GaLore": (GaLore(1e-2, **LOW), torch.float32),
    "GaLore adafactor": (GaLore(1e-2, base="adafactor", **LOW), torch.float32),
    "GaLore 8 bit": (GaLore(1e-2, base="adamw_8bit", **LOW), torch.float32),
    "GaLore layerwise": (GaLore(1e-2, layerwise=True, projection="full", **LOW), torch.float32),
    "APOLLO": (APOLLO(1e-2, **LOW), torch.float32),
    "APOLLO layerwise": (APOLLO(1e-2, layerwise=True, projection="svd", **LOW), torch.float32),
    "BAdam": (BAdam(2e-2, switch_interval=2), torch.float32),
    "BAdam random": (BAdam(2e-2, switch_interval=2, switch_mode="random"), HALF),
    "BAdamRatio": (BAdamRatio(4e-2, update_ratio=0.3, switch_interval=3), torch.float32),
    "BAdamRatio scatter": (BAdamRatio(4e-2, update_ratio=0.3, switch_interval=3, mask_mode="scatter"), HALF),
    "AdamMini": (AdamMini(1e-2), torch.float32),
}
ALL = set(dict(toy().named_parameters()))
INSIDE = {name for name in ALL if name not in ("embed.weight", "lm_head.weight")}


def of_block(index: int) -> set[str]:
    return {name for name in ALL if name.startswith(f"layers.{index}.")}


@pytest.mark.parametrize("name", CASES)
def test_it_learns_a_toy_and_continues_from_a_checkpoint_bit_for_bit(name: str) -> None:
    spec, dtype = CASES[name]
    straight = train(spec, 16, save_at=7, dtype=dtype)
    assert straight.losses[0] == pytest.approx(2.60, abs=0.02)
    assert straight.losses[-1] < 2.2
    rest = train(spec, 9, saved=straight.saved, dtype=dtype)
    assert rest.losses == straight.losses[7:]
    assert same(rest.weights(), straight.weights())
    ours, theirs = rest.optimizer.state_dict(), straight.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for number, values in theirs["state"].items():
        for key, value in values.items():
            got = ours["state"][number][key]
            assert torch.equal(got, value) and got.dtype == value.dtype if torch.is_tensor(value) else got == value


@pytest.mark.parametrize("name", CASES)
def test_exactly_what_should_train_does(name: str) -> None:
    spec, dtype = CASES[name]
    run = train(spec, 2, dtype=dtype)
    want = {BAdamRatio: INSIDE}.get(type(spec), ALL)
    if isinstance(spec, BAdam):
        assert len({part.split(".")[1] for part in changed(run, dtype)}) == 1
        want = of_block(int(min(changed(run, dtype)).split(".")[1]))
    assert changed(run, dtype) == want
    assert all(parameter.requires_grad for parameter in run.model.parameters())


@pytest.mark.parametrize("name", CASES)
def test_biases_and_norms_are_never_decayed_and_matrices_are(name: str) -> None:
    spec, dtype = CASES[name]
    optimizer = build(dataclasses.replace(spec, weight_decay=0.25), toy(dtype))
    assert isinstance(optimizer, LayerwiseOptimizer) == spec.is_layerwise
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    by_ndim = {(each.ndim, decays[id(each)]) for group in optimizer.param_groups for each in group["params"]}
    assert by_ndim == {(1, 0.0), (2, 0.25)}


# ---------------------------------------------------------------------- options

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "AdamW": [{"fused": True}],
    "AdamW stochastic": [{"weights": "kahan"}],
    "AdamW8bit": [{"min_8bit_size": 4096}],
    "Adafactor": [
        {"beta1": 0.9},
        {"decay_rate": -0.3},
        {"eps": (1e-2, 1e-3)},
        {"clip_threshold": 0.1},
        {"scale_parameter": True},
    ],
    "Muon": [
        {"adamw_lr": 1e-3},
        {"momentum": 0.5},
        {"nesterov": False},
        {"num_iterations": 2},
        {"adjust_lr": "original"},
    ],
    "GaLore": [
        {"rank": 2},
        {"interval": 2},
        {"scale": 1.0},
        {"projection": "reverse_std"},
        {"projection": "left"},
        {"projection": "right"},
        {"projection": "full"},
        {"target": ["up_proj"]},
        {"base": "adafactor"},
    ],
    "APOLLO": [
        {"rank": 2},
        {"interval": 2},
        {"scale": 1.0},
        {"scale_type": "tensor"},
        {"projection": "svd"},
        {"projection_side": "left"},
        {"projection_side": "right"},
        {"target": ["1.q_proj"]},
    ],
    "BAdam": [
        {"switch_interval": 3},
        {"switch_mode": "descending"},
        {"switch_mode": "random"},
        {"switch_mode": "fixed"},
        {"start_block": 1},
    ],
    "BAdamRatio": [{"update_ratio": 0.5}, {"mask_mode": "scatter"}, {"switch_interval": 2}],
}
OF_ADAM: list[dict[str, Any]] = [{"lr": 3e-3}, {"betas": (0.5, 0.999)}, {"betas": (0.9, 0.9)}, {"eps": 1e-2}]
OF_ALL: list[dict[str, Any]] = [{"weight_decay": 0.5}]
CHANGES = [
    (name, change)
    for name in (
        "AdamW",
        "AdamW stochastic",
        "AdamW8bit",
        "Adafactor",
        "Muon",
        "GaLore",
        "APOLLO",
        "BAdam",
        "BAdamRatio",
    )
    for change in [*OPTIONS[name], *(OF_ADAM if name != "Adafactor" else [{"lr": 3e-3}]), *OF_ALL]
] + [("AdamMini", change) for change in [*OF_ADAM, *OF_ALL]]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=lambda value: str(value))
def test_every_option_changes_the_result(name: str, change: dict[str, Any]) -> None:
    spec, dtype = CASES[name]
    plain, other = train(spec, 5, dtype=dtype), train(dataclasses.replace(spec, **change), 5, dtype=dtype)
    assert not same(plain.weights(), other.weights())


def test_no_option_was_forgotten() -> None:
    tested = {"LoRAPlus", "PagedAdamW"}  # below
    for kind in OptimizerSpec.__subclasses__():
        if kind.__name__ in tested or not kind.__module__.startswith("lf_lightning."):
            continue
        changes = {key for name, change in CHANGES if type(CASES[name][0]) is kind for key in change}
        elsewhere = {"layerwise", "paged", "scale_front", "weights"}  # in this file too
        assert {field.name for field in dataclasses.fields(kind)} - changes <= elsewhere


@pytest.mark.parametrize("name", ["AdamW layerwise", "Adafactor layerwise with a mean", "GaLore layerwise"])
def test_layerwise_is_the_same_mathematics(name: str) -> None:
    spec, dtype = CASES[name]
    layered, whole = train(spec, 8, dtype=dtype), train(dataclasses.replace(spec, layerwise=False), 8, dtype=dtype)
    assert layered.losses == pytest.approx(whole.losses, rel=1e-6)
    first, second = layered.weights(), whole.weights()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [APOLLO(1e-2, **LOW), AdamW(1e-2, weights="stochastic")], ids=["APOLLO", "stochastic"])
def test_what_is_drawn_is_a_function_of_the_seed_layerwise_too(spec: Any) -> None:
    dtype = HALF if isinstance(spec, AdamW) else torch.float32
    first = train(spec, 4, dtype=dtype, seed=5)
    torch.manual_seed(99)
    assert same(first.weights(), train(spec, 4, dtype=dtype, seed=5).weights())
    assert not same(first.weights(), train(spec, 4, dtype=dtype, seed=6).weights())
    layered = train(dataclasses.replace(spec, layerwise=True), 4, dtype=dtype, seed=5)
    assert layered.losses == pytest.approx(first.losses, rel=1e-5)


def test_a_layerwise_optimizer_lets_gradients_go_knows_their_norm_and_takes_one_micro_batch() -> None:
    model, plain = toy(), toy()
    optimizer = build(AdamW(1e-2, layerwise=True), model)
    assert isinstance(optimizer, LayerwiseOptimizer)
    model.loss().backward()
    plain.loss().backward()
    norm = torch.linalg.vector_norm(torch.cat([each.grad.flatten() for each in plain.parameters()]))
    assert optimizer.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(InputError, match=r"data\.micro_batch_size: must make one micro-batch of a step"):
        model.loss().backward()
    optimizer.step()
    assert optimizer.grad_norm == 0.0
    model.loss().backward()


def test_a_layerwise_optimizer_leaves_a_parameter_whose_gradient_is_not_finite() -> None:
    model = toy()
    optimizer = build(AdamW(1e-2, layerwise=True), model)
    before = model.lm_head.weight.clone()
    handle = model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    model.loss().backward()
    handle.remove()
    assert torch.equal(model.lm_head.weight, before)
    assert optimizer.grad_norm != optimizer.grad_norm or optimizer.grad_norm == float("inf")


def test_a_step_without_gradients_changes_neither_weights_nor_moments() -> None:
    for name, (spec, dtype) in CASES.items():
        if name in ("BAdam", "BAdam random", "BAdamRatio", "BAdamRatio scatter"):
            continue  # these count steps
        run = train(spec, 2, dtype=dtype)
        weights, state = run.weights(), str(run.optimizer.state_dict())
        run.optimizer.step()
        assert same(weights, run.weights()), name
        assert str(run.optimizer.state_dict()) == state, name


def test_a_schedule_reaches_every_part() -> None:
    for name, (spec, dtype) in CASES.items():
        if "fused" in name:
            continue
        model = toy(dtype)
        optimizer = build(spec, model)
        lf_lightning.ScheduleSpec(kind="linear", warmup_steps=3).build(optimizer, 9)
        run = train(spec, 1, dtype=dtype, model=model, optimizer=lambda _, made=optimizer: made)
        assert changed(run, dtype) == set(), f"{name}: the first step of a warm-up has the rate zero"


# ---------------------------------------------------------------------- each on its own


def test_every_option_of_adamw_reaches_the_optimizer() -> None:
    optimizer = build(AdamW(lr=0.3, betas=(0.5, 0.6), eps=0.7, weight_decay=0.8), toy())
    options = group_options(optimizer)
    assert [(each["lr"], each["betas"], each["eps"], each["weight_decay"]) for each in options] == [
        (0.3, (0.5, 0.6), 0.7, 0.8),
        (0.3, (0.5, 0.6), 0.7, 0.0),
    ]
    assert not options[0]["fused"]
    assert group_options(build(AdamW(fused=True), toy()))[0]["fused"]


def test_kahan_and_stochastic_rounding_follow_float32_where_plain_bfloat16_stands_still() -> None:
    lr, steps = 1e-5, 30

    def moved(run: Any) -> torch.Tensor:
        start = dict(toy(HALF).named_parameters())
        lost = {each: run.optimizer.state[each].get("lost", 0) for each in run.model.parameters()}
        parts = [(each.float() + lost[each] - start[name].float()) for name, each in run.model.named_parameters()]
        return torch.cat([part.detach().flatten() for part in parts])

    model = toy(HALF).float()  # the same numbers
    exact = moved(train(AdamW(lr), steps, model=model))
    plain = moved(train(AdamW(lr), steps, dtype=HALF, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=lr)))
    found = {name: moved(train(AdamW(lr, weights=name), steps, dtype=HALF)) for name in ("kahan", "stochastic")}
    assert float((plain != 0).float().mean()) < 0.2
    assert float((found["kahan"] - exact).norm() / exact.norm()) < 0.1
    assert float((found["stochastic"].sum() - exact.sum()).abs()) < 0.3 * float(exact.abs().sum())
    along = float(found["stochastic"] @ exact / exact.norm() ** 2)
    assert along == pytest.approx(1.0, abs=0.35), "its mean is the exact step"


def test_weights_that_are_to_stay_bfloat16_must_be() -> None:
    with pytest.raises(InputError, match=r"weights: kahan is for bfloat16 weights that train, got none"):
        build(AdamW(weights="kahan"), toy())


def test_moments_are_quantized_but_those_of_embeddings() -> None:
    run = train(AdamW8bit(1e-2, min_8bit_size=64), 1)
    kinds = {name: run.optimizer.state[each] for name, each in run.model.named_parameters()}
    assert kinds["layers.0.up_proj.weight"]["state1"].dtype == torch.uint8
    assert kinds["norm.weight"]["state1"].dtype == torch.float32
    assert kinds["embed.weight"]["exp_avg"].dtype == torch.float32


def test_paged_moments_are_asked_for() -> None:
    assert build(PagedAdamW(1e-2), toy()).is_paged
    assert build(AdamW8bit(1e-2, paged=True), nn.ModuleDict({"layers": nn.ModuleList(), "lm_head": nn.Linear(2, 2)}))
    options = group_options(build(PagedAdamW(0.3, (0.5, 0.6), 0.7, 0.8), toy()))
    assert [(each["lr"], tuple(each["betas"]), each["eps"], each["weight_decay"]) for each in options] == [
        (0.3, (0.5, 0.6), 0.7, 0.8),
        (0.3, (0.5, 0.6), 0.7, 0.0),
    ]


def test_muon_takes_the_linear_layers_inside_and_adamw_the_rest() -> None:
    optimizer = build(Muon(), toy())
    shapes = [{tuple(each.shape) for each in group["params"]} for group in optimizer.param_groups]
    assert shapes == [
        {(2 * HEAD, WIDTH), (2 * WIDTH, WIDTH), (WIDTH, 2 * WIDTH)},
        {(WORDS, WIDTH)},
        {(WIDTH,), (2 * HEAD,)},
    ]
    assert len(optimizer.param_groups[0]["params"]) == 3 * NUM_BLOCKS


def test_what_galore_and_apollo_remember_is_of_low_rank() -> None:
    for spec in (GaLore(1e-2, rank=3), APOLLO(1e-2, rank=3)):
        run = train(spec, 1)
        state = {name: run.optimizer.state[each] for name, each in run.model.named_parameters()}
        tall, wide = state["layers.0.up_proj.weight"], state["layers.0.down_proj.weight"]
        assert tall["exp_avg"].shape == (2 * WIDTH, 3)
        assert tall["right"].shape == (3, WIDTH)
        assert wide["exp_avg"].shape == (3, 2 * WIDTH)
        assert wide["left"].shape == (WIDTH, 3)
        assert state["embed.weight"]["exp_avg"].shape == (WORDS, WIDTH)


@pytest.mark.parametrize("kind", [GaLore, APOLLO])
def test_a_target_that_fits_no_linear_layer_is_refused(kind: Any) -> None:
    with pytest.raises(
        InputError, match=r"must name linear layers that train, got roj. Choose among down_proj, q_proj"
    ):
        build(kind(target=["roj"]), toy())
    with pytest.raises(InputError, match="got lm_head"):
        build(kind(target="lm_head"), toy())


def test_an_update_of_apollo_grows_by_a_hundredth_at_most() -> None:
    state: dict[str, Any] = {}
    first = _limited(torch.tensor([3.0, 4.0]), state)
    second = _limited(torch.tensor([60.0, 80.0]), state)
    third = _limited(torch.tensor([0.0, 1.0]), state)
    assert [float(each.norm()) for each in (first, second, third)] == pytest.approx([5.0, 5.05, 1.0])
    assert float(state["norm"]) == pytest.approx(1.0)


def test_where_apollo_applies_its_factor_matters_to_the_limit_alone() -> None:
    front, back = (train(APOLLO(1e-2, rank=3, scale_front=each), 1) for each in (True, False))
    for one, other in zip(front.model.parameters(), back.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    norms = [
        float(run.optimizer.state[dict(run.model.named_parameters())["layers.0.up_proj.weight"]]["norm"])
        for run in (front, back)
    ]
    assert norms[0] == pytest.approx(norms[1] * 32**0.5)


def test_blocks_take_turns_in_the_order_asked_for() -> None:
    orders = {}
    for mode in ("ascending", "descending", "fixed", "random"):
        optimizer = build(BAdam(1e-2, switch_mode=mode), toy())
        orders[mode] = [optimizer.block_after(switch) for switch in range(6)]
    assert orders["ascending"] == [0, 1, 2, 0, 1, 2]
    assert orders["descending"] == [2, 1, 0, 2, 1, 0]
    assert orders["fixed"] == [0] * 6
    assert sorted(orders["random"][:3]) == sorted(orders["random"][3:]) == [0, 1, 2]
    starting = build(BAdam(1e-2, switch_mode="descending", start_block=1), toy())
    assert [starting.block_after(switch) for switch in range(3)] == [1, 0, 2]


def test_a_block_that_waits_has_no_moments_and_gets_no_gradient() -> None:
    run = train(BAdam(1e-2, switch_interval=2), 3)  # the third step is the first of block 1
    held = {name for name, each in run.model.named_parameters() if "exp_avg" in run.optimizer.state.get(each, {})}
    assert held == of_block(1)
    assert {run.optimizer.state[each]["step"] for name, each in run.model.named_parameters() if name in held} == {1}
    with run.optimizer.only_active():
        run.model.loss().backward()
    got = {name for name, each in run.model.named_parameters() if each.grad is not None}
    assert got == of_block(1)


def test_a_bfloat16_block_trains_through_a_float32_copy() -> None:
    run = train(BAdam(1e-5, switch_interval=9), 8, dtype=HALF)
    masters = {name: run.optimizer.state[each].get("master") for name, each in run.model.named_parameters()}
    start = dict(toy(HALF).named_parameters())
    for name in of_block(0):
        assert masters[name].dtype == torch.float32
        assert float((masters[name] - start[name].detach().float()).abs().max()) == pytest.approx(8e-5, rel=0.3)
    assert all(masters[name] is None for name in ALL - of_block(0))


def test_the_share_that_trains_moves_on() -> None:
    spec = BAdamRatio(1e-2, update_ratio=0.25, switch_interval=2)
    name, size = "layers.0.up_proj.weight", 2 * WIDTH * WIDTH
    moved = []
    for steps in (2, 4):
        weight = dict(train(spec, steps).model.named_parameters())[name]
        different = (weight != dict(toy().named_parameters())[name]).flatten()
        moved.append(different.nonzero().flatten().tolist())
    assert moved == [list(range(size // 4)), list(range(size // 2))]


def test_adam_mini_has_one_second_moment_for_each_head_row_and_norm() -> None:
    run = train(AdamMini(1e-2), 1)
    sizes = {name: run.optimizer.state[each]["exp_avg_sq"].numel() for name, each in run.model.named_parameters()}
    assert sizes["layers.0.q_proj.weight"] == 2, "heads"
    assert sizes["layers.0.q_proj.bias"] == 2 * HEAD, "entries"
    assert sizes["layers.0.up_proj.weight"] == 2 * WIDTH, "rows"
    assert sizes["embed.weight"] == WORDS, "words"
    assert sizes["norm.weight"] == 1


class Adapted(nn.Module):
    """A layer with a LoRA as peft names its parts, on a layer and on an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(4, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=True)})
        self.lora_magnitude_vector = nn.ParameterDict({"default": nn.Parameter(torch.ones(4))})
        self.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.ones(2, 5))})
        self.lora_embedding_B = nn.ParameterDict({"default": nn.Parameter(torch.ones(4, 2))})
        self.modules_to_save = nn.ModuleDict({"default": nn.Embedding(5, 4)})


def rates_of(spec: LoRAPlus) -> dict[str, tuple[float, float]]:
    model = Adapted()
    optimizer = spec.build(describe(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_lora_plus_gives_the_matrices_b_a_rate_of_their_own() -> None:
    assert rates_of(LoRAPlus(lr=1.0, ratio=16.0, embedding_lr=0.125, weight_decay=0.5)) == {
        "lora_A.default.weight": (1.0, 0.5),
        "lora_B.default.weight": (16.0, 0.5),
        "lora_B.default.bias": (1.0, 0.0),
        "lora_magnitude_vector.default": (1.0, 0.0),
        "lora_embedding_A.default": (0.125, 0.5),
        "lora_embedding_B.default": (0.125, 0.5),
        "modules_to_save.default.weight": (0.125, 0.5),
    }
    first = group_options(LoRAPlus(1.0, 2.0, 1.0, (0.5, 0.6), 0.7, 0.8, fused=True).build(describe(Adapted())))[0]
    assert (first["lr"], first["betas"], first["eps"], first["weight_decay"], first["fused"]) == (
        1.0,
        (0.5, 0.6),
        0.7,
        0.8,
        True,
    )


def test_lora_plus_without_a_lora_is_refused() -> None:
    with pytest.raises(InputError, match="LoRAPlus needs a LoRA, got a tuning without one"):
        build(LoRAPlus(), toy())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamW(lr=0.0), r"lr: must be positive, got 0\.0"),
        (lambda: AdamW(lr=float("nan")), r"lr: must be positive, got nan"),
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas: must be two numbers in \[0, 1\)"),
        (lambda: AdamW(eps=0.0), "eps: must be positive"),
        (lambda: AdamW(weight_decay=-1.0), "weight_decay: must be 0 or more"),
        (lambda: AdamW(fused=True, weights="kahan"), "fused: must be false with weights: kahan"),
        (lambda: LoRAPlus(ratio=0.0), "ratio: must be positive"),
        (lambda: LoRAPlus(embedding_lr=0.0), "embedding_lr: must be positive"),
        (lambda: AdamW8bit(min_8bit_size=0), "min_8bit_size: must be positive"),
        (lambda: Adafactor(beta1=1.0), r"beta1: must be in \[0, 1\) or null"),
        (lambda: Adafactor(decay_rate=0.1), "decay_rate: must be negative"),
        (lambda: Adafactor(eps=(0.0, 1.0)), "eps: must be two positive numbers"),
        (lambda: Adafactor(clip_threshold=0.0), "clip_threshold: must be positive"),
        (lambda: Muon(momentum=1.0), r"momentum: must be in \[0, 1\)"),
        (lambda: Muon(num_iterations=100), "num_iterations: must be 1 to 99"),
        (lambda: Muon(adamw_lr=0.0), "adamw_lr: must be positive or null"),
        (lambda: GaLore(rank=0), "rank: must be positive"),
        (lambda: GaLore(interval=0), "interval: must be positive"),
        (lambda: GaLore(scale=0.0), "scale: must be positive"),
        (lambda: GaLore(target=[]), "target: must be all or names of linear layers"),
        (lambda: GaLore(base="adafactor", eps=1e-6), "eps: must be left out with base: adafactor"),
        (lambda: APOLLO(rank=0), "rank: must be positive"),
        (lambda: BAdam(switch_interval=0), "switch_interval: must be positive"),
        (lambda: BAdam(switch_mode="random", start_block=1), "start_block: must be null or 0 and more, and null with"),
        (lambda: build(BAdam(start_block=3), toy()), r"start_block: must be 0 to 2 for this model, got 3"),
        (lambda: BAdam().build(describe(nn.Linear(2, 2))), "BAdam trains decoder blocks, got none that train"),
        (lambda: BAdamRatio(update_ratio=0.0), r"update_ratio: must be in \(0, 1\]"),
        (lambda: BAdamRatio().build(describe(nn.Embedding(2, 2))), "BAdamRatio trains no embeddings"),
        (lambda: Muon().build(describe(nn.Embedding(2, 2))), "Muon trains linear layers, got none that train"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"model\.init_args\.optimizer\.(init_args|class_path).*{message}|{message}"):
        make()


def test_a_package_that_is_not_there_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lf_lightning.optim.spec.find_spec", lambda name: None)
    for make in (AdamW8bit, PagedAdamW, lambda: GaLore(base="adamw_8bit")):
        with pytest.raises(InputError, match=r"needs the package bitsandbytes, got none\. Run: pip install bits"):
            make()


def test_a_state_of_another_number_of_groups_is_refused() -> None:
    run = train(Muon(1e-2), 1, save_at=0)
    saved = {**run.saved["optimizer"], "param_groups": run.saved["optimizer"]["param_groups"][:2]}
    with pytest.raises(InputError, match="must make 2 groups of parameters as the checkpoint does, got 3"):
        run.optimizer.load_state_dict(saved)
