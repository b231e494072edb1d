"""Encoding before a run, and at its start on many processes: once, in parts, and outside of any collective."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from lf_lightning.__main__ import main
from lf_lightning.data import build
from tests.cli.processes import PATIENCE, end_of, started, torchrun, wait_for
from tests.cli.runs import ROWS, config, lightning, log_rows, write
from tests.stages.judgement_runs import judged
from tests.stages.rollout_runs import rolled

PLANTED = str(Path(__file__).with_name("planted_run.py"))
VAL = {"data__val_size": 3}


def prepare(here: Path, settings: dict[str, Any], *arguments: str) -> int:
    return lightning("prepare", here, settings, *arguments)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def cached(cache: Path) -> Path:
    """The one folder of a cache, which holds nothing else."""
    (folder,) = cache.iterdir()
    return folder


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first row of every chunk that this process encodes from now on."""
    encoded, real = [], build.Encoder.chunk

    def chunk(encoder: build.Encoder, job: build.Job) -> build.Chunk:
        encoded.append(job.first_row)
        return real(encoder, job)

    monkeypatch.setattr(build.Encoder, "chunk", chunk)
    return encoded


def test_prepare_says_what_fit_says_of_the_data_and_fit_encodes_nothing_then(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = config(data__cache_dir="cache", **VAL)
    of_eight = ("--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.strategy", "ddp")
    assert prepare(here, settings, *of_eight) == 0, "what trains may be another machine"
    folder = cached(here / "cache").relative_to(here)
    lines = said(capsys)
    assert lines == [
        "rows: 12 rows, 12 kept, 0 cut, 0 dropped",
        "train: 9 units of 391 tokens, 3 steps an epoch",
        f"train: encoded in {folder}",
        f"val: encoded in {folder}",
    ]
    assert not (here / "run").exists()
    encoded = counted(monkeypatch)
    assert lightning("fit", here, settings) == 0
    assert encoded == []
    assert cached(here / "cache").relative_to(here) == folder
    assert set(lines[:2]) <= set(said(capsys))
    assert prepare(here, settings) == 0
    assert encoded == []
    assert said(capsys) == lines


def test_prepare_encodes_every_set_that_is_named(here: Path, capsys: pytest.CaptureFixture[str]):
    sets = {f"data__{kind}_datasets": [{"path": f"{kind}.json"}] for kind in ("eval", "test", "predict")}
    for number, kind in enumerate(("eval", "test", "predict"), start=1):
        (here / f"{kind}.json").write_text(json.dumps(ROWS[:number]))
    assert prepare(here, config(data__cache_dir="cache", **sets)) == 0
    lines = said(capsys)
    assert lines[:4] == [
        "rows: 12 rows, 12 kept, 0 cut, 0 dropped",
        "eval: 1 rows, 1 kept, 0 cut, 0 dropped",
        "test: 2 rows, 2 kept, 0 cut, 0 dropped",
        "predict: 3 prompts, encoded when predict starts, and not kept",
    ]
    folders = {line.split(":")[0]: here / line.split(" in ")[1] for line in lines if "encoded in" in line}
    assert list(folders) == ["train", "val", "test"]
    assert set(folders.values()) == set((here / "cache").iterdir())


def test_prepare_of_judged_rows_counts_what_fit_counts(here: Path, capsys: pytest.CaptureFixture[str]):
    settings = judged(here, "DPO", data__cache_dir="cache", trainer__max_steps=1, checkpoint__every_n_steps=None)
    assert prepare(here, settings) == 0
    (line,) = [line for line in said(capsys) if line.startswith("train: 12 units")]
    assert lightning("fit", here, settings) == 0
    assert line in said(capsys)


def test_prepare_of_prompts_reads_them_and_says_that_nothing_is_kept(here: Path, capsys: pytest.CaptureFixture[str]):
    settings = rolled("PPO", data__cache_dir="cache")
    assert prepare(here, settings) == 0
    assert said(capsys) == [
        "rows: 12 prompts (longest 31 tokens)",
        "ppo: these prompts are in order; fit encodes them when it starts, and nothing is kept",
    ]
    assert not (here / "cache").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"data__cache_dir": None},
            "data.cache_dir: must be a folder for prepare, got null. Name one that the run can read too.",
        ),
        ({"data__datasets": []}, "data.datasets: must name at least one dataset, got none. Name one."),
        (
            {"data__cache_dir": "rows.json/cache"},
            "data.cache_dir: must be a folder that can be written, got rows.json/cache (Not a directory). "
            "Make room there, choose another, or null to keep encoded rows in memory.",
        ),
        (
            {"trainer__accumulate_grad_batches": 2},
            "trainer.accumulate_grad_batches: must be 1, got 2. Set data.global_batch_size and data.micro_batch_size: "
            "accumulation follows from them.",
        ),
    ],
    ids=["no cache", "no data", "no folder", "what fit refuses"],
)
def test_what_prepare_cannot_do_is_one_line(
    change: dict[str, Any], line: str, here: Path, capsys: pytest.CaptureFixture[str]
):
    assert prepare(here, config(**{"data__cache_dir": "cache", **change})) == 2
    assert said(capsys) == [f"lf-lightning: error: {line}"]


