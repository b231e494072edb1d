"""Models that each rank reads its rows of: never whole, the same numbers, and checkpoints that anyone continues.

Both ranks run parts_run.py once; every test reads what they saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lf_lightning.models.export import load_weights
from lf_lightning.models.tensor_files import tensor_files
from lf_lightning.optim.state_files import whole_states
from lf_lightning.types import InputError
from tests.models import parts_run
from tests.models.parts_run import CASES, WORDS
from tests.models.sharding_run import LLAMA
from tests.models.test_sharding import run_on_two_ranks
from tests.ranks import made_once

Seen = dict[str, list[dict[str, Any]]]
BASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "half": {"dtype": "bfloat16"},
    "experts": {"model_type": "mixtral", "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 3},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        for name, changes in BASES.items():
            values = {**LLAMA, "vocab_size": WORDS, "intermediate_size": 28, **changes}
            dtype = getattr(torch, values.pop("dtype", "float32"))  # by name, as a config has it
            torch.manual_seed(1)
            config = AutoConfig.for_model(values.pop("model_type"), **values)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            model.save_pretrained(folder / name, max_shard_size="8KB")
        run_on_two_ranks(parts_run.run, folder, {"HF_DEACTIVATE_ASYNC_LOAD": "1"})  # other threads are not seen

    return made_once(tmp_path_factory, "parts", make)


@pytest.fixture(scope="session")
def seen(folder: Path) -> Seen:
    return {name: [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in (0, 1)] for name in CASES}


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference of an entry, relative to the largest of its tensor."""
    assert got.keys() == want.keys()
    differences = [(got[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1e-3) for name in want]
    return float(max(differences))


@pytest.mark.parametrize("name", CASES)
def test_a_model_read_in_parts_has_the_weights_buffers_and_adapters_of_one_read_whole(seen: Seen, name: str):
    for found in seen[name]:
        assert {key: each.dtype for key, each in found["cut"].items()} == {
            key: each.dtype for key, each in found["plain"].items()
        }
        assert furthest(found["cut"], found["plain"]) == 0
        plain, cut = found["buffers"]
        assert plain.keys() == cut.keys()
        assert all(torch.equal(cut[key], plain[key]) for key in plain)


@pytest.mark.parametrize("name", CASES)
def test_no_rank_holds_more_than_its_part_while_a_model_is_read(seen: Seen, name: str):
    for found in seen[name]:
        assert found["whole"] == []
        share = 2 / 3 if name == "experts" else 0.52  # two of three experts on one rank
        largest = max(each.nbytes for each in found["plain"].values())
        assert found["local"] < share * found["bytes"]
        assert found["storages"][0] <= 1.01 * share * largest, "no large tensor is ever whole"
        added = sum(each.nbytes for key, each in found["plain"].items() if "lora_" in key or "value_head" in key)
        times = 2.4 if name == "experts" else 1.3  # experts lie one by one in the files, and are stacked
        assert sum(found["storages"]) < times * share * (found["bytes"] - added) + 5 * added, "adapters are drawn whole"


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_a_model_that_is_not_cut(seen: Seen, name: str):
    tolerance = 2e-2 if "half" in CASES[name]["base"] else 1e-4
    for found in seen[name]:
        assert furthest(found["plain after"], found["plain"]) > 1e-3
        assert furthest(found["cut after"], found["plain after"]) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_weights_and_optimizer_come_back_bit_by_bit(seen: Seen, name: str):
    for found in seen[name]:
        assert furthest(found["loaded"], found["cut after"]) == 0
        assert furthest(found["third again"], found["third"]) == 0
        assert furthest(found["third"], found["cut after"]) > 1e-4


@pytest.mark.parametrize("name", ["full", "tied", "lora", "head"])
def test_an_optimizer_of_whole_parameters_is_continued_in_parts(seen: Seen, name: str):
    for found in seen[name]:
        assert furthest(found["third from whole"], found["third"]) < 1e-4


@pytest.mark.parametrize("name", ["full", "tied", "lora", "head-lora", "experts"])
def test_one_process_reads_weights_and_optimizer_that_two_ranks_wrote(seen: Seen, folder: Path, name: str):
    one = parts_run.load(CASES[name], folder, None)
    load_weights(one, folder / name)
    assert furthest(parts_run.values(one), seen[name][0]["cut after"]) == 0
    state = folder / name / "trainer_state"
    (got,) = whole_states(torch.load(state / "state.ckpt"), state)
    want = seen[name][0]["plain state"]
    assert got["state"].keys() == want["state"].keys()
    for number, values in want["state"].items():
        assert got["state"][number].keys() == values.keys()
        assert furthest(got["state"][number], values) < 1e-3, number
    parts_run.adamw(one).load_state_dict(got)


def test_a_tied_tensor_is_written_once_and_files_are_named_as_transformers_names_them(seen: Seen, folder: Path):
    assert "model.embed_tokens.weight" in tensor_files(folder / "tied")
    assert "lm_head.weight" not in tensor_files(folder / "tied")
    assert (folder / "tied" / "model.safetensors").is_file()
    assert sorted(path.name for path in (folder / "lora").iterdir() if path.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert all("lora_" in name for name in tensor_files(folder / "lora"))
    AutoModelForCausalLM.from_pretrained(folder / "experts")


def test_each_rank_writes_its_part_of_the_optimizer(seen: Seen, folder: Path):
    files = sorted((folder / "full" / "trainer_state").glob("optimizer-*"))
    assert [path.name for path in files] == [f"optimizer-0000{n}-of-00002.safetensors" for n in (1, 2)]
    sizes = [path.stat().st_size for path in files]
    assert max(sizes) < 1.3 * min(sizes)


def test_a_missing_part_of_the_optimizer_is_named(seen: Seen, folder: Path, tmp_path: Path):
    state = torch.load(folder / "full" / "trainer_state" / "state.ckpt")
    with pytest.raises(InputError, match=r"optimizer-00001-of-00002\.safetensors: must hold 0\.0\.exp_avg"):
        whole_states(state, tmp_path)


def test_a_parameter_that_came_after_the_model_was_cut_is_refused(seen: Seen):
    for found in seen["lora"]:
        assert "fsdp2 must cut every parameter that trains, got late.weight whole" in found["late"]
