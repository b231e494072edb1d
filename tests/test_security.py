"""Nothing that comes with a model or a dataset runs code or reads elsewhere, and no secret is written."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lf_lightning.data.sources import resolve_sources
from lf_lightning.types import InputError
from tests.cli.runs import ROWS, build_model, config, lightning, write
from tests.house import File, package_files
from tests.stages.rollout_runs import SPREAD, rolled

# ---------------------------------------------------------------------- what the package itself opens


def unsafe_reads(file: File) -> Iterator[str]:
    """Calls of a file that may unpickle what others wrote."""
    for node in file.nodes:
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        loads_model = name.endswith(".from_pretrained") and name.startswith("AutoModel")
        is_unsafe = (
            (name == "torch.load" and given.get("weights_only") != "True")
            or (loads_model and given.get("use_safetensors") != "True")
            or name in ("pickle.load", "pickle.loads", "joblib.load", "yaml.load", "yaml.unsafe_load", "eval", "exec")
            or given.get("allow_pickle") == "True"
        )
        if is_unsafe:
            yield f"{file.path}:{node.lineno}: {name}"


def test_the_package_opens_no_pickle():
    assert [found for file in package_files() for found in unsafe_reads(file)] == []


PLANTED = [
    "torch.load(path)",
    "torch.load(path, weights_only=False)",
    "pickle.loads(text)",
    "np.load(path, allow_pickle=True)",
    "yaml.load(text, Loader=yaml.Loader)",
    "AutoModelForCausalLM.from_pretrained(path)",
    "eval(text)",
]


@pytest.mark.parametrize("call", PLANTED)
def test_a_planted_call_is_found(call: str):
    assert len(list(unsafe_reads(File("models/a.py", call)))) == 1


# ---------------------------------------------------------------------- pickles instead of weights


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as safetensors."""
    return build_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def pickled(model: Path, here: Path) -> Path:
    """The model with its weights as a pickle."""
    folder = here / "pickled"
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


def refused(folder: Path, settings: dict[str, Any], where: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the run ends with one line that names the pickle."""
    capsys.readouterr()
    assert lightning("fit", folder, settings) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"lf-lightning: error: {where}: must hold weights as safetensors, got ")
    assert "a pickle, which may run code" in last


def test_a_backbone_of_pickles_is_refused(pickled: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    refused(here, config(lora=pickled), "model.init_args.backbone.path", capsys)


def test_a_head_beside_a_pickle_makes_no_safe_folder_of_it(
    pickled: Path, here: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copy(next(Path(pickled).glob("*.json")), pickled / "value_head.safetensors")
    refused(here, config(lora=pickled), "model.init_args.backbone.path", capsys)


def test_an_adapter_of_pickles_is_refused(model: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    torch.save({}, here / "adapter" / "adapter_model.bin")
    tuning = {"model__init_args__tuning__init_args": {"adapter": str(here / "adapter")}}
    refused(here, config(lora=model, **tuning), "model.init_args.tuning.init_args.adapter", capsys)


def test_a_reference_of_pickles_is_refused(pickled: Path, model: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    reference = {"model.init_args.reference": {"kind": "model", "path": str(pickled)}}
    settings = rolled("PPO", lora=model, **reference)
    capsys.readouterr()
    assert lightning("fit", here, settings) == 2
    assert "must hold weights as safetensors, got pytorch_model.bin" in capsys.readouterr().err.splitlines()[-1]


def test_a_reward_model_of_pickles_is_refused(pickled: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    settings = json.loads((pickled / "config.json").read_text())
    settings["architectures"] = ["LlamaForSequenceClassification"]
    (pickled / "config.json").write_text(json.dumps(settings))
    reward = {"class_path": "RewardModel", "init_args": {"path": str(pickled)}}
    capsys.readouterr()
    assert lightning("fit", here, rolled("PPO", **{"model.init_args.rewards": [reward]})) == 2
    assert "must hold weights as safetensors, got pytorch_model.bin" in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------- datasets that point elsewhere


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A file beside the folder of datasets, and a link to it inside."""
    path = tmp_path / "private.json"
    path.write_text(json.dumps(ROWS))
    (tmp_path / "data" / "many").mkdir(parents=True)
    (tmp_path / "data" / "link.json").symlink_to(path)
    (tmp_path / "data" / "many" / "part.json").symlink_to(path)
    (tmp_path / "data" / "inner.json").write_text(json.dumps(ROWS))
    (tmp_path / "data" / "alias.json").symlink_to("inner.json")
    return path


def sources(folder: Path, file_name: str, **options: bool) -> Path | None:
    data = folder / "data"
    (data / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": file_name}}))
    return resolve_sources(["mine"], str(data), **options)[0].path


@pytest.mark.parametrize("name", ["../private.json", "many/../../private.json", "link.json", "many", "{absolute}"])
def test_a_dataset_outside_of_its_folder_is_refused_unless_it_is_allowed(name: str, outside: Path, tmp_path: Path):
    name = name.format(absolute=outside)
    with pytest.raises(InputError, match=r"file_name must stay inside .*data\.allow_outside: true"):
        sources(tmp_path, name)
    found = sources(tmp_path, name, allow_outside=True)
    assert found is not None
    assert found.exists()


@pytest.mark.parametrize("name", ["inner.json", "many/../inner.json", "alias.json"])
def test_a_dataset_inside_of_its_folder_is_taken(name: str, outside: Path, tmp_path: Path):
    assert sources(tmp_path, name) == tmp_path / "data" / name


def test_what_the_configuration_itself_names_may_lie_anywhere(outside: Path, tmp_path: Path):
    (source,) = resolve_sources([{"path": str(outside)}], str(tmp_path / "data"))
    assert source.path == outside


def test_the_option_lets_a_run_read_outside(outside: Path, here: Path, capsys: pytest.CaptureFixture[str]):
    (here / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "link.json"}}))
    settings = config(data__datasets=["mine"], trainer__max_steps=1, checkpoint__every_n_steps=None)
    assert lightning("fit", here, settings) == 2
    assert "file_name must stay inside data" in capsys.readouterr().err.splitlines()[-1]
    assert lightning("fit", here, {**settings, "data": {**settings["data"], "allow_outside": True}}) == 0


