"""Generation with weights that are cut over two ranks: as if they were not, and training goes on as if it had not been.

Both ranks run sharding_run.py once; every test reads what they saw.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lf_lightning import BackboneSpec
from lf_lightning.models import Full, load_backbone
from lf_lightning.models.sharding import whole
from tests.models import sharding_run
from tests.models.sharding_run import CASES, LIMITS, LLAMA, PROMPTS, WORDS, answers
from tests.ranks import fork_ranks, made_once

ANSWERS, STEPS = (0, 2), (1, 3)
"""Where `seen` keeps answers and steps, of the model that is cut and of the one that is not."""
EXACT = [name for name in CASES if name != "half"]
Seen = dict[str, list[dict[str, Any]]]


def run_on_two_ranks(run: Callable[[Path, int], None], folder: Path, more: dict[str, str] | None = None) -> None:
    """Call a function with the folder and the rank on each of two ranks."""

    def on_a_rank() -> None:
        os.environ.update(more or {})
        run(folder, int(os.environ["RANK"]))

    fork_ranks(on_a_rank, 2, folder)


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Case -> what each of two ranks saw."""

    def make(folder: Path) -> None:
        spec = BackboneSpec(architecture=LLAMA, tokenizer="bytes", dtype="float64")
        load_backbone(spec, Full(), vocab_size=WORDS, seed=3).causal_lm.save_pretrained(folder / "base")
        run_on_two_ranks(sharding_run.run, folder)

    folder = made_once(tmp_path_factory, "sharding", make)
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)] for name in CASES}


def largest_difference(got: dict[str, Any], want: dict[str, Any], kind: str) -> float:
    """Of any gradient of a step, relative to the largest entry of its tensor where that is above 1."""
    assert got[kind].keys() == want[kind].keys()
    pairs = [(got[kind][name], want[kind][name]) for name in want[kind]]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_a_model_that_is_not_cut_before_any_step_and_after_one(seen: Seen, name: str):
    for rank, found in enumerate(seen[name]):
        for when in ANSWERS:
            assert found["sharded"][when] == found["plain"][when]
            assert [len(call) for call in found["sharded"][when]] == [len(PROMPTS)] * len(LIMITS[rank])


def test_a_step_shows_in_the_answers_after_it(seen: Seen):
    for ranks in seen.values():
        assert ranks[1]["sharded"][0] != ranks[1]["sharded"][2]


def test_ranks_drew_other_numbers_of_tokens_without_waiting_for_each_other(seen: Seen):
    for ranks in seen.values():
        first, second = ([max(map(len, call)) for call in found["sharded"][0]] for found in ranks)
        assert first == list(LIMITS[0])
        assert sum(second) > 2 * sum(first)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kind", ["raw", "clipped"])
def test_steps_after_generation_have_the_gradients_of_steps_without_it_and_of_a_model_that_is_not_cut(
    seen: Seen, name: str, kind: str
):
    for found in seen[name]:
        for index, when in enumerate(STEPS):
            got = found["sharded"][when]
            for want in (found["plain"][when], found["silent"][index]):
                assert got["norm"] == pytest.approx(want["norm"], rel=1e-6)
                assert largest_difference(got, want, kind) < 1e-6
        norm = torch.stack([grad.square().sum() for grad in found["sharded"][1]["clipped"].values()]).sum().sqrt()
        assert found["sharded"][1]["norm"] > 0.5
        assert float(norm) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", EXACT)
def test_every_trained_weight_gets_a_gradient(seen: Seen, name: str):
    for found in seen[name]:
        step = found["sharded"][1]
        assert sorted(step["raw"]) == step["names"]
        assert all(grad.any() for grad in step["raw"].values())


def test_a_value_head_trains_beside_the_output_layer_where_weights_are_cut(seen: Seen):
    head = {"value_head.summary.weight", "value_head.summary.bias"}
    assert head | {"model.lm_head.weight"} <= set(seen["head"][0]["sharded"][1]["raw"])
    adapted = set(seen["head-lora"][0]["sharded"][1]["raw"])
    assert {each for each in adapted if "lora_" not in each} == head


@pytest.mark.parametrize("name", CASES)
def test_weights_are_whole_inside_and_cut_again_afterwards_also_after_an_error(seen: Seen, name: str):
    both = seen[name]
    for found in both:
        assert set(found["inside"].values()) == {None}
        assert found["error"] == "broken"
        assert found["before"] == found["after"] == found["after_error"]
        body = [share for key, share in found["after"].items() if not key.startswith("value_head")]
        assert len(body) >= 28
        assert set(body) == {0.5}
    for key in both[0]["after"]:
        assert both[0]["after"][key] + both[1]["after"][key] == 1.0


@pytest.mark.parametrize("name", CASES)
def test_between_forward_and_backward_blocks_are_cut_as_if_nothing_had_been_generated(seen: Seen, name: str):
    for found in seen[name]:
        assert found["shares"] == found["silent_shares"]
        assert {share for key, share in found["shares"].items() if ".layers." in key} == {0.5}
        assert {share for key, share in found["shares"].items() if "embed_tokens" in key} == {None}


def test_the_mode_of_the_model_is_put_back(seen: Seen):
    assert all(found["training"] for ranks in seen.values() for found in ranks)


def test_a_model_that_is_not_cut_is_left_alone():
    spec = BackboneSpec(architecture=LLAMA, tokenizer="bytes", dtype="float64")
    backbone = load_backbone(spec, Full(), vocab_size=WORDS, seed=3)
    before = answers(backbone, (3,))
    runs = []
    backbone.register_forward_hook(lambda *_: runs.append(1))
    with whole(backbone):
        pass
    assert not runs, "nothing is run to gather what is whole"
    assert answers(backbone, (3,)) == before
