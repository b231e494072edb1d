"""Two nodes that train together: one is cut off, and what is resumed ends as if nothing had happened."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.cli.processes import end_of, free_port, kill_tree, started, torchrun, wait_for
from tests.cli.runs import config, lightning, losses, steps, weights, write
from tests.stages.judgement_runs import judged
from tests.stages.rollout_runs import LENGTH, rolled

HOLD = '''
import time
from pathlib import Path

from lightning.pytorch import Callback


class Hold(Callback):
    """Stand still after step 5, while a file asks for it."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5 and Path("hold").exists():
            Path("held").touch()
            while Path("hold").exists():
                time.sleep(0.05)
'''
ADDRESSES = ("127.0.0.1", "127.0.0.2")


def agents(run: str, *arguments: str) -> list[list[str]]:
    """The command of each node: a torchrun agent with an address of its own and one worker."""
    port = free_port()
    return [
        [
            *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"),
            *(f"--master-addr={ADDRESSES[0]}", f"--master-port={port}", f"--local-addr={address}"),
            *("-m", "lf_lightning", "fit", "--config", "run.yaml", "--trainer.default_root_dir", run, *arguments),
        ]
        for rank, address in enumerate(ADDRESSES)
    ]


def run_both(here: Path, run: str, *arguments: str) -> None:
    with started(*agents(run, *arguments), folder=here) as nodes:
        for number, node in enumerate(nodes):
            log = here / f"log.{number}"
            assert end_of(node, log) == 0, log.read_text()[-3000:]


@pytest.fixture
def two_addresses() -> None:
    for address in ADDRESSES:
        with socket.socket() as listener:
            try:
                listener.bind((address, 0))
            except OSError as error:
                pytest.skip(f"needs the loopback addresses {' and '.join(ADDRESSES)}: {address}: {error.strerror}")


@pytest.mark.usefixtures("two_addresses")
def test_a_run_of_two_nodes_of_which_one_was_cut_off_ends_with_the_same_weights(here: Path):
    (here / "hold_still.py").write_text(HOLD)
    settings = config(
        data__cache_dir="cache",
        trainer__max_steps=7,
        trainer__num_nodes=2,
        trainer__strategy="ddp",
        trainer__callbacks=[{"class_path": "hold_still.Hold"}],
    )
    write(here, settings)
    run_both(here, "straight")
    (here / "hold").touch()
    with started(*agents("cut"), folder=here) as nodes:
        wait_for(lambda: (here / "held").exists() or any(node.poll() is not None for node in nodes), "step 5")
        assert (here / "held").exists(), (here / "log.0").read_text()[-3000:] + (here / "log.1").read_text()[-3000:]
        kill_tree(nodes[1])
        (here / "hold").unlink()
        assert end_of(nodes[0], here / "log.0") != 0, "it cannot go on alone, and does not wait forever"
    assert steps(here / "cut") == ["step-00000002", "step-00000004"]
    assert not (here / "cut" / "final").exists()
    run_both(here, "cut", "--ckpt_path", "last")
    assert "continuing at step 4" in (here / "log.0").read_text()
    assert losses(here / "cut") == losses(here / "straight")
    assert weights(here / "cut" / "final") == weights(here / "straight" / "final")
    assert lightning("fit", here, settings, "--trainer.num_nodes", "1", "--trainer.default_root_dir", "alone") == 0
    assert losses(here / "alone") == pytest.approx(losses(here / "straight"), rel=1e-5)
    assert len(losses(here / "alone")) == 7


EVEN = {
    "trainer__devices": 3,
    "trainer__strategy": "ddp",
    "trainer__max_steps": -1,
    "trainer__max_epochs": 2,
    "checkpoint__every_n_steps": None,
    "data__max_samples": 5,
    "data__global_batch_size": 2,
}
"""Five units in steps of two, two and one, for three processes; and as many to validate."""


def five_on_three(here: Path) -> dict[str, tuple[dict[str, Any], int]]:
    """Stage -> its configuration, and the steps that it must make."""
    cases = {"SFT": (config(here / "SFT", data__eval_datasets=[{"path": "rows.json", "name": "val"}], **EVEN), 6)}
    for stage in ("RM", "DPO", "KTO"):
        settings = judged(here, stage, stage, **EVEN)
        settings["data"]["eval_datasets"] = [{**settings["data"]["datasets"][0], "name": "val"}]
        cases[stage] = settings, 6
    rollouts = {"data__rollout_size": 2, "model__init_args__rewards": [LENGTH]}
    cases["PPO"] = rolled("PPO", here / "PPO", **EVEN | rollouts), 12  # two passes over each rollout
    cases["PPO"][0]["data"]["eval_datasets"] = [{"path": "rows.json", "name": "val"}]
    return cases


def test_processes_that_run_out_of_data_keep_step_to_the_end_of_every_epoch(here: Path):
    cases = five_on_three(here)
    files = [write(here, settings, f"{stage}.yaml") for stage, (settings, _) in cases.items()]
    script = str(Path(__file__).with_name("even_steps_run.py"))
    with started(torchrun(3, script, *files), folder=here) as (process,):
        assert end_of(process, here / "log.0") == 0, (here / "log.0").read_text()[-3000:]
    for stage, (_, num_steps) in cases.items():
        assert len(losses(here / stage)) == num_steps, stage
        rows = (here / stage / "trainer_log.jsonl").read_text()
        assert rows.count('"eval_') >= 2, f"{stage} validates after each epoch"
    seen = [json.loads((here / f"seen.{rank}").read_text()) for rank in range(3)]
    assert seen[0] == seen[1] == seen[2], "every process made as many steps, micro-batches and validation batches"
    assert [steps for steps, _, _ in seen[0]] == [num_steps for _, num_steps in cases.values()]
