"""A folder is whole or absent, and a checkpoint is a folder with a manifest that fits."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from lf_lightning.callbacks import folder as folders
from lf_lightning.callbacks.folder import (
    check_whole,
    complete_checkpoints,
    last_checkpoint,
    remove_checkpoint,
    step_of,
    whole_folder,
    write_manifest,
)
from lf_lightning.types import InputError


def make(path: Path, *, manifest: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"abc")
    (path / "trainer_state").mkdir()
    (path / "trainer_state" / "state.ckpt").write_bytes(b"")
    if manifest:
        write_manifest(path)
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
    with whole_folder(target, writes=True) as hidden:
        (hidden / "weights").write_text("new")
        assert hidden.name == ".final.tmp"
        assert not target.exists()
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def fail_half_way(target: Path) -> None:
    with whole_folder(target, writes=True) as hidden:
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
    with whole_folder(target, writes=True) as hidden:
        (hidden / "other").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "other"]
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_an_earlier_attempt_left_is_not_mixed_in(tmp_path: Path):
    make(tmp_path / ".final.tmp")
    with whole_folder(tmp_path / "final", writes=True) as hidden:
        (hidden / "other").write_text("new")
    assert sorted(path.name for path in (tmp_path / "final").iterdir()) == ["manifest.json", "other"]


def test_a_rank_that_does_not_write_makes_nothing(tmp_path: Path):
    with whole_folder(tmp_path / "final", writes=False) as hidden:
        assert hidden == tmp_path / ".final.tmp"
    assert list(tmp_path.iterdir()) == []


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
    with whole_folder(tmp_path / "final", writes=True) as hidden:
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
    ],
)
def test_a_checkpoint_that_was_harmed_is_refused(harm, message: str, tmp_path: Path):
    path = make(tmp_path / "step-00000001")
    check_whole(path)
    harm(path)
    with pytest.raises(InputError, match=message):
        check_whole(path)
