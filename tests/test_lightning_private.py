"""Each private name that we touch still means what we take it to mean."""

import os
import signal
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

from lf_lightning.lightning_private import (
    align_counts,
    count_step,
    global_seed,
    parser_schema,
    run_validation,
    send_step_to_loggers,
    share_over_all_ranks,
    silence_lightnings_signals,
    validation_is_due,
)
from tests.callbacks.python_run import fit
from tests.cli.runs import log_rows, losses


def test_the_global_seed_is_that_of_the_last_seed_everything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back afterwards
    seed_everything(31)
    assert global_seed() == 31
    seed_everything(5)
    assert global_seed() == 5


def test_without_seed_everything_the_global_seed_is_zero(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert global_seed() == 0
    assert "PL_GLOBAL_SEED" not in os.environ


class Asks(Callback):
    """Asks after every step, and sees what comes."""

    def __init__(self) -> None:
        self.asked: dict[int, bool] = {}
        self.came: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.asked[trainer.global_step] = validation_is_due(trainer)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        self.came.append(trainer.global_step)


@pytest.mark.parametrize(
    "options",
    [
        {"val_size": 3, "val_check_interval": 2, "check_val_every_n_epoch": None},
        {"val_size": 3},  # at the end of an epoch of three steps
        {"val_size": 3, "val_check_interval": 0.5},
        {"val_size": 3, "limit_val_batches": 0},
        {"val_size": 0},
    ],
)
def test_validation_is_due_exactly_where_it_comes(options: dict[str, Any], tmp_path: Path):
    asks = Asks()
    fit(tmp_path, asks, max_steps=7, num_sanity_val_steps=0, **options)
    assert sorted(asks.asked) == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, asked in asks.asked.items() if asked] == asks.came
    assert bool(asks.came) == (options["val_size"] > 0 and "limit_val_batches" not in options)


@pytest.mark.parametrize(("together", "sizes"), [(1, (6, 1)), (2, (3, 2))])
def test_all_ranks_of_all_nodes_share_the_model(together: int, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        "lightning.pytorch.strategies.model_parallel._setup_device_mesh", lambda *sizes: asked.append(sizes)
    )
    monkeypatch.setattr(ModelParallelStrategy, "_setup_distributed", lambda self: None)
    monkeypatch.setattr(ModelParallelStrategy, "world_size", 6)
    strategy = ModelParallelStrategy()
    strategy.parallel_devices, strategy.num_nodes = [torch.device("cpu")] * 3, 2
    strategy.cluster_environment = LightningEnvironment()
    strategy._lightning_module = LightningModule()
    strategy.accelerator = CPUAccelerator()
    share_over_all_ranks(strategy, together)
    strategy.setup_environment()
    assert asked[0][:2] == sizes


class Fruit:
    """Something to eat."""


class Apple(Fruit):
    """Grows on trees.

    Args:
        weight: In grams, > 0.
    """

    def __init__(self, weight: int = 100) -> None:
        self.weight = weight


def test_the_schema_of_a_parser_knows_types_choices_classes_and_meanings():
    parser = ArgumentParser()
    parser.add_argument("--ripe", type=Literal["yes", "no"], default="no", help="Whether to eat it.")
    parser.add_argument("--fruit", type=Fruit)
    parser.add_argument("--layer", type=torch.nn.Module | None, default=None)
    schema = parser_schema(parser)
    options = schema["properties"]
    assert options["ripe"] == {"enum": ["yes", "no"], "description": "Whether to eat it.", "default": "no"}
    assert options["layer"] == {"anyOf": [{"type": "null"}, {"type": ["object", "string"]}]}
    assert options["fruit"] == {"$ref": "#/$defs/Fruit"}
    by_name = {
        kind["properties"]["class_path"]["enum"][1]: kind
        for kind in schema["$defs"]["Fruit"]["anyOf"]
        if "enum" in kind.get("properties", {}).get("class_path", {})
    }
    assert sorted(by_name) == ["Apple", "Fruit"]
    assert by_name["Apple"]["properties"]["class_path"]["enum"] == [f"{__name__}.Apple", "Apple"]
    weight = by_name["Apple"]["properties"]["init_args"]["properties"]["weight"]
    assert weight == {"type": "integer", "description": "In grams, > 0.", "default": 100}


class Handlers(Callback):
    """Remember who answers SIGTERM and SIGUSR1 in the midst of training."""

    def __init__(self, *, silenced: bool) -> None:
        self.silenced = silenced

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self.silenced:
            silence_lightnings_signals(trainer)

    def on_train_start(self, *_: Any) -> None:
        self.seen = {signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)}


