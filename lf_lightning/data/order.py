"""Which units make an optimizer step: a function of (seed, epoch) alone, never of ranks, workers or micro-batches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def epoch_order(num_units: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """The order in which an epoch visits its units.

    Args:
        num_units: Units of an epoch.
        seed: Seed of the run, >= 0.
        epoch: Number of the epoch, from 0.
        shuffle: False keeps the order of the files.

    Returns:
        A permutation of 0 ... num_units - 1; (num_units,).
    """
    if not shuffle:
        return np.arange(num_units)
    return np.random.default_rng([seed, epoch]).permutation(num_units)


def steps_per_epoch(num_units: int, global_batch_size: int) -> int:
    """Optimizer steps of an epoch; the last one may be short."""
    return -(-num_units // global_batch_size)


def split_rows(num_rows: int, val_size: float, *, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the rows that validate; the others train. Both keep the order of the files.

    Args:
        num_rows: Rows to split.
        val_size: A count when >= 1, a share of the rows when in (0, 1), none when 0.
        seed: Seed of the choice.

    Returns:
        Row numbers for training and for validation.
    """
    num_val = round(val_size * num_rows) if val_size < 1 else int(val_size)
    chosen = np.random.default_rng([seed, 0x5A11D]).permutation(num_rows)[:num_val]
    validates = np.zeros(num_rows, dtype=bool)
    validates[chosen] = True
    return np.flatnonzero(~validates), np.flatnonzero(validates)