# ---------------------------------------------------------------------- secrets

SECRETS = {"HF_TOKEN": "hf_planted_1", "WANDB_API_KEY": "planted-2-wandb", "REWARD_TOKEN": "planted3reward"}
RULE = """
import os

def rule(prompts, responses, batch):
    if os.path.exists("run/trainer_log.jsonl"):
        raise RuntimeError("no access with " + " ".join(os.environ[name] for name in {names}))
    return [float(len(response)) for response in responses]
"""


def leaks(folder: Path) -> list[str]:
    """Files in which a secret stands."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    found = [(path, name) for path in files for name, value in SECRETS.items() if value.encode() in path.read_bytes()]
    return [f"{path.relative_to(folder)}: {name}" for path, name in found]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secrets in the environment."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


LOGGERS = [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "run"}}]


def test_no_secret_reaches_the_folder_of_a_run(planted: None, here: Path):
    careless = {"trainer__logger": LOGGERS, "data__datasets": [{"path": "rows.json", "name": SECRETS["HF_TOKEN"]}]}
    assert lightning("fit", here, config(data__val_size=3, **careless)) == 0
    assert leaks(here / "run") == []
    assert "<HF_TOKEN>" in (here / "run" / "config.yaml").read_text()
    assert "<HF_TOKEN>" in (here / "run" / "final" / "README.md").read_text()


def test_no_secret_reaches_the_folder_of_a_run_that_failed(
    planted: None, here: Path, capsys: pytest.CaptureFixture[str]
):
    (here / "rule.py").write_text(RULE.replace("{names}", repr(list(SECRETS))))
    reward = {"class_path": "RewardFunction", "init_args": {"function": "rule.py:rule"}}
    settings = rolled("PPO", trainer__max_steps=8, **{"model.init_args.rewards": [SPREAD, reward]})
    assert lightning("fit", here, {**settings, "trainer": {**settings["trainer"], "logger": LOGGERS}}) == 1
    bundle = here / "run" / "debug" / "step-00000005"
    assert f"What it was doing is in {bundle.relative_to(here)}." in capsys.readouterr().err.splitlines()[-1]
    assert "<REWARD_TOKEN>" in (bundle / "traceback.txt").read_text()
    assert len(json.loads((bundle / "rows.json").read_text())) == 6
    assert leaks(here / "run") == []


def test_an_address_with_a_password_is_refused(here: Path, capsys: pytest.CaptureFixture[str]):
    reward = {"class_path": "RewardService", "init_args": {"url": "http://me:planted@localhost:1/"}}
    write(here, {})
    assert lightning("fit", here, rolled("PPO", **{"model.init_args.rewards": [reward]})) == 2
    told = capsys.readouterr().err
    assert "must hold no password, got http://***@localhost:1/" in told.splitlines()[-1]
    assert "planted" not in told
