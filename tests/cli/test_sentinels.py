"""A sentinel between two real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.runs import config
from tests.cli.test_signals import PATIENCE, TWO, fit, said

NAP = """
import time
from lightning.pytorch import Callback

class Nap(Callback):
    def on_train_batch_start(self, trainer, *_):
        time.sleep(0.5 * trainer.global_rank)
"""


@pytest.mark.slow
def test_of_two_ranks_the_one_that_lags_is_named(here: Path, root: Path):
    (here / "naps.py").write_text(NAP)
    settings = config(**TWO, trainer__max_steps=8)
    settings["trainer"]["callbacks"] = [
        {"class_path": "naps.Nap"},
        {"class_path": "LaggingRank", "init_args": {"ratio": 1.2}},
    ]
    with fit(here, root, settings) as process:
        assert process.wait(PATIENCE) == 0
    told = [line for line in said(here) if "all wait for it" in line]
    assert told
    assert all("rank 1 takes" in line for line in told)
