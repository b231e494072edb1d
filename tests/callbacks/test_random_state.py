"""Code that draws from the global random state draws the same after a resume."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lf_lightning.callbacks import last_checkpoint
from lf_lightning.callbacks.random_state import random_state, restore_random_state
from tests.callbacks.python_run import fit


def draws() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.random()), float(torch.rand(()))


class Draws(Callback):
    """A user's callback that draws before every step and while it validates."""

    def __init__(self) -> None:
        self.found: dict[int, tuple[float, ...]] = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.found[trainer.global_step] = draws()

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        draws()


def test_a_state_brings_back_what_is_drawn_after_it():
    random.gauss(0, 1)  # leaves a second number behind
    state = random_state()
    first = draws()
    assert draws() != first
    restore_random_state(state)
    assert draws() == first


def test_a_state_is_read_as_weights_only(tmp_path: Path):
    torch.save(random_state(), tmp_path / "state")
    kept = torch.load(tmp_path / "state", weights_only=True)
    first = draws()
    restore_random_state(kept)
    assert draws() == first


@pytest.mark.parametrize("val_size", [0, 3])
def test_what_a_callback_draws_after_a_resume_is_what_it_draws_without_a_break(tmp_path: Path, val_size: int):
    straight, again = Draws(), Draws()
    (tmp_path / "a").mkdir()
    fit(tmp_path / "a", straight, max_steps=6, val_size=val_size)
    (tmp_path / "b").mkdir()
    fit(tmp_path / "b", Draws(), max_steps=4, val_size=val_size)
    draws()
    fit(tmp_path / "b", again, max_steps=6, val_size=val_size, ckpt_path=last_checkpoint(tmp_path / "b" / "run"))
    assert set(again.found) == {4, 5}
    assert again.found == {step: straight.found[step] for step in (4, 5)}
