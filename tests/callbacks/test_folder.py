"""A folder is whole or absent, and a checkpoint is a folder with a manifest that fits."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lf_lightning.callbacks import folder as folders
from lf_lightning.callbacks.folder import (
    advice,
    check_whole,
    complete_checkpoints,
    hidden_folder,
    last_checkpoint,
    name_folder,
    put_back,
    remove_checkpoint,
    step_of,
    sync_folder,
)
from lf_lightning.callbacks.saving import Saving
from lf_lightning.types import InputError


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a folder as a save does."""
    hidden = hidden_folder(target)
    hidden.mkdir(parents=True)
    yield hidden
    sync_folder(hidden)
    name_folder(hidden, target)


def make(path: Path, *, manifest: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"abc")
    (path / "trainer_state").mkdir()
    (path / "trainer_state" / "state.ckpt").write_bytes(b"")
    if manifest:
        sync_folder(path)
    return path


def test_the_manifest_lists_files_of_inner_folders_with_size_and_hash(tmp_path: Path):
    found = json.loads((make(tmp_path / "a") / "manifest.json").read_text())
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert found == {
        "files": {
            "trainer_state/state.ckpt": {"size": 0, "sha256": nothing},
            "weights": {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()},
        }
    }


def test_a_folder_has_no_name_until_it_is_whole(tmp_path: Path):
    target = tmp_path / "final"
    with whole_folder(target) as hidden:
        (hidden / "weights").write_text("new")
        assert hidden.name == ".final.tmp"
        assert not target.exists()
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def fail_half_way(target: Path) -> None:
    with whole_folder(target) as hidden:
        (hidden / "weights").write_text("half")
        raise OSError("disk full")


def test_a_folder_that_fails_leaves_the_old_one_as_it_was(tmp_path: Path):
    target = make(tmp_path / "final")
    with pytest.raises(OSError, match="disk full"):
        fail_half_way(target)
    check_whole(target)
    assert (target / "weights").read_bytes() == b"abc"


def test_a_folder_takes_the_place_of_the_old_one(tmp_path: Path):
    target = make(tmp_path / "final")
    with whole_folder(target) as hidden:
        (hidden / "other").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_an_earlier_attempt_left_is_not_mixed_in(tmp_path: Path):
    make(tmp_path / ".final.tmp")
    (tmp_path / "config.yaml").write_text("")
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path)
    saving = Saving(trainer, tmp_path / "final")
    saving.begin(with_state=False)
    (saving.folder / "other").write_text("new")
    saving.finish(lambda: None)
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == ["manifest.json", "other"]


def test_a_final_folder_that_a_crash_caught_between_two_names_comes_back(tmp_path: Path):
    old = make(tmp_path / ".final.old")
    put_back(tmp_path / "final")
    check_whole(tmp_path / "final")
    assert not old.exists()
    make(old)
    put_back(tmp_path / "final")  # the new one is there already
    assert old.exists()


def test_files_are_synced_before_the_manifest_and_the_manifest_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []
    monkeypatch.setattr(folders, "_sync", lambda path: done.append(path.name))
    rename = Path.rename

    def noted_rename(self: Path, target: Path) -> Path:
        done.append(f"{self.name} -> {Path(target).name}")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted_rename)
    with whole_folder(tmp_path / "final") as hidden:
        (hidden / "inner").mkdir()
        (hidden / "inner" / "a").write_text("a")
    assert done == ["a", "inner", "manifest.json", ".final.tmp", ".final.tmp -> final", tmp_path.name]


@pytest.mark.parametrize(
    ("name", "step"),
    [("step-00000500", 500), ("step-123456789", 123456789), ("step-", None), ("step-5a", None), (".step-5", None)],
)
def test_the_step_of_a_name(name: str, step: int | None):
    assert step_of(Path(name)) == step


def test_checkpoints_are_those_with_a_manifest_in_the_order_of_their_steps(tmp_path: Path):
    for name in ("step-00000010", "step-00000009", "step-100000000"):
        make(tmp_path / "checkpoints" / name)
    make(tmp_path / "checkpoints" / "step-00000011", manifest=False)
    make(tmp_path / "checkpoints" / ".step-00000012.tmp")
    make(tmp_path / "checkpoints" / "step-best")
    found = complete_checkpoints(tmp_path)
    assert [path.name for path in found] == ["step-00000009", "step-00000010", "step-100000000"]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints/step-100000000/trainer_state/state.ckpt"


def test_without_checkpoints_there_is_no_last_one(tmp_path: Path):
    assert complete_checkpoints(tmp_path) == []
    assert last_checkpoint(tmp_path / "absent") is None


def test_the_manifest_is_the_first_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = make(tmp_path / "step-00000001")
    seen: list[bool] = []
    rmtree = shutil.rmtree

    def watched(folder: Path, **options: bool) -> None:
        seen.append((folder / "manifest.json").exists())
        rmtree(folder, **options)

    monkeypatch.setattr(folders.shutil, "rmtree", watched)
    remove_checkpoint(path)
    assert seen == [False]
    assert not path.exists()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda path: (path / "manifest.json").unlink(),
            "must be a complete checkpoint, got one without manifest.json",
        ),
        (lambda path: (path / "weights").unlink(), "weights: must have 3 bytes, got no file"),
        (lambda path: (path / "weights").write_bytes(b"ab"), "weights: must have 3 bytes, got 2"),
        (lambda path: (path / "weights").write_bytes(b"abd"), "weights: must be as it was saved, got other bytes"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"wei'), "manifest.json: must list names, sizes"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"weights": 3}}'), "must list names, sizes"),
    ],
)
def test_a_checkpoint_that_was_harmed_is_refused(harm, message: str, tmp_path: Path):
    path = make(tmp_path / "step-00000001")
    check_whole(path)
    harm(path)
    with pytest.raises(InputError, match=message):
        check_whole(path)


def test_the_last_checkpoint_is_the_newest_whole_one_and_the_others_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for step in range(1, 6):
        make(tmp_path / "checkpoints" / f"step-{step:08d}", manifest=step != 5)
    (tmp_path / "checkpoints/step-00000003/weights").write_bytes(b"abd")
    (tmp_path / "checkpoints/step-00000004/trainer_state/state.ckpt").unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints/step-00000002/trainer_state/state.ckpt"
    five, four, three = capsys.readouterr().err.splitlines()
    folder = f"{tmp_path}/checkpoints"
    assert five == f"skipped {folder}/step-00000005: must be a complete checkpoint, got one without manifest.json"
    assert four == f"skipped {folder}/step-00000004/trainer_state/state.ckpt: must have 0 bytes, got no file"
    assert three == f"skipped {folder}/step-00000003/weights: must be as it was saved, got other bytes"


def test_a_whole_folder_without_a_state_is_no_checkpoint_to_continue(tmp_path: Path):
    path = make(tmp_path / "checkpoints" / "step-00000001")
    shutil.rmtree(path / "trainer_state")
    sync_folder(path)
    assert last_checkpoint(tmp_path) is None


def test_what_to_do_names_the_last_good_checkpoint(tmp_path: Path):
    assert advice(tmp_path).startswith("There is no checkpoint yet.")
    make(tmp_path / "checkpoints" / "step-00000001")
    assert advice(tmp_path).startswith(f"The last good checkpoint is {tmp_path}/checkpoints/step-00000001. ")
