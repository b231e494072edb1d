"""The KTO stage: it starts at 0.5, each option changes the result, and it says what its data cannot give it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lf_lightning import LoRA
from lf_lightning.__main__ import main
from lf_lightning.models import Full
from tests.cli.runs import INIT, build_model, log_rows, losses, weights
from tests.stages.judgement_runs import FEEDBACK, dataset, first_losses, fit, python_fit

Runs = Callable[..., list[float]]


def init(**options: Any) -> dict[str, Any]:
    return {f"{INIT}.{name}": value for name, value in options.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The losses of four steps, whose rows are 8 liked and 4 not; a run is made once."""
    found: dict[str, list[float]] = {}

    def run(**changes: Any) -> list[float]:
        key = repr(sorted(changes.items()))
        if key not in found:
            folder = tmp_path_factory.mktemp("run")
            found[key] = first_losses(folder, "KTO", **{"trainer__max_steps": 4, **changes})
        return found[key]

    return run


def test_the_loss_starts_at_half_the_mean_weight(runs: Runs):
    assert runs()[0] == pytest.approx(0.5, abs=1e-6)
    assert runs(**init(loss="apo_zero_unpaired"))[0] == pytest.approx(0.5, abs=1e-6)
    heavy = runs(**init(desirable_weight=1.5))  # 3 of the first 4 rows are liked
    assert heavy[0] == pytest.approx(0.6875, abs=1e-6)  # (3 * 1.5 + 1) / 4 / 2
    assert runs(**init(undesirable_weight=3.0))[0] == pytest.approx(0.75, abs=1e-6)


def test_learning_the_liked_responses_adds_their_mean_log_prob_over_all_rows(runs: Runs):
    without, one, two = (runs(**init(ftx=weight))[0] for weight in (0.0, 1.0, 2.0))
    assert one - without == pytest.approx(0.75 * 5.55, abs=0.1)  # 3 of 4 rows, each about log 259
    assert two - without == pytest.approx(2 * (one - without), rel=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        init(loss="apo_zero_unpaired"),
        init(beta=0.5),
        init(desirable_weight=1.5),
        init(undesirable_weight=1.5),
        init(ftx=0.2),
        {"data__kl_pairs": "dataset"},
        {"data__shuffle": True},
    ],
    ids=str,
)
def test_an_option_changes_what_is_learned(changed: dict[str, Any], runs: Runs):
    assert runs(**changed)[3] != pytest.approx(runs()[3], abs=1e-5)  # where the kl is no longer 0


def test_a_shared_prompt_changes_nothing_but_the_tokens(runs: Runs):
    assert runs(data__share_prompt=False) == pytest.approx(runs(data__share_prompt=True), abs=1e-5)
    assert runs(data__layout="padded", data__micro_batch_size=1) == pytest.approx(runs(), abs=1e-5)


def test_the_log_has_a_kl_where_the_loss_has_one_and_nothing_of_an_absent_side(tmp_path: Path):
    (tmp_path / "kl").mkdir()
    rows = log_rows(fit(tmp_path / "kl", "KTO"))
    assert all(row["kl"] >= 0 for row in rows)
    assert rows[-1]["kl"] > 0.1
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "entropy"}
    assert names <= rows[-1].keys()
    liked = dataset(tmp_path, "KTO", rows=[row for row in FEEDBACK if row["liked"]])
    row = log_rows(fit(tmp_path, "KTO", data__datasets=liked, **init(loss="apo_zero_unpaired")))[-1]
    assert "kl" not in row
    assert row["rewards/chosen"] > 0
    assert row.get("rewards/rejected") is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "8 liked / (undesirable_weight x 4 disliked) is 2.00, the paper's eq. 8 asks for 1 to 1.33"),
        (init(desirable_weight=0.6), None),
        (init(undesirable_weight=1.5), None),
        (init(undesirable_weight=2.5), "is 0.80, the paper's eq. 8"),
    ],
    ids=str,
)
def test_weights_outside_the_papers_range_are_named(
    options: dict[str, Any], says: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fit(tmp_path, "KTO", trainer__max_steps=1, **options)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("KTO: ")]
    assert len(lines) == (1 if says else 0)
    assert (says or "") in "".join(lines)


def test_a_step_of_one_row_has_no_kl_and_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = fit(tmp_path, "KTO", data__global_batch_size=1)
    said = capsys.readouterr().err
    assert said.count("a step of one row has no mismatched pair, so its kl is 0") == 1
    assert [row["kl"] for row in log_rows(run)] == [0.0] * 4
    alone = dataset(tmp_path, "KTO", rows=FEEDBACK[:1])
    fit(tmp_path, "KTO", "alone", data__datasets=alone, trainer__max_steps=2)
    said = capsys.readouterr().err
    assert said.count("a step of one row") == 1
    assert "no disliked row among 1" in said


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_from_python_is_the_command_lines_bit_for_bit(kind: str, tmp_path: Path):
    base = build_model(tmp_path / "model") if kind == "lora" else None
    options = {"beta": 0.2, "desirable_weight": 0.6, "ftx": 0.1}
    run = fit(tmp_path, "KTO", lora=base, **init(**options))
    python_fit(tmp_path, "KTO", LoRA(rank=2) if base else Full(), lora=base, **options)
    assert weights(tmp_path / "python" / "final") == weights(run / "final")
    assert losses(tmp_path / "python") == losses(run)
    again = ["--config", str(tmp_path / "python/config.yaml"), "--trainer.default_root_dir", str(tmp_path / "again")]
    assert main(["fit", *again]) == 0
    assert weights(tmp_path / "again" / "final") == weights(run / "final")
