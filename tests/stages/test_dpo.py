"""The DPO stage: losses start at their known values, options change results, references are the right ones."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lf_lightning import DataModule, InputError, LoRA
from lf_lightning.__main__ import main
from lf_lightning.models import Backbone, Full, ReferenceSpec
from lf_lightning.stages.dpo import DPO, PreferenceConstants
from lf_lightning.types import BackboneSpec
from tests.cli.runs import INIT, LLAMA, build_model, log_rows, losses, weights
from tests.stages.judgement_runs import dataset, first_losses, first_rows, fit, python_fit

Runs = Callable[..., list[float]]
LOG_2 = math.log(2)
STEP_0 = {  # policy = reference, beta 0.1
    "sigmoid": 0.693147,
    "hinge": 1.0,
    "ipo": 25.0,  # 1 / (2 beta)^2
    "kto_pair": 0.5,
    "robust": 0.693147,
    "exo_pair": 2.761231,  # 0.5 log(0.5 / 0.999) + 0.5 log(0.5 / 0.001)
    "nca_pair": 1.386294,
    "bco_pair": 1.386294,
    "sppo_hard": 50.0,  # 2 (0.5 / beta)^2
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.846574,  # (log 2 + 1) / 2
    "sigmoid_norm": 0.693147,
}


def init(**options: Any) -> dict[str, Any]:
    return {f"{INIT}.{name}": value for name, value in options.items()}


def named(loss: str) -> dict[str, Any]:
    return init(loss=loss)


def lora(**options: Any) -> dict[str, Any]:
    return init(tuning={"class_path": "LoRA", "init_args": options})


@pytest.fixture(scope="module")
def norms() -> dict[str, float]:
    """Loss -> norm of its gradient at the second step, where policy and reference differ."""
    return {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, norms: dict[str, float]) -> Runs:
    """The losses of two steps with these values; a run is made once."""
    found: dict[str, list[float]] = {}

    def run(**changes: Any) -> list[float]:
        key = repr(sorted(changes.items()))
        if key not in found:
            folder = tmp_path_factory.mktemp("run")
            by_name = [*changes] == [f"{INIT}.loss"]
            rows = first_rows(folder, "DPO", through_cli=by_name, **changes)
            found[key] = [row["loss"] for row in rows]
            if by_name:
                norms[changes[f"{INIT}.loss"]] = rows[1]["grad_norm"]
        return found[key]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model: Path) -> str:
    """An adapter that has learned something, with a dropout of its own."""
    changes = lora(rank=2, dropout=0.2)
    return str(fit(tmp_path_factory.mktemp("adapter"), "DPO", lora=model, trainer__max_steps=8, **changes) / "final")


# ---------------------------------------------------------------------- losses and their options


@pytest.mark.parametrize("loss", STEP_0)
def test_a_loss_starts_at_its_known_value(loss: str, runs: Runs):
    assert runs(**named(loss))[0] == pytest.approx(STEP_0[loss], rel=1e-5)


def test_no_loss_trains_sigmoid_under_another_name(runs: Runs, norms: dict[str, float]):
    for loss in ("sigmoid", "orpo", "simpo", *STEP_0):
        runs(**named(loss))
    same = [loss for loss in norms if loss != "sigmoid" and norms[loss] == pytest.approx(norms["sigmoid"], rel=1e-3)]
    assert same == []
    assert len(norms) == 15


def test_the_bco_mix_starts_at_its_known_value(runs: Runs):
    assert runs(**init(bco_weight=0.5))[0] == pytest.approx(0.924196, rel=1e-5)  # (log 2 + 0.5 * 2 log 2) / 1.5
    assert runs(**init(bco_weight=2.0))[0] == pytest.approx(1.155245, rel=1e-5)


def test_learning_the_chosen_response_adds_its_mean_log_prob(runs: Runs):
    without, one, two = (runs(**init(ftx=weight))[0] for weight in (0.0, 1.0, 2.0))
    assert 5.0 < one - without < 6.2  # about log 259, of a model that knows nothing
    assert two - without == pytest.approx(2 * (one - without), rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "beside"),
    [
        ({"beta": 0.3}, {}),
        ({"ftx": 0.5}, {}),
        ({"bco_weight": 0.5}, {}),
        ({"ld_alpha": 0.0}, {}),
        ({"ld_alpha": 0.5}, {"loss": "ipo"}),
        ({"constants": {"label_smoothing": 0.2}}, {}),
        ({"constants": {"label_smoothing": 0.2}}, {"loss": "exo_pair"}),
        ({"constants": {"simpo_gamma": 1.5}}, {"loss": "simpo"}),
        ({"constants": {"discopop_tau": 0.5}}, {"loss": "discopop"}),
        ({"beta": 0.3}, {"loss": "orpo"}),
    ],
    ids=str,
)
def test_an_option_changes_what_is_learned(changed: dict[str, Any], beside: dict[str, Any], runs: Runs):
    assert runs(**init(**beside, **changed))[1] != pytest.approx(runs(**init(**beside))[1], rel=1e-5)


def test_a_shared_prompt_changes_the_tokens_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found, tokens = [], []
    for share in (True, False):
        folder = tmp_path / str(share)
        folder.mkdir()
        found.append(first_losses(folder, "DPO", data__share_prompt=share))
        tokens.append(log_rows(folder / "run")[-1]["total_tokens"])
        assert "train: 12 units of " + ("711" if share else "1,142") in capsys.readouterr().err
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert tokens[0] < tokens[1]


@pytest.mark.parametrize("loss", ["robust", "exo_pair"])
def test_a_loss_that_label_smoothing_makes_is_refused_without(loss: Any):
    with pytest.raises(InputError, match=f"constants.label_smoothing: must be above 0 for {loss}"):
        DPO(BackboneSpec(path="x"), loss=loss, constants=PreferenceConstants(label_smoothing=0.0))


# ---------------------------------------------------------------------- references


def test_a_continued_adapter_is_held_against_what_it_was(runs: Runs, model: Path, adapter: str):
    clean = without_dropout(adapter)
    plain = runs(lora=model, **lora(adapter=clean))
    assert plain[0] == pytest.approx(LOG_2, abs=1e-6)
    assert runs(lora=model, **lora(adapter=clean), **init(reference={"kind": "snapshot"})) == plain
    assert runs(lora=model, **lora(adapter=clean), **init(reference={"kind": "copy"})) == plain
    off = runs(lora=model, **lora(adapter=clean), **init(reference={"kind": "adapters_off"}))
    assert off[0] != pytest.approx(LOG_2, abs=1e-3)
    given = {"path": str(model)}
    assert runs(lora=model, **lora(adapter=clean), **init(reference=given)) == off
    with_adapter = runs(lora=model, **lora(adapter=clean), **init(reference={**given, "adapter": clean}))
    assert with_adapter == pytest.approx(plain, abs=1e-6)
    rounded = runs(lora=model, **lora(adapter=clean), **init(reference={**given, "dtype": "bfloat16"}))
    assert rounded != off
    assert rounded == pytest.approx(off, rel=1e-2)


def without_dropout(adapter: str) -> str:
    """The same adapter without dropout."""
    folder = Path(adapter).parent / "clean"
    if not folder.exists():
        shutil.copytree(adapter, folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "lora_dropout": 0.0}))
    return str(folder)


def test_a_copy_in_another_type_is_another_reference(runs: Runs, model: Path):
    full = init(tuning={"class_path": "Full"})
    plain = runs(lora=model, **full)
    rounded = runs(lora=model, **full, **init(reference={"dtype": "bfloat16"}))
    assert plain[0] == pytest.approx(LOG_2, abs=1e-7)
    assert 0 < abs(rounded[0] - LOG_2) < 1e-3


def num_backbones() -> int:
    gc.collect()
    return sum(isinstance(each, Backbone) for each in gc.get_objects())


@pytest.mark.parametrize(
    ("options", "num_models"),
    [({}, 2), ({"loss": "simpo"}, 1), ({"loss": "orpo"}, 1), ({"reference": ReferenceSpec(precompute=True)}, 1)],
    ids=str,
)
def test_a_second_model_is_held_only_where_a_full_policy_needs_one(
    options: dict[str, Any], num_models: int, tmp_path: Path
):
    before = num_backbones()
    stage, _ = python_fit(tmp_path, "DPO", Full(), trainer_max_steps=1, **options)
    assert num_backbones() - before == num_models
    assert (stage.held.model is not None) == (num_models == 2)
    assert stage.backbone.num_parameters() == (12720, 12720)
    assert sum(parameter.numel() for parameter in stage.parameters()) == 12720  # the reference is no part of it


def test_an_adapter_needs_no_second_model(tmp_path: Path, model: Path):
    stage, _ = python_fit(tmp_path, "DPO", LoRA(rank=2), lora=model, trainer_max_steps=1)
    assert stage.companions == []
    assert stage.backbone.num_parameters() == (992, 13712)


def test_prediction_loads_no_reference(tmp_path: Path):
    before = num_backbones()
    backbone = BackboneSpec(architecture=dict(LLAMA), tokenizer="bytes")
    stage = DPO(backbone, Full())
    rows = dataset(tmp_path, "DPO")
    data = DataModule(backbone, "dpo", predict_datasets=rows, cache_dir=None, max_samples=2, max_length=96)
    Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False).predict(
        stage, data, return_predictions=False
    )
    assert num_backbones() - before == 1


# ---------------------------------------------------------------------- dropout


def test_the_models_own_dropout_is_off_beside_a_reference_and_on_without_one(runs: Runs):
    dropout = {f"{INIT}.backbone.architecture.attention_dropout": 0.5}
    assert runs(**dropout) == runs()
    assert runs(**dropout, **init(loss="simpo")) != runs(**init(loss="simpo"))


def test_dropout_of_an_adapter_acts_in_training_and_not_in_the_reference(tmp_path: Path, model: Path, adapter: str):
    cache = str(tmp_path / "cache")
    with_dropout = fit(
        tmp_path,
        "DPO",
        "first",
        lora=model,
        data__cache_dir=cache,
        **lora(adapter=adapter),
        **init(reference={"precompute": True}),
    )
    files = list(Path(cache).glob("reference/*/pairs.npy"))
    assert len(files) == 1
    before = files[0].read_bytes()
    without = fit(
        tmp_path,
        "DPO",
        "second",
        lora=model,
        data__cache_dir=cache,
        **lora(adapter=without_dropout(adapter)),
        **init(reference={"precompute": True}),
    )
    assert losses(without)[0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses(with_dropout)[0] != pytest.approx(LOG_2, abs=1e-5)
    assert [path.read_bytes() for path in Path(cache).glob("reference/*/pairs.npy")] == [before]


# ---------------------------------------------------------------------- from plain Python


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_from_python_is_the_command_lines_bit_for_bit(kind: str, tmp_path: Path, model: Path):
    base = model if kind == "lora" else None
    options = {"loss": "sigmoid", "beta": 0.2, "bco_weight": 0.3, "ftx": 0.1}
    run = fit(tmp_path, "DPO", lora=base, **init(**options))
    python_fit(tmp_path, "DPO", LoRA(rank=2) if base else Full(), lora=base, **options)
    assert weights(tmp_path / "python" / "final") == weights(run / "final")
    assert losses(tmp_path / "python") == losses(run)
    again = ["--config", str(tmp_path / "python/config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")]
    assert main(["fit", *again]) == 0
    assert weights(tmp_path / "again" / "final") == weights(run / "final")


def test_the_bco_baseline_is_a_mean_of_what_was_seen_in_training(tmp_path: Path):
    stage, _ = python_fit(tmp_path, "DPO", Full(), bco_weight=0.5, trainer_val_check_interval=1, data_val_size=3)
    assert stage.memory["bco_steps"] == 4  # validation adds none
    assert stage.memory["bco_sum"] > 0


def test_the_metrics_have_the_names_that_llamafactory_gives_them(tmp_path: Path):
    row = log_rows(fit(tmp_path, "DPO", trainer__max_steps=1))[0]
    names = {f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")}
    names |= {"rewards/accuracies", "rewards/margins", "entropy", "token_accuracy", "loss"}
    assert names <= row.keys()
    assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/margins"] == 0.0
    assert row["entropy"] == pytest.approx(math.log(259), abs=0.02)
