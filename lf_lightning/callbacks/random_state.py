"""The random state of every rank is part of a checkpoint, for code of the user's that draws from it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.predictions import from_all_ranks


class RandomState(Callback):
    """Keep the state of Python's, NumPy's and torch's generators, CUDA's included, in every checkpoint.

    What the stages draw follows from (seed, step, rank, micro-batch) alone and needs none of it; a reward, a callback
    or a model of one's own may draw from the global state. On another number of ranks than the checkpoint's, the first
    ranks get theirs back, and further ones begin anew.
    """

    def __init__(self) -> None:
        self._to_restore: list[dict[str, Any]] = []
        self._rank = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember which rank this is."""
        self._rank = trainer.global_rank

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks; every rank must call."""
        return {"ranks": from_all_ranks(random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them once training begins: setting up draws too."""
        self._to_restore = list(state_dict["ranks"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put this rank's state back, before the first step asks for its batch."""
        states, self._to_restore = self._to_restore, []
        if self._rank < len(states):
            restore_random_state(states[self._rank])


def random_state() -> dict[str, Any]:
    """The state of all generators of this process; tensors and plain Python."""
    version, numbers, gauss = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)  # the global one, which libraries draw from
    return {
        "python": [version, list(numbers), gauss],
        "numpy": {
            **numpy,
            "state": {**numpy["state"], "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64))},
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue with what `random_state` gave. CUDA's is restored where the devices are as many as they were."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": inner["key"].numpy().astype(np.uint32)}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
