"""Two runs that are the same are found equal, and any bit that differs is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lf_lightning.callbacks.folder import sync_folder
from lf_lightning.commands.run_compare import compare_checkpoints, compare_runs, torn

LOG = [
    {"current_steps": 1, "loss": 2.5, "elapsed_time": "0:00:01"},
    {"current_steps": 2, "loss": 2.25, "throughput": 9.0},
]


def state() -> dict[str, Any]:
    moments = {"step": torch.tensor(2.0), "exp_avg": torch.tensor([0.5, -0.25])}
    return {
        "global_step": 2,
        "optimizer_states": [{"state": {0: moments}, "param_groups": [{"lr": 1e-3}]}],
        "DataModule": {"epoch": 0, "consumed_units": 8},
        "callbacks": {"Timer": {"time_elapsed": {"train": 1.5}}},
        "loops": {"fit_loop": {"epoch_loop.val_loop.batch_progress": {"ready": 3}}},
    }


def make_run(folder: Path) -> Path:
    """A finished run of two steps with a checkpoint at the second."""
    for part in ("final", "checkpoints/step-00000002"):
        (folder / part).mkdir(parents=True)
        tensors = {"layer.weight": torch.tensor([[1.0, -0.0], [3.0, float("nan")]]), "layer.bias": torch.zeros(2)}
        save_file(tensors, folder / part / "model.safetensors")
    checkpoint = folder / "checkpoints/step-00000002"
    (checkpoint / "trainer_state").mkdir()
    torch.save(state(), checkpoint / "trainer_state" / "state.ckpt")
    sync_folder(checkpoint)
    (folder / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    (folder / "samples.jsonl").write_text('{"current_steps": 2, "response": "yes\\u2028no"}\n')
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_run(tmp_path / "straight"), make_run(tmp_path / "resumed")


def differences(pair: tuple[Path, Path]) -> list[str]:
    return [f"{each.part}: {each.difference}" for each in compare_runs(*pair) if each.difference]


def test_equal_runs_are_equal_with_nan_and_all(pair: tuple[Path, Path]):
    found = compare_runs(*pair)
    assert [(each.part, each.num_values) for each in found] == [
        ("final weights", 2),
        ("last state", 7),  # with the step of the folder; without the clock and the count of validation batches
        ("log", 4),
        ("samples", 2),
    ]
    assert [each.difference for each in found] == [None] * 4
    again = compare_runs(pair[1], pair[0])
    assert [each.digest for each in found] == [each.digest for each in again]


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        (torch.tensor([[1.0, 0.0], [3.0, float("nan")]]), "float32[2, 2]"),  # 0.0 for -0.0
        (torch.tensor([[1.0, -0.0], [3.0000002, float("nan")]]), "float32[2, 2]"),  # one bit
        (torch.tensor([1.0, -0.0, 3.0, float("nan")]), "float32[4]"),
        (torch.tensor([[1.0, -0.0], [3.0, float("nan")]], dtype=torch.float64), "float64[2, 2]"),
    ],
)
def test_a_tensor_that_differs_in_a_bit_a_shape_or_a_type_is_named(
    changed: torch.Tensor, shown: str, pair: tuple[Path, Path]
):
    tensors = {"layer.weight": changed, "layer.bias": torch.zeros(2)}
    save_file(tensors, pair[1] / "final" / "model.safetensors")
    (found,) = differences(pair)
    assert found.startswith("final weights: model.safetensors: layer.weight: float32[2, 2] ")
    assert f"straight, {shown} " in found


def test_a_tensor_that_is_missing_is_named(pair: tuple[Path, Path]):
    save_file({"layer.weight": torch.zeros(2)}, pair[1] / "final" / "model.safetensors")
    assert "model.safetensors: layer.bias: float32[2] " in differences((pair[0], pair[1]))[0]
    assert differences(pair)[0].endswith("straight, absent resumed")


def spoil(change: Callable[[dict[str, Any]], None], run: Path) -> None:
    content = state()
    change(content)
    torch.save(content, run / "checkpoints/step-00000002/trainer_state/state.ckpt")


def moment(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["state"][0]["exp_avg"][1] += 1e-7


def cursor(content: dict[str, Any]) -> None:
    content["DataModule"]["consumed_units"] = 12


def rate(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["param_groups"][0]["lr"] = 1e-3 + 1e-18


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (moment, "optimizer_states[0].state.0.exp_avg: float32[2]"),
        (cursor, "DataModule.consumed_units: 8 straight, 12 resumed"),
        (rate, "optimizer_states[0].param_groups[0].lr: 0.001 straight, 0.001000000000000001 resumed"),
    ],
)
def test_what_a_resume_would_continue_from_is_compared_value_by_value(
    change: Callable[[dict[str, Any]], None], named: str, pair: tuple[Path, Path]
):
    spoil(change, pair[1])
    (found,) = differences(pair)
    assert found.startswith(f"last state: {named}")
    of_checkpoints = compare_checkpoints(*(run / "checkpoints/step-00000002" for run in pair))
    assert [each.part for each in of_checkpoints if each.difference] == ["state"]


def clocks(content: dict[str, Any]) -> None:
    content["callbacks"]["Timer"]["time_elapsed"]["train"] = 99.0
    content["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["ready"] = 6


def test_clocks_are_not_compared(pair: tuple[Path, Path]):
    spoil(clocks, pair[1])
    rows = [{**row, "elapsed_time": "9:00:00", "throughput": 1.0, "remaining_time": "0"} for row in LOG]
    (pair[1] / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert differences(pair) == []


def test_a_logged_value_that_differs_is_named_by_its_line_and_step(pair: tuple[Path, Path]):
    rows = [LOG[0], {**LOG[1], "loss": 2.2500000000000004}]
    (pair[1] / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = "trainer_log.jsonl, line 2, step 2.loss"
    assert differences(pair) == [f"log: {place}: 2.25 straight, 2.2500000000000004 resumed"]


@pytest.mark.parametrize(("rows", "line"), [(LOG[:1], 2), ([*LOG, LOG[1]], 3)])
def test_a_line_too_few_or_too_many_is_a_difference(rows: list[Any], line: int, pair: tuple[Path, Path]):
    (pair[1] / "trainer_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = differences(pair)
    assert found.startswith(f"log: trainer_log.jsonl, line {line}, step 2.current_steps: ")


def test_runs_without_weights_are_not_called_equal(pair: tuple[Path, Path]):
    for run in pair:
        (run / "final" / "model.safetensors").unlink()
    assert differences(pair) == ["final weights: nothing to compare"]


# ---------------------------------------------------------------------- torn


def test_a_whole_checkpoint_is_not_torn(pair: tuple[Path, Path]):
    assert torn(pair[0] / "checkpoints/step-00000002") is None


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def remove(folder: Path) -> None:
    (folder / "trainer_state" / "state.ckpt").unlink()


def add(folder: Path) -> None:
    (folder / "extra.txt").write_text("x")


def tear_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:20])


def garble(folder: Path) -> None:
    (folder / "trainer_state" / "state.ckpt").write_bytes(b"no checkpoint")
    sync_folder(folder)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    sync_folder(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (truncate, "model.safetensors: has 167 bytes of 168"),
        (flip, "model.safetensors: has another hash"),
        (remove, "trainer_state/state.ckpt: has no bytes of "),
        (add, "extra.txt: is not in the manifest"),
        (tear_manifest, "manifest.json: cannot be read ("),
        (garble, "cannot be opened: "),
        (empty, "holds no weights"),
    ],
)
def test_what_is_wrong_with_a_torn_checkpoint_is_said(
    change: Callable[[Path], None], said: str, pair: tuple[Path, Path]
):
    checkpoint = pair[0] / "checkpoints/step-00000002"
    change(checkpoint)
    assert (torn(checkpoint) or "").startswith(said)