@pytest.mark.parametrize(("silenced", "num_answering"), [(False, 2), (True, 0)])
def test_silenced_lightning_answers_no_signal_and_requeues_nothing(
    silenced: bool, num_answering: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"NTASKS": "1", "JOB_NAME": "run", "JOB_ID": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    before, handlers = signal.getsignal(signal.SIGTERM), Handlers(silenced=silenced)
    slurm = SLURMEnvironment()
    trainer = bare_trainer(tmp_path, handlers, plugins=[slurm])
    trainer.fit(BoringModel())
    assert slurm.auto_requeue is not silenced
    assert len(handlers.seen - {signal.SIG_DFL}) == num_answering
    assert signal.getsignal(signal.SIGTERM) == before


def test_silenced_lightning_asks_no_rank_for_a_signal(tmp_path: Path):
    trainer = bare_trainer(tmp_path)
    asks = type(trainer.fit_loop.epoch_loop)._broadcast_sigterm_tensor
    assert callable(asks), "what is taken away must be what Lightning calls"
    silence_lightnings_signals(trainer)
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None  # Lightning's own needs a process group


class Leaves(Callback):
    """End the run in the step's own hook, with its metrics sent or not."""

    def __init__(self, *, sends: bool) -> None:
        self.sends = sends

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.sends:
            send_step_to_loggers(trainer)
        raise SystemExit(3)


class Logging(BoringModel):
    """Logs its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", 1.5)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("sends", "rows"), [(False, []), (True, ["epoch,loss,step", "0,1.5,0"])])
def test_a_step_that_was_sent_reaches_the_loggers(sends: bool, rows: list[str], tmp_path: Path):
    logger = CSVLogger(tmp_path, name="log", version="0")
    trainer = bare_trainer(tmp_path, Leaves(sends=sends), logger=logger, log_every_n_steps=1)
    with pytest.raises(SystemExit):
        trainer.fit(Logging())
    logger.save()
    path = tmp_path / "log" / "0" / "metrics.csv"
    assert (path.read_text().splitlines() if path.is_file() else []) == rows


def bare_trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """One step of Lightning's own model, and nothing around it."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "limit_val_batches": 0}
    where = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_steps": 1}
    return Trainer(callbacks=list(callbacks), **{**where, **quiet, **options})


class Observed(Callback):
    """Notes at each step whether validation is due, and what loops have counted."""

    def __init__(self) -> None:
        self.due: list[bool] = []
        self.counts: list[tuple[int, ...]] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        loop = trainer.fit_loop
        batches, epochs = loop.epoch_loop.batch_progress.total, loop.epoch_progress
        counts = [each for part in (batches, epochs.total, epochs.current) for each in vars(part).values()]
        before = (*counts, loop.epoch_loop._batches_that_stepped)
        align_counts(trainer)
        counts = [each for part in (batches, epochs.total, epochs.current) for each in vars(part).values()]
        self.counts += [before, (*counts, loop.epoch_loop._batches_that_stepped)]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.due.append(validation_is_due(trainer))


def test_validation_is_due_after_the_steps_that_lightning_validates(tmp_path: Path):
    observed = Observed()
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 7}
    fit(tmp_path, observed, val_size=3, **options)
    assert observed.due == [False, True, False, True, False, True, False]
    rows = [row["current_steps"] for row in log_rows(tmp_path / "run") if "eval_loss" in row]
    assert rows == [2, 4, 6]


def test_validation_is_due_at_the_end_of_each_epoch_unless_said_otherwise(tmp_path: Path):
    observed = Observed()
    fit(tmp_path, observed, val_size=3, max_steps=7)  # three steps an epoch
    assert observed.due == [False, False, True, False, False, True, False]


class Stops(Callback):
    """Asks the trainer to stop in the second epoch."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 4:
            trainer.should_stop = True
            loop: Any = trainer.fit_loop
            self.due = (loop.epoch_loop._should_check_val_fx(loop._data_fetcher), validation_is_due(trainer))
            self.still_stops = trainer.should_stop


def test_that_a_run_stops_is_no_reason_for_a_validation(tmp_path: Path):
    stops = Stops()
    trainer = fit(tmp_path, stops, val_size=3, max_steps=9, val_check_interval=7, check_val_every_n_epoch=None)
    assert (stops.due, stops.still_stops) == ((True, False), True)
    assert trainer.global_step == 4


def test_in_a_run_without_a_break_the_counts_are_already_what_they_are_set_to(tmp_path: Path):
    observed = Observed()
    fit(tmp_path, observed, max_steps=7)
    assert observed.counts[::2] == observed.counts[1::2]
    assert len(set(observed.counts)) == 7


class Validates(Callback):
    """Validates before the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        run_validation(trainer)
        self.stage = trainer.state.stage
        self.trains = pl_module.training

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.value = float(trainer.callback_metrics["val/loss"])


def test_a_validation_can_be_run_before_a_step_and_changes_nothing(tmp_path: Path):
    validates = Validates()
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    fit(tmp_path / "with", validates, val_size=3, val_check_interval=2, check_val_every_n_epoch=None)
    fit(tmp_path / "without", val_size=3, val_check_interval=2, check_val_every_n_epoch=None)
    assert (validates.stage, validates.trains) == ("train", True)
    assert 0 < validates.value < 5
    rows = [[row.get("eval_loss") for row in log_rows(tmp_path / name / "run")] for name in ("with", "without")]
    assert [value is not None for value in rows[0][:1]] == [True]
    assert rows[0][1:] == rows[1]
    assert losses(tmp_path / "with" / "run") == losses(tmp_path / "without" / "run")


class Counts(Callback):
    """Counts a step that no optimizer makes, in the second one."""

    steps: tuple[int, int] = (0, 0)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        if trainer.global_step == 1:
            optimizer: Any = pl_module.optimizers()
            before = trainer.global_step
            count_step(optimizer)
            self.steps = before, trainer.global_step


def test_a_step_that_is_not_made_is_counted(tmp_path: Path):
    counts = Counts()
    fit(tmp_path, counts, max_steps=4)
    assert counts.steps == (1, 2)
