"""One run, continued on other numbers of ranks: the same units in the same steps, and the same losses.

Every chain is held against a run of one process that never stopped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import config, log_rows, losses, write
from tests.cli.test_sharded_runs import furthest

COPIES = {"class_path": "FSDP2Strategy", "init_args": {"replicate": 2}}
TOGETHER = {"class_path": "FSDP2Strategy", "init_args": {"tensor_parallel": 2}}
CHAINS: dict[str, list[tuple[int, Any]]] = {  # two steps each: ranks and strategy
    "straight": [(1, "auto")],
    "ddp": [(2, "ddp"), (1, "auto"), (3, "ddp")],
    "fsdp2": [(2, "fsdp2"), (3, "fsdp2")],
    "copies": [(4, COPIES), (2, "fsdp2"), (1, "auto")],
    "together": [(4, TOGETHER), (2, "fsdp2"), (2, TOGETHER)],
}
SLOW = ("fsdp2", "copies", "together")
UNITS = "+=tests.cli.chain_run.KeepUnits"


def run_chains(folder: Path, model: Path, names: list[str]) -> None:
    """Run some chains, one link after the other, in one process that forks the ranks."""
    links = []
    for name in names:
        for number, (ranks, strategy) in enumerate(CHAINS[name], 1):
            settings = config(
                folder / name,
                trainer__max_steps=6 if name == "straight" else 2 * number,
                trainer__devices=ranks,
                trainer__strategy=strategy,
                model__init_args__backbone={"path": str(model)},
                data__datasets=[{"path": str(folder / "rows.json")}],
                data__global_batch_size=5,
                data__micro_batch_size=1,
            )
            path = write(folder, settings, f"{name}-{number}.yaml")
            links.append((ranks, ["--config", path, "--ckpt_path", "last", f"--trainer.callbacks{UNITS}"]))
    (folder / "links.json").write_text(json.dumps(links))
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.cli.chain_run", str(folder / "links.json")]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert code == 0, (folder / "log").read_text()[-4000:]


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Callable[..., Path]:
    """Runs chains, each once, and gives the folder of their runs."""
    folder = tmp_path_factory.mktemp("chains")

    def run(*names: str) -> Path:
        missing = [name for name in ("straight", *names) if not (folder / name).exists()]
        if missing:
            run_chains(folder, model, missing)
        return folder

    return run


def units_of(run: Path) -> dict[int, list[list[Any]]]:
    """Step -> the rows of all ranks, sorted."""
    found: dict[int, list[list[Any]]] = {}
    for path in sorted(run.glob("units.*.jsonl")):
        for line in path.read_text().splitlines():
            step, rows = json.loads(line)
            found.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in found.items()}


def check(folder: Path, name: str) -> None:
    """Hold a chain against the run that never stopped."""
    straight, run = folder / "straight", folder / name
    num_steps = 2 * len(CHAINS[name])
    want = {step: rows for step, rows in units_of(straight).items() if step <= num_steps}
    assert sorted(want) == list(range(1, num_steps + 1))
    assert units_of(run) == want
    assert losses(run) == pytest.approx(losses(straight)[:num_steps], rel=1e-5)
    tokens = [[row["total_tokens"] for row in log_rows(each) if "loss" in row] for each in (run, straight)]
    assert tokens[0] == tokens[1][:num_steps]
    if num_steps == 6:
        assert furthest(run / "final", straight / "final") < 1e-4


def test_a_run_continued_on_other_ranks_makes_the_same_steps_of_the_same_units(chained: Callable[..., Path]) -> None:
    check(chained("ddp"), "ddp")


@pytest.mark.slow
def test_a_run_whose_ranks_share_the_model_goes_on_on_any_ranks(chained: Callable[..., Path]) -> None:
    folder = chained(*SLOW)
    check(folder, "fsdp2")
    check(folder, "copies")
    found = {step: len(rows) for step, rows in units_of(folder / "together").items()}
    assert found == {1: 10, 2: 10, 3: 2, 4: 5, 5: 10, 6: 4}, "the ranks of a layer get the same units"
    assert losses(folder / "together") == pytest.approx(losses(folder / "straight"), rel=1e-5)
    assert furthest(folder / "together" / "final", folder / "straight" / "final") < 1e-4
