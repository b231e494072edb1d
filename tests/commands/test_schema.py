"""The schema accepts what the gate accepts, and catches what it refuses."""

import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from lf_lightning.__main__ import main
from lf_lightning.commands.schema import configuration_schema
from tests.cli.runs import INIT, config, merged
from tests.conftest import ROOT

CONFIGS = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "tests" / "parity").glob("*.yaml")])


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = configuration_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def complaints(validator: Draft202012Validator, settings: Any) -> list[str]:
    return [error.message for error in validator.iter_errors(settings)]


def test_the_command_prints_the_schema_and_nothing_else(
    validator: Draft202012Validator, capsys: pytest.CaptureFixture[str]
):
    assert main(["schema"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == validator.schema
    assert printed.err == ""


def test_an_argument_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["schema", "--path", "x"]) == 2
    assert capsys.readouterr().err == (
        "lf-lightning: error: schema: takes no arguments, got --path x. Write lf-lightning schema > lf.schema.json.\n"
    )


def test_the_help_says_where_the_schema_goes(capsys: pytest.CaptureFixture[str]):
    assert main(["schema", "--help"]) == 0
    assert "# yaml-language-server: $schema=lf.schema.json" in capsys.readouterr().out


def test_making_the_schema_sets_no_seed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    configuration_schema()
    assert os.environ["PL_GLOBAL_SEED"] == "12"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_configuration_that_we_ship_is_valid(path: Path, validator: Draft202012Validator):
    assert complaints(validator, yaml.safe_load(path.read_text(encoding="utf-8"))) == []


VALID: dict[str, dict[str, Any]] = {
    "a part of a configuration": {"trainer": {"max_steps": 3}},
    "a schema of its own": {"$schema": "./lf.schema.json", **config()},
    "a full class path": config(model__class_path="lf_lightning.SFT"),
    "a class of the user's own": config(
        trainer__callbacks=[{"class_path": "mine.Watch", "init_args": {"every": 3}}, {"class_path": "AnswersTable"}]
    ),
    "null where null is meant": config(model__init_args__max_grad_norm=None, data__max_samples=None),
}


@pytest.mark.parametrize("name", VALID)
def test_what_the_gate_accepts_is_valid(name: str, validator: Draft202012Validator):
    assert complaints(validator, VALID[name]) == []


WRONG: dict[str, Any] = {
    "chekpoint": {},
    "trainer.max_stps": 3,
    "checkpoint.every_n_step": 3,
    "data.max_lenght": 3,
    "data.task": "pt",
    "data.backbone": {"path": "x"},
    "model.backbone": {"path": "x"},
    f"{INIT}.max_gradnorm": 1.0,
    f"{INIT}.backbone.dtyp": "float32",
    f"{INIT}.tuning.init_args.rank": 3,  # of Full
    f"{INIT}.optimizer.init_args.lrr": 1.0,
    f"{INIT}.schedule.knd": "linear",
    f"{INIT}.generation.max_tokens": 3,
    "trainer.callbacks": [{"class_path": "AnswersTable", "init_args": {"num_row": 3}}],
    "model.class_path": "SFTT",
    f"{INIT}.tuning.class_path": "Lora",
    "trainer.max_steps": "many",
    "checkpoint.mode": "least",
    "data.max_length": 3.5,
    "data.shuffle": "maybe",
    "data.datasets": "identity",
    "data.packing": "block",
    f"{INIT}.backbone.dtype": "bf16",
    f"{INIT}.optimizer.init_args.lr": "fast",
    f"{INIT}.optimizer.init_args.betas": [0.9],
}


@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_key_or_type_is_caught(path: str, validator: Draft202012Validator):
    right = config()
    assert complaints(validator, right) == []
    assert complaints(validator, merged(deepcopy(right), {path: WRONG[path]})) != []


@pytest.mark.parametrize(
    ("path", "meaning", "default"),
    [
        ("data.global_batch_size", "Units per optimizer step over all devices", 8),
        ("checkpoint.save_top_k", "Checkpoints to keep beside the newest", -1),
        ("trainer.max_steps", "Stop training after this number of steps", -1),
        ("overwrite", "Start afresh in a run folder", False),
    ],
)
def test_an_option_has_its_meaning_and_default(path: str, meaning: str, default: Any, validator: Draft202012Validator):
    found = validator.schema
    for part in path.split("."):
        found = found["properties"][part]
    assert found["description"].startswith(meaning)
    assert found["default"] == default


def test_the_options_of_a_stage_have_their_meaning(validator: Draft202012Validator):
    (sft,) = [
        kind
        for kind in validator.schema["$defs"]["Stage"]["anyOf"]
        if "SFT" in kind.get("properties", {}).get("class_path", {}).get("enum", ())
    ]
    assert (
        sft["description"]
        == "Supervised fine-tuning: the answers of conversations are learned, their prompts are read."
    )
    options = sft["properties"]["init_args"]["properties"]
    assert options["max_grad_norm"]["description"].startswith("Largest global norm of the gradient, > 0")
    assert options["backbone"]["properties"]["dtype"]["enum"] == ["auto", "float32", "bfloat16", "float16", "float64"]
