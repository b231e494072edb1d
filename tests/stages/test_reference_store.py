"""Reference log-probs on disk: computed once, taken where they fit, refused where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch import Trainer

from lf_lightning.models import Full, LoRA, Reference, ReferenceSpec
from lf_lightning.stages import reference_store
from tests.cli.runs import INIT, build_model, lightning, losses, weights
from tests.stages.judgement_runs import dataset, fit, judged, python_fit

STORED = {f"{INIT}.reference": {"precompute": True}}
ARCHITECTURE = f"{INIT}.backbone.architecture"


def init(**options: Any) -> dict[str, Any]:
    return {f"{INIT}.{name}": value for name, value in options.items()}


def stored_fit(folder: Path, stage: str, run: str, **changes: Any) -> Path:
    own = {"data__cache_dir": str(folder / "cache"), "checkpoint__every_n_steps": None}
    return fit(folder, stage, run, **{**STORED, **own, **changes})


def tables(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "reference").glob("*/*.npy"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cache of a DPO run of four steps."""
    folder = tmp_path_factory.mktemp("filled")
    stored_fit(folder, "DPO", "run")
    return folder


def num_computed(capsys: pytest.CaptureFixture[str]) -> list[int]:
    """How many log-probs each table of the last run lacked."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reference log-probs of ")]
    return [int(line.split(": ")[1].split()[0]) for line in lines]


# ---------------------------------------------------------------------- the same numbers


def test_stored_log_probs_train_as_those_computed_on_the_way(filled: Path):
    online = fit(filled, "DPO", "online")
    assert losses(filled / "run") == pytest.approx(losses(online), rel=1e-6)
    (path,) = tables(filled)
    table = np.load(path)
    assert table.shape == (12, 4)  # chosen and rejected, whole and front
    assert (table < 0).all()


@pytest.mark.parametrize("kl_pairs", ["step", "dataset"])
def test_kto_has_a_table_for_each_way_to_pair_rows(kl_pairs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = {"trainer__max_steps": 7, "data__kl_pairs": kl_pairs}  # three epochs of three steps, shuffled anew
    run = stored_fit(tmp_path, "KTO", "run", **changes)
    assert num_computed(capsys) == ([12, 12, 12] if kl_pairs == "step" else [12])
    assert len(tables(tmp_path)) == (3 if kl_pairs == "step" else 1)
    online = fit(tmp_path, "KTO", "online", **changes)
    assert losses(run) == pytest.approx(losses(online), abs=1e-6)
    capsys.readouterr()
    stored_fit(tmp_path, "KTO", "again", **changes, **init(beta=0.3))
    assert set(num_computed(capsys)) == {0}


def test_a_limit_of_steps_an_epoch_makes_more_epochs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stored_fit(tmp_path, "KTO", "run", trainer__limit_train_batches=1, trainer__max_steps=4)
    assert num_computed(capsys) == [12, 12, 12, 12]


@pytest.mark.parametrize("stage", ["DPO", "KTO"])
def test_validate_and_test_take_stored_log_probs_too(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import json

    run = stored_fit(tmp_path, stage, "run", trainer__max_steps=2)
    rows = {"data__eval_datasets": dataset(tmp_path, stage), "data__test_datasets": dataset(tmp_path, stage)}
    found = []
    for verb, stored in (("validate", {}), ("validate", STORED), ("test", STORED)):
        settings = judged(tmp_path, stage, **rows, **stored, data__cache_dir=str(tmp_path / "cache"))
        capsys.readouterr()
        assert lightning(verb, tmp_path, settings, "--ckpt_path", str(run / "final")) == 0
        results = json.loads((run / "all_results.json").read_text())
        prefix = {"validate": "eval_", "test": "test_"}[verb]
        found.append({name.removeprefix(prefix): value for name, value in results.items() if name.startswith(prefix)})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name in found[0].keys() - {"weights"}:
        assert found[1][name] == pytest.approx(found[0][name], abs=1e-5)
        assert found[2][name] == found[1][name]


# ---------------------------------------------------------------------- when they are taken


def test_beta_loss_learning_rate_and_layout_take_what_is_there(filled: Path, capsys: pytest.CaptureFixture[str]):
    betas = [losses(stored_fit(filled, "DPO", "beta", **init(beta=beta), trainer__max_steps=2)) for beta in (0.1, 0.5)]
    assert betas[0][0] == betas[1][0]
    assert betas[0][1] != betas[1][1]
    for changes in (
        init(loss="ipo"),
        init(ld_alpha=0.5),
        {"data__layout": "padded"},
        {"data__shuffle": False, "data__global_batch_size": 3},
        {f"{INIT}.optimizer.init_args.lr": 1e-4},
    ):
        stored_fit(filled, "DPO", "other", **changes, trainer__max_steps=1)
    assert num_computed(capsys) == [0] * 7


@pytest.mark.parametrize(
    "changes",
    [
        {"seed_everything": 8},  # other weights
        {f"{ARCHITECTURE}.rope_theta": 50.0},  # the same weights, which act otherwise
        {f"{ARCHITECTURE}.num_attention_heads": 4},
        {f"{ARCHITECTURE}.rms_norm_eps": 0.1},
        {"data__max_length": 60},
        {"data__template": "default"},
        {"data__max_samples": 9},
        init(reference={"precompute": True, "dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_another_reference_or_other_data_has_a_file_of_its_own(
    changes: dict[str, Any], filled: Path, capsys: pytest.CaptureFixture[str]
):
    before = set(tables(filled))
    stored_fit(filled, "DPO", "other", **changes, trainer__max_steps=1)
    assert num_computed(capsys) in ([12], [9])
    assert len(set(tables(filled)) - before) == 1


def test_the_same_reference_held_in_another_way_takes_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = build_model(tmp_path / "model")
    for number, kind in enumerate(("adapters_off", "copy")):
        stored_fit(tmp_path, "DPO", kind, lora=model, **init(reference={"kind": kind, "precompute": True}))
        assert num_computed(capsys) == [12 if number == 0 else 0]
    assert losses(tmp_path / "copy") == losses(tmp_path / "adapters_off")


def test_without_a_cache_they_are_computed_for_the_run_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], filled: Path
):
    run = fit(tmp_path, "DPO", **STORED)
    assert num_computed(capsys) == [12]
    assert not list(tmp_path.rglob("*.npy"))
    assert weights(run / "final") == weights(filled / "run" / "final")


# ---------------------------------------------------------------------- interruptions and damage


class Killed(BaseException):
    """Stands for a kill: nobody may catch it."""


@pytest.mark.parametrize("stage", ["DPO", "KTO"])
def test_an_interrupted_pass_goes_on_where_it_was_saved(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(reference_store, "SAVE_EVERY", 2)
    plain, left = Reference.forward, 5

    def forward(self: Reference, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return plain(self, *arguments, **options)

    changes = {"data__eval_micro_batch_size": 1, "data__kl_pairs": "dataset" if stage == "KTO" else "step"}
    with monkeypatch.context() as patch:
        patch.setattr(Reference, "forward", forward)
        with pytest.raises(Killed):
            stored_fit(tmp_path, stage, "run", **changes)
    (path,) = tables(tmp_path)
    assert np.isfinite(np.load(path)).all(axis=1).sum() == 4  # of five that were computed
    capsys.readouterr()
    run = stored_fit(tmp_path, stage, "run", **changes)
    assert num_computed(capsys) == [8]
    straight = fit(tmp_path, stage, "straight", **changes, **STORED)
    assert weights(run / "final") == weights(straight / "final")
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def changed(path: Path) -> None:
    table = np.load(path)
    table[0] += 1.0
    np.save(path, table)


DAMAGE = {
    "other numbers": (changed, "where the reference gives"),
    "nothing": (lambda path: path.write_bytes(b""), "that cannot be read"),
    "no array": (lambda path: path.write_bytes(b"nonsense"), "that cannot be read"),
    "half of it": (lambda path: path.write_bytes(path.read_bytes()[:200]), "that cannot be read"),
    "another shape": (lambda path: np.save(path, np.zeros((3, 4))), "of shape (12, 4), got float64 of shape (3, 4)"),
    "texts": (lambda path: np.save(path, np.full((12, 4), "a")), "must hold float64"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(kind: str, filled: Path, capsys: pytest.CaptureFixture[str]):
    damage, says = DAMAGE[kind]
    path = next(path for path in tables(filled) if np.load(path).shape == (12, 4))
    before = {each: each.read_bytes() for each in tables(filled)}
    try:
        for each in before:
            damage(each)
        settings = judged(filled, "DPO", "other", **STORED, data__cache_dir=str(filled / "cache"))
        capsys.readouterr()
        assert lightning("fit", filled, settings) == 2
    finally:
        for each, content in before.items():
            each.write_bytes(content)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"lf-lightning: error: {path.parent.parent}")
    assert says in last
    assert "Remove " in last
    assert "unsafely" not in last


# ---------------------------------------------------------------------- what training holds


def test_training_holds_no_reference(tmp_path: Path):
    precompute = ReferenceSpec(precompute=True)
    stage, _ = python_fit(tmp_path, "DPO", Full(), reference=precompute, trainer_max_steps=1)
    assert stage.held.model is None
    model = build_model(tmp_path / "model")
    adapted, _ = python_fit(
        tmp_path, "DPO", LoRA(rank=2), lora=model, reference=precompute, trainer_max_steps=1, trainer_logger=False
    )
    assert adapted.companions == []


def test_loaders_without_a_datamodule_are_refused(tmp_path: Path):
    from lightning.pytorch import seed_everything

    from lf_lightning import DPO, BackboneSpec, DataModule, InputError
    from tests.cli.runs import LLAMA

    seed_everything(7)
    backbone = BackboneSpec(architecture=dict(LLAMA, vocab_size=259), tokenizer="bytes")
    data = DataModule(backbone, "dpo", datasets=dataset(tmp_path, "DPO"), max_length=96, cache_dir=None)
    loader = [data.train_dataloader()]
    stage = DPO(backbone, Full(), reference=ReferenceSpec(precompute=True))
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(InputError, match="precompute: needs the DataModule"):
        trainer.fit(stage, loader[0])
