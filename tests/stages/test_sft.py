"""The losses of the SFT stage: where they start, what each option changes, and how a reference is held."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.cli.runs import INIT, build_model, config, lightning, log_rows, losses, merged, weights

LOG_V = math.log(259)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(name: str, **options: Any) -> dict[str, Any]:
    """A scratch model whose predictions are almost uniform: each loss starts at a value known beforehand."""
    of_stage = {f"{INIT}.{key}": value for key, value in options.items()}
    return config(name, **{"trainer__max_steps": 3, "checkpoint__every_n_steps": None}, **of_stage)


def run(here: Path, name: str, **options: Any) -> list[float]:
    assert lightning("fit", here, settings(name, **options)) == 0
    return losses(here / name)


def test_each_loss_starts_at_its_known_value_and_goes_its_own_way(here: Path):
    found = {
        "cross_entropy": run(here, "cross_entropy"),
        "smoothed": run(here, "smoothed", label_smoothing=0.3),
        "dft": run(here, "dft", loss="dft"),
        "eaft": run(here, "eaft", loss="eaft"),
        "eaft_2": run(here, "eaft_2", loss="eaft", eaft_alpha=2.0),
        "asft": run(here, "asft", loss="asft"),
        "asft_0": run(here, "asft_0", loss="asft", asft_alpha=0.0),
        "asft_9": run(here, "asft_9", loss="asft", asft_alpha=9.0),
    }
    first = {name: values[0] for name, values in found.items()}
    for name in ("cross_entropy", "smoothed"):
        assert first[name] == pytest.approx(LOG_V, rel=0.01)
    for name in ("dft", "asft", "asft_0", "asft_9"):  # the policy is the reference
        assert first[name] == pytest.approx(LOG_V / 259, rel=0.05)
    for name in ("eaft", "eaft_2"):
        assert first[name] == pytest.approx(LOG_V, rel=0.02)
    assert found["asft_0"] == found["dft"], "without a weight the anchor is not there"
    ends = {name: values[-1] for name, values in found.items() if name != "asft_0"}
    assert len(set(ends.values())) == len(ends), "each option changes the result"


def test_perplexity_is_that_of_the_log_likelihood_and_the_divergence_starts_at_zero(here: Path):
    assert lightning("fit", here, settings("asft", loss="asft", asft_alpha=0.5, **{"optimizer.init_args.lr": 0.1})) == 0
    rows = [row for row in log_rows(here / "asft") if "loss" in row]
    for row in rows:
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]), rel=1e-5)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[2]["kl"] > 0.001


def test_the_loss_is_that_of_validation_too(here: Path):
    options = {"data.val_size": 4, "trainer.val_check_interval": 1, "trainer.max_steps": 1}
    for loss, low, high in (("dft", 0.0, 0.1), ("asft", 0.0, 0.1), ("cross_entropy", 5.0, 6.0)):
        name = f"val_{loss}"
        assert lightning("fit", here, merged(settings(name, loss=loss), options)) == 0
        (row,) = [row for row in log_rows(here / name) if "eval_loss" in row]
        assert low < row["eval_loss"] < high, loss


def test_defect_5_asft_of_an_adapter_is_held_near_the_model_without_it(here: Path):
    build_model(here / "model", initializer_range=0.3)
    base = config("lora", here / "model", **{f"{INIT}.loss": "asft", f"{INIT}.asft_alpha": 2.0})
    assert lightning("fit", here, merged(base, {"trainer.max_steps": 3, f"{INIT}.optimizer.init_args.lr": 0.05})) == 0
    rows = [row for row in log_rows(here / "lora") if "loss" in row]
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[2]["kl"] > 0.001
    # another model as the reference: the divergence is there from the first step
    build_model(here / "other", initializer_range=0.5)
    other = merged(base, {"trainer.default_root_dir": "other_run", f"{INIT}.reference": {"path": str(here / "other")}})
    assert lightning("fit", here, other) == 0
    assert next(row for row in log_rows(here / "other_run") if "loss" in row)["kl"] > 0.1


def test_asft_of_a_continued_run_is_held_near_the_model_before_training(here: Path):
    options = {"loss": "asft", "asft_alpha": 1.0}
    straight = settings("straight", **options)
    assert lightning("fit", here, straight) == 0
    first = merged(settings("cut", **options), {"trainer.max_steps": 2, "checkpoint.every_n_steps": 2})
    assert lightning("fit", here, first) == 0
    rest = merged(settings("cut", **options), {"checkpoint.every_n_steps": 2})
    assert lightning("fit", here, rest, "--ckpt_path", "last") == 0
    assert losses(here / "cut") == losses(here / "straight")
    assert weights(here / "cut" / "final") == weights(here / "straight" / "final")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"label_smoothing": 0.3}, id="defect_73_label_smoothing"),
        pytest.param({"loss": "asft", "asft_alpha": 3.0}, id="defect_17_asft"),
    ],
)
def test_accumulation_multiplies_no_loss(here: Path, options: dict[str, Any]):
    whole = run(here, "whole", **options)
    for size in (1, 2):
        parts = merged(settings(f"parts{size}", **options), {"data.micro_batch_size": size, "data.layout": "padded"})
        assert lightning("fit", here, parts) == 0
        assert losses(here / f"parts{size}") == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: must be in [0, 1), got 1.0."),
        ({"loss": "eaft", "eaft_alpha": -1.0}, "eaft_alpha: must be 0 or more, got -1.0."),
        ({"loss": "asft", "asft_alpha": -1.0}, "asft_alpha: must be 0 or more, got -1.0."),
        ({"loss": "dft", "label_smoothing": 0.1}, "label_smoothing: belongs to loss: cross_entropy, got loss: dft."),
        ({"loss": "dft", "eaft_alpha": 2.0}, "eaft_alpha: belongs to loss: eaft, got loss: dft."),
        ({"asft_alpha": 2.0}, "asft_alpha: belongs to loss: asft, got loss: cross_entropy."),
        ({"reference": {"kind": "copy"}}, "reference: belongs to loss: asft, got loss: cross_entropy."),
        (
            {"loss": "asft", "reference": {"precompute": True}},
            "reference.precompute: asft compares whole",
        ),
        ({"loss": "focal"}, "loss"),
    ],
)
def test_what_a_loss_does_not_read_is_refused_in_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any], line: str
):
    assert lightning("fit", here, settings("run", **options)) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert not (here / "run").exists()
