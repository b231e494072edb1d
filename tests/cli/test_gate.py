"""What decides a value: files in order, then the command line, and both before a checkpoint."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lf_lightning.__main__ import main
from lf_lightning.callbacks import RunCheckpoint
from lf_lightning.data.datamodule import DataModule
from lf_lightning.models import Freeze, LoRA
from lf_lightning.models.generation import GenerationSpec
from lf_lightning.optim import AdamW, ScheduleSpec
from lf_lightning.stages import PT, SFT
from lf_lightning.types import BackboneSpec
from tests.cli.runs import INIT, config, lightning, log_rows, losses, merged, weights, write


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The resolved configuration that --print_config prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments, "--print_config"])
    assert not stopped.value.code
    return yaml.safe_load(capsys.readouterr().out)


def rates(run: Path) -> list[float]:
    return [row["lr"] for row in log_rows(run)]


# ---------------------------------------------------------------------- who decides


def test_of_several_files_a_later_one_wins_and_leaves_the_rest(here: Path, capsys: pytest.CaptureFixture[str]):
    first = write(here, config(data__max_length=50, data__global_batch_size=3, data__template="chatml"), "a.yaml")
    second = write(here, {"data": {"max_length": 60, "global_batch_size": 5}, "trainer": {"max_steps": 7}}, "b.yaml")
    third = write(
        here, {"model": {"init_args": {"optimizer": {"init_args": {"lr": 0.25}}}}, "data": {"max_length": 70}}, "c.yaml"
    )
    found = printed(capsys, "--config", first, "--config", second, "--config", third)
    data, stage = found["data"], found["model"]["init_args"]
    assert (data["max_length"], data["global_batch_size"], data["template"]) == (70, 5, "chatml")
    assert found["trainer"]["max_steps"] == 7
    assert stage["optimizer"]["init_args"]["lr"] == 0.25
    assert stage["schedule"]["kind"] == "constant"


def test_the_command_line_beats_the_file_at_every_depth(here: Path, capsys: pytest.CaptureFixture[str]):
    path = write(here, config(data__max_length=50))
    values = {
        "seed_everything": 11,
        "trainer.max_steps": 9,
        "checkpoint.every_n_steps": 8,
        "data.max_length": 70,
        "model.max_grad_norm": 0.5,
        "model.backbone.dtype": "bfloat16",
        "model.optimizer.lr": 0.125,
        "model.schedule.kind": "cosine",
        "model.generation.max_new_tokens": 6,
        "model.backbone.architecture.hidden_size": 8,
    }
    found = printed(capsys, "--config", path, *(f"--{name}={value}" for name, value in values.items()))
    stage = found["model"]["init_args"]
    assert (found["seed_everything"], found["trainer"]["max_steps"], found["checkpoint"]["every_n_steps"]) == (11, 9, 8)
    assert (found["data"]["max_length"], stage["max_grad_norm"], stage["backbone"]["dtype"]) == (70, 0.5, "bfloat16")
    assert (stage["optimizer"]["init_args"]["lr"], stage["schedule"]["kind"]) == (0.125, "cosine")
    assert stage["generation"]["max_new_tokens"] == 6
    assert stage["backbone"]["architecture"]["hidden_size"] == 8
    assert stage["backbone"]["architecture"]["num_hidden_layers"] == 2


def test_the_command_line_changes_the_class_too(here: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model.tuning", "LoRA", "--model.tuning.rank", "3", "--model", "PT"]
    found = printed(capsys, "--config", write(here, config()), *arguments)
    assert found["model"]["class_path"].endswith("PT")
    tuning = found["model"]["init_args"]["tuning"]
    assert tuning["class_path"].endswith("LoRA")
    assert (tuning["init_args"]["rank"], tuning["init_args"]["target"]) == (3, "all")


@pytest.mark.parametrize("name", ["SFT", "lf_lightning.SFT", "lf_lightning.stages.sft.SFT"])
def test_a_stage_goes_by_its_short_name_or_its_path(name: str, here: Path, capsys: pytest.CaptureFixture[str]):
    found = printed(capsys, "--config", write(here, config(model__class_path=name)))
    assert found["model"]["class_path"] in ("SFT", "lf_lightning.SFT", "lf_lightning.stages.sft.SFT")
    assert found["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01


def test_print_config_trains_nothing_and_gives_a_file_that_says_the_same(
    here: Path, capsys: pytest.CaptureFixture[str]
):
    first = printed(capsys, "--config", write(here, config()))
    assert not (here / "run").exists()
    again = printed(capsys, "--config", write(here, first, "again.yaml"))
    assert again == first
    assert first["data"]["global_batch_size"] == 4  # given
    assert first["data"]["packing"] == "none"  # a default


def test_the_links_are_not_options(here: Path, capsys: pytest.CaptureFixture[str]):
    found = printed(capsys, "--config", write(here, config()))
    assert not {"backbone", "task"} & set(found["data"])
    for option, argument in (("data.task", "pt"), ("data.backbone.path", "x")):
        assert main(["fit", "--config", write(here, config()), f"--{option}", argument]) == 2
        assert option.split(".")[1] in capsys.readouterr().err.splitlines()[-1]


def test_the_links_carry_the_stage_and_its_backbone(here: Path):
    (here / "texts.txt").write_text("one text\nanother text\n" * 6)
    settings = config(model__class_path="PT", data__datasets=[{"path": "texts.txt"}], data__shuffle=False)
    assert lightning("fit", here, settings) == 0  # the data encodes for pt, with the bytes of the stage's backbone
    assert log_rows(here / "run")[0]["total_tokens"] == 2 * (8 + 1) + 2 * (12 + 1)


def test_an_option_of_the_command_line_beats_the_checkpoint(here: Path, full_run: Path):
    shutil.copytree(full_run, here / "run")
    arguments = ["--ckpt_path", "run/checkpoints/step-00000002", "--model.optimizer.lr", "0.002"]
    assert lightning("fit", here, config(), *arguments) == 0
    assert rates(here / "run") == [0.01, 0.01, 0.002, 0.002]
    assert weights(here / "run" / "final") != weights(full_run / "final")


def test_a_value_of_the_file_beats_the_checkpoint(here: Path, full_run: Path):
    shutil.copytree(full_run, here / "run")
    changes = {
        f"{INIT}.optimizer.init_args": {"lr": 0.004, "weight_decay": 0.5, "betas": [0.8, 0.9], "eps": 1e-3},
        f"{INIT}.schedule": {"kind": "linear"},
        f"{INIT}.max_grad_norm": 0.1,
    }
    settings = merged(config(), changes)
    assert lightning("fit", here, settings, "--ckpt_path", "run/checkpoints/step-00000002") == 0
    assert rates(here / "run")[2:] == pytest.approx([0.004 * 2 / 4, 0.004 * 1 / 4])  # 2 and 1 of 4 steps are left
    state = torch.load(here / "run/checkpoints/step-00000004/trainer_state/state.ckpt", weights_only=True)
    group = state["optimizer_states"][0]["param_groups"][0]
    assert (group["weight_decay"], list(group["betas"]), group["eps"]) == (0.5, [0.8, 0.9], 1e-3)


# ---------------------------------------------------------------------- intervals


def eval_steps(run: Path) -> list[int]:
    return [row["current_steps"] for row in log_rows(run) if "eval_loss" in row]


@pytest.mark.parametrize(
    ("interval", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7, 8]), (2, [2, 4, 6, 8]), (5, [5]), (3, [3, 6])]
)
def test_an_integer_val_check_interval_counts_optimizer_steps_across_epochs(
    interval: int, steps: list[int], here: Path
):
    # 10 rows train, in steps of 4: three steps an epoch
    changes = {"trainer__max_steps": 8, "data__val_size": 2, "trainer__val_check_interval": interval}
    assert lightning("fit", here, config(**changes, checkpoint__every_n_steps=None)) == 0
    assert eval_steps(here / "run") == steps


def test_without_an_interval_validation_ends_each_epoch(here: Path):
    changes = {"trainer__max_steps": 7, "data__val_size": 2, "checkpoint__every_n_steps": None}
    assert lightning("fit", here, config(**changes)) == 0
    assert eval_steps(here / "run") == [3, 6]


def test_the_interval_goes_on_counting_after_a_resume(here: Path):
    settings = config(trainer__max_steps=8, data__val_size=2, trainer__val_check_interval=3)
    assert lightning("fit", here, settings) == 0
    straight = log_rows(here / "run")
    shutil.rmtree(here / "run/checkpoints/step-00000006")
    shutil.rmtree(here / "run/checkpoints/step-00000008")
    assert lightning("fit", here, settings, "--ckpt_path", "last") == 0
    assert eval_steps(here / "run") == [3, 6]
    assert [row.get("eval_loss") for row in log_rows(here / "run")] == [row.get("eval_loss") for row in straight]


def test_log_every_n_steps_counts_optimizer_steps_and_logs_the_last_one(here: Path):
    settings = config(trainer__max_steps=7, trainer__log_every_n_steps=3, data__micro_batch_size=1)
    assert lightning("fit", here, settings) == 0
    assert [row["current_steps"] for row in log_rows(here / "run")] == [3, 6, 7]


# ---------------------------------------------------------------------- an option does something

BASE = {
    "trainer__max_steps": 2,
    "data__val_size": 3,
    "trainer__val_check_interval": 2,
    "checkpoint__every_n_steps": None,
}
CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed_everything": 8},
    "lr": {"model__init_args__optimizer__init_args__lr": 0.02},
    "betas": {"model__init_args__optimizer__init_args__betas": [0.5, 0.6]},
    "eps": {"model__init_args__optimizer__init_args__eps": 0.01},
    "weight_decay": {"model__init_args__optimizer__init_args__weight_decay": 0.9},
    "schedule kind": {"model__init_args__schedule__kind": "cosine"},
    "warmup_ratio": {"model__init_args__schedule__warmup_ratio": 0.5},
    "warmup_steps": {"model__init_args__schedule__warmup_steps": 1},
    "max_grad_norm": {"model__init_args__max_grad_norm": 0.01},
    "tuning": {"model__init_args__tuning": {"class_path": "Freeze", "init_args": {"num_layers": 1}}},
    "architecture": {"model__init_args__backbone__architecture__rms_norm_eps": 0.1},
    "dtype": {"model__init_args__backbone__dtype": "float64"},
    "max_steps": {"trainer__max_steps": 3},
    "template": {"data__template": "default"},
    "max_length": {"data__max_length": 42},
    "max_samples": {"data__max_samples": 9},
    "val_size": {"data__val_size": 2},
    "global_batch_size": {"data__global_batch_size": 3},
    "packing": {"data__packing": "knapsack", "data__max_length": 200},
    "shuffle": {"data__shuffle": False},
    "data seed": {"data__seed": 3},
    "train_on_prompt": {"data__train_on_prompt": True},
    "precision": {"trainer__precision": "bf16-mixed"},
}
SAME: dict[str, dict[str, Any]] = {
    "micro_batch_size": {"data__micro_batch_size": 1},
    "micro_batch_tokens": {"data__micro_batch_tokens": 70},
    "layout": {"data__layout": "padded"},
    "eval_micro_batch_size": {"data__eval_micro_batch_size": 1},
    "gradient_checkpointing": {"model__init_args__backbone__gradient_checkpointing": True},
    "attention": {"model__init_args__backbone__attention": "eager"},
    "num_workers": {"data__num_workers": 2},
    "log_every_n_steps": {"trainer__log_every_n_steps": 2},
    "generation": {"model__init_args__generation__max_new_tokens": 9},
}


@pytest.fixture(scope="module")
def base_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    settings = config(run=folder / "run", data__datasets=[{"path": str(folder / "rows.json")}], **BASE)
    assert lightning("fit", folder, settings) == 0
    return folder / "run"


def values(run: Path) -> dict[int, tuple[float | None, float | None]]:
    """Step -> training loss and eval loss there."""
    found: dict[int, tuple[float | None, float | None]] = {}
    for row in log_rows(run):
        loss, eval_loss = found.get(row["current_steps"], (None, None))
        found[row["current_steps"]] = (row.get("loss", loss), row.get("eval_loss", eval_loss))
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_changing_an_option_changes_the_result(name: str, here: Path, base_run: Path):
    assert lightning("fit", here, config(**{**BASE, **CHANGES[name]})) == 0
    assert weights(here / "run" / "final") != weights(base_run / "final")
    assert values(here / "run") != values(base_run)


@pytest.mark.parametrize("name", SAME)
def test_how_a_step_is_computed_or_reported_does_not_change_the_result(name: str, here: Path, base_run: Path):
    assert lightning("fit", here, config(**{**BASE, **SAME[name]})) == 0
    want, got = values(base_run), values(here / "run")
    assert {2} <= got.keys() <= want.keys()
    for step, pair in got.items():
        assert [value is None for value in pair] == [value is None for value in want[step]]
        assert [value or 0.0 for value in pair] == pytest.approx([value or 0.0 for value in want[step]], rel=1e-5)


def test_mask_history_learns_the_last_answer_alone(here: Path):
    rows = '[{"instruction": "c", "output": "abcd", "history": [["a", "xyz"]]}]'
    (here / "rows.json").write_text(rows)
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    found = []
    for masks in (False, True):
        settings = config(data__datasets=[{"path": "rows.json", "columns": columns}], data__mask_history=masks)
        assert lightning("fit", here, settings, "--overwrite", "true") == 0
        found.append(losses(here / "run")[0])
    assert found[0] != found[1]


# ---------------------------------------------------------------------- help


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    """What `fit --help` and the help of each stage print."""
    import contextlib
    import io

    found = {}
    for name, arguments in (("fit", ["--help"]), ("SFT", ["--model.help", "SFT"]), ("PT", ["--model.help", "PT"])):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as stopped:
            main(["fit", *arguments])
        assert not stopped.value.code
        found[name] = text.getvalue()
    return found


def meaning(text: str, option: str) -> str:
    """What a help text says below an option, up to the next one."""
    found = re.search(rf"^ +(?:-\S+, )?--{re.escape(option)}(?: [^\n]*)?$((?:\n(?! *--).*)*)", text, flags=re.MULTILINE)
    if found is None:
        return ""
    same_line = re.search(rf"--{re.escape(option)} \S+ {{2,}}(.*)", found[0])
    words = (same_line[1] if same_line else "") + found[1]
    return " ".join(re.sub(r"\((required, )?type: .*", "", words.split("\n\n")[0], flags=re.DOTALL).split())


def options_of(kind: type, leave_out: tuple[str, ...] = ()) -> list[str]:
    names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else None
    names = names or [name for name in inspect.signature(kind).parameters if name != "self"]
    return [name for name in names if name not in leave_out]


SPECS = ("backbone", "tuning", "optimizer", "schedule", "generation", "reference")
OPTIONS = [
    *((f"checkpoint.{name}", "fit") for name in options_of(RunCheckpoint)),
    *((f"data.{name}", "fit") for name in options_of(DataModule, ("backbone", "task"))),
    ("ckpt_path", "fit"),
    ("overwrite", "fit"),
    *((f"{prefix}{name}", page) for page, kind in (("SFT", SFT), ("PT", PT)) for prefix, name in
      [("model.", name) for name in options_of(kind, SPECS)]
      + [("model.backbone.", name) for name in options_of(BackboneSpec)]
      + [("model.schedule.", name) for name in options_of(ScheduleSpec)]
      + [("model.generation.", name) for name in options_of(GenerationSpec)]),
]  # fmt: skip


@pytest.mark.parametrize(("option", "page"), OPTIONS)
def test_the_help_says_what_every_option_means(option: str, page: str, help_texts: dict[str, str]):
    assert f"--{option}" in help_texts[page]
    assert len(meaning(help_texts[page], option)) >= 15


CLASSES = [
    *(("tuning", kind.__name__, name) for kind in (LoRA, Freeze) for name in options_of(kind)),
    *(("optimizer", "AdamW", name) for name in options_of(AdamW)),
]


@pytest.mark.parametrize(("group", "kind", "option"), CLASSES)
def test_the_help_of_a_class_says_what_every_option_means(
    group: str, kind: str, option: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "SFT", f"--model.{group}.help", kind])
    text = capsys.readouterr().out
    for prefix in (f"{group}.", f"model.{group}.", f"model.init_args.{group}."):
        if f"--{prefix}{option}" in text:
            assert len(meaning(text, f"{prefix}{option}")) >= 15
            return
    raise AssertionError(f"no --{group}.{option} in the help")


def test_the_help_offers_no_linked_option(help_texts: dict[str, str]):
    for text in help_texts.values():
        assert not re.search(r"^ +--data\.(task|backbone)(\.(?!help)| |$)", text, flags=re.MULTILINE)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_every_verb_has_a_help(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lf-lightning {verb} ")
    assert "--data.predict_datasets" in text