def test_who_waits_for_a_killed_process_goes_on_where_it_was(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = write(here, config(data__cache_dir="cache", data__num_workers=2))
    with started([PLANTED, "prepare", "--config", path], folder=here, PLANTED_SECONDS="3") as (process,):
        wait_for(lambda: len([*here.glob("cache/.*.parts/*.npz")]) >= 2 or process.poll() is not None, "two chunks")
        assert process.poll() is None, (here / "log.0").read_text()
        monkeypatch.setattr(build, "CHUNK_ROWS", 2)
        encoded, codes = counted(monkeypatch), []

        def take_over() -> None:
            codes.append(main(["prepare", "--config", path, "--data.num_workers", "1"]))

        waiting = threading.Thread(target=take_over)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = len([*here.glob("cache/.*.parts/*.npz")])
        waiting.start()
        waiting.join(timeout=PATIENCE)
        assert codes == [0], (here / "log.0").read_text()
        assert 2 <= left < 6
        assert len(encoded) == 6 - left
        gone = said(capsys)
        assert any(line.startswith(f"data: process {process.pid} on") and "is gone" in line for line in gone)
        assert f"encoding: {2 * left} of 12 rows were encoded before" in gone
        wait_for(lambda: not any(is_alive(each) for each in workers), "the workers to end with their parent")
    interrupted = cached(here / "cache")
    assert main(["prepare", "--config", path, "--data.cache_dir", "straight", "--data.num_workers", "1"]) == 0
    straight = cached(here / "straight")
    assert interrupted.name == straight.name
    assert {each.name: each.read_bytes() for each in interrupted.iterdir()} == {
        each.name: each.read_bytes() for each in straight.iterdir()
    }


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # nobody may be there to bury it
    except psutil.NoSuchProcess:
        return False


TWO = {"data__cache_dir": "cache", "trainer__devices": 2, "trainer__max_steps": 1, "checkpoint__every_n_steps": None}
"""Two processes of one node, which ask for the same data at once."""


@pytest.mark.slow
def test_encoding_may_take_longer_than_the_processes_wait_for_each_other(here: Path):
    timeout = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"timeout": "0:00:20"}}
    path = write(here, config(trainer__strategy=timeout, **TWO))
    command = torchrun(2, PLANTED, "fit", "--config", path)
    # six chunks: 24 seconds from when both are there, more than the 20 of the process group
    with started(command, folder=here, PLANTED_SECONDS="4", PLANTED_WAITS="1") as (process,):
        assert end_of(process, here / "log.0") == 0, (here / "log.0").read_text()[-3000:]
    assert len(log_rows(here / "run")) == 1
    lines = [line.split() for line in (here / "encoded").read_text().splitlines()]
    assert [int(first_row) for _, first_row in lines] == [1, 3, 5, 7, 9, 11], "every row is encoded once"
    assert len({process_id for process_id, _ in lines}) == 1
    assert cached(here / "cache").is_dir()


@pytest.mark.slow
def test_a_row_that_cannot_be_used_ends_all_processes_with_its_line(here: Path):
    (here / "rows.json").write_text(json.dumps([*ROWS[:5], {"instruction": "no answer"}]))
    path = write(here, config(trainer__strategy="ddp", **TWO))
    command = torchrun(2, PLANTED, "fit", "--config", path)
    with started(command, folder=here, PLANTED_SECONDS="1", PLANTED_WAITS="1") as (process,):
        assert end_of(process, here / "log.0") != 0
    log = (here / "log.0").read_text()
    assert "lf-lightning: error: rows.json, row 6: has no answer to learn" in log
    assert "InputError" not in log, "a line, no traceback"
    lines = (here / "encoded").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["1", "3", "5"], "who waited did not encode them again"
    assert [path.suffix for path in (here / "cache").iterdir()] == [".failed"]


def test_one_process_encodes_before_it_starts_the_others(here: Path):
    path = write(here, config(trainer__strategy="ddp", **TWO))
    with started([PLANTED, "fit", "--config", path], folder=here, PLANTED_SECONDS="0") as (process,):
        assert end_of(process, here / "log.0") == 0, (here / "log.0").read_text()[-3000:]
    lines = [line.split() for line in (here / "encoded").read_text().splitlines()]
    assert [line[1] for line in lines] == ["1", "3", "5", "7", "9", "11"]
    assert {line[0] for line in lines} == {str(process.pid)}
    assert not (here / "waiting").exists()
