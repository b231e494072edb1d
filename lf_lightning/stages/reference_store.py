"""Reference log-probs computed once, kept on disk, and taken by every later run of the same reference and data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lf_lightning.console import say
from lf_lightning.models import Reference
from lf_lightning.stages.ranks import Ranks
from lf_lightning.types import InputError, Unit

if TYPE_CHECKING:
    from lf_lightning.stages.judgement import JudgementStage

SAVE_EVERY = 64
"""Micro-batches between two saves: what an interruption can lose."""

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference between a stored and a recomputed log-prob that rounding explains, relative to 1 + its size."""
COMPUTED_IN = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Table(NamedTuple):
    """Numbers of every document of a store; NaN where they are not known yet."""

    path: Path | None  # None keeps them in memory only
    values: NDArray[np.float64]  # (D, K)

    @classmethod
    def opened(cls, path: Path | None, *, num_rows: int, width: int) -> Table:
        """The table in a file, or an empty one where there is none."""
        values = np.full((num_rows, width), np.nan)
        if path is not None and path.is_file():
            try:
                found = np.load(path)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path}: must hold an array, got a file that cannot be read. Remove it.") from error
            if (found.shape, found.dtype) != (values.shape, values.dtype):
                got = f"{found.dtype} of shape {found.shape}"
                raise InputError(f"{path}: must hold float64 of shape {values.shape}, got {got}. Remove the file.")
            values = found
        return cls(path, values)

    def save(self) -> None:
        """Replace the file, all at once."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        hidden = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with hidden.open("wb") as handle:
            np.save(handle, self.values)
            handle.flush()
            os.fsync(handle.fileno())
        hidden.replace(self.path)


def fill_stored_reference(stage: JudgementStage, reference: Reference) -> None:
    """Compute what is not stored yet for the training epochs ahead and for validation, and hand all of it to the data.

    Collective: every rank computes its share; the first one reads and writes the files.

    Raises:
        InputError: A file does not fit, or holds other log-probs than the reference gives.
    """
    data = stage.data
    if data is None:
        raise InputError("model.init_args.reference.precompute: needs the DataModule, got loaders. Set it to false.")
    fingerprint = reference.fingerprint()
    folder = Path(data.arguments["cache_dir"]).expanduser() / "reference" if data.arguments["cache_dir"] else None
    is_fit = stage.trainer.state.fn == "fit"
    jobs = [("train", epoch) for epoch in range(num_epochs(stage))] if is_fit else []
    evaluated = "test" if stage.trainer.state.fn == "test" else "val"
    jobs += [(evaluated, 0)] if evaluated in data.sets else []
    for split, epoch in jobs:
        parts = f"{fingerprint} {data.sets[split].store.fingerprint} {data.max_length} {stage.trainer.precision}"
        key = hashlib.sha256(parts.encode()).hexdigest()[:32]
        name = table_name(data.units(split, epoch))
        path = folder / key / name if folder is not None else None
        table = _filled(stage, reference, path, split=split, epoch=epoch)
        data.stored_reference[data.reference_key(split, epoch)] = table


def num_epochs(stage: JudgementStage) -> int:
    """Epochs whose units need numbers of their own: all of the run where pairs are drawn anew, else one."""
    if stage.data.reference_key("train", 1) == stage.data.reference_key("train", 0):
        return 1
    stage.trainer.fit_loop.setup_data()  # else a run that max_steps ends would not know how long an epoch is
    total = stage.trainer.estimated_stepping_batches
    return max(1, -(-int(total) // max(int(stage.trainer.num_training_batches), 1)))


def table_name(units: Sequence[Unit]) -> str:
    """File of a set's numbers: of pairs one for all, of feedback one for each way to pair rows with partners."""
    partners = sorted((unit.spans[0].document, unit.partner) for unit in units if unit.partner is not None)
    return f"partners-{hashlib.sha256(str(partners).encode()).hexdigest()[:16]}.npy" if partners else "pairs.npy"


def _filled(
    stage: JudgementStage, reference: Reference, path: Path | None, *, split: str, epoch: int
) -> NDArray[np.float64]:
    """The table of a set, complete for its units, with its trailing shape."""
    loader = stage.data.reference_batches(split, epoch)
    ranks, shape = stage.ranks, stage.reference_shape
    num_rows, width = len(stage.data.sets[split].store), int(np.prod(shape))
    table = Table.opened(path if stage.trainer.is_global_zero else None, num_rows=num_rows, width=width)
    table.values[:] = stage.trainer.strategy.broadcast(table.values)
    own = np.full_like(table.values, np.nan)
    types = (COMPUTED_IN[stage.trainer.precision], next(reference.backbone.parameters()).dtype)
    tolerance = max(TOLERANCE[each] for each in types)
    num_units, num_computed = len(stage.data.units(split, epoch)), 0
    sample = {0, len(loader) // 2, len(loader) - 1}
    for index, step in enumerate(loader):
        (micro_batch,) = stage.trainer.strategy.batch_to_device(step).micro_batches
        rows = micro_batch.rows.cpu().numpy()
        is_known = bool(np.isfinite(table.values[rows]).all())
        is_wanted = not is_known or (index in sample and len(rows) > 0)
        if not ranks.all_agree(not is_wanted):  # where a model is sharded, its ranks run together
            found = stage.reference_sums(micro_batch).double().reshape(len(rows), width).cpu().numpy()
            if is_known:
                check_same(table, rows, found, tolerance=tolerance)
            else:
                own[rows], num_computed = found, num_computed + len(rows)
        if index % SAVE_EVERY == SAVE_EVERY - 1 or index == len(loader) - 1:
            _merge(table, own, ranks, save=stage.trainer.is_global_zero, path=path)
    (total,) = ranks.sums([float(num_computed)])
    place = f"kept in {path}" if path is not None else "kept in memory, since data.cache_dir is null"
    say(f"reference log-probs of {split}: {int(total):,} rows computed, {num_units - int(total):,} found; {place}")
    return table.values.reshape(num_rows, *shape)


def _merge(table: Table, own: NDArray[np.float64], ranks: Ranks, *, save: bool, path: Path | None) -> None:
    """Bring the numbers that each rank has computed to all of them, and to the disk."""
    is_new = np.isfinite(own) & ~np.isfinite(table.values)
    total = ranks.sum_of(torch.from_numpy(np.where(is_new, own, 0.0))).numpy()
    was_new = ranks.sum_of(torch.from_numpy(is_new.astype(np.float64))).numpy() > 0
    table.values[was_new] = total[was_new]
    if save and was_new.any():
        Table(path, table.values).save()


def check_same(table: Table, rows: NDArray[Any], found: NDArray[np.float64], *, tolerance: float) -> None:
    """Compare stored numbers with new ones.

    Raises:
        InputError: They differ by more than rounding.
    """
    stored = table.values[rows]
    is_far = np.abs(stored - found) > tolerance * (1 + np.abs(found))
    if is_far.any():
        where = np.argwhere(is_far)[0]
        raise InputError(
            f"{table.path}: holds {stored[tuple(where)]:.4f} for document {rows[where[0]]}, where the reference gives "
            f"{found[tuple(where)]:.4f}. Remove the file, or set model.init_args.reference.precompute: false."
        )
