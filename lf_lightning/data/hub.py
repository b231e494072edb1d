"""Datasets of the hub as a stream: the datasets library reads them, and says how to go on."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING, Any

from lf_lightning.data.places import START, Place, Rows
from lf_lightning.data.sources import HubSource
from lf_lightning.types import InputError, TrainingStopped

if TYPE_CHECKING:
    from datasets import IterableDataset


def hub_shards(source: HubSource) -> list[Any]:
    """What reads each shard of a dataset from a place on: one call for each file, more or less.

    A place is what the library's own `state_dict` says. Where a file cannot seek the library reads it again.

    Raises:
        InputError: There is no such dataset, subset or split, or no way to it.
    """
    num_shards = _opened(source).num_shards
    return [partial(_rows, source, num_shards, shard) for shard in range(num_shards)]


def hub_digest(source: HubSource) -> str:
    """Digest over what the hub calls the version of each file, in hexadecimal."""
    builder: Any = _builder(source)
    files = {str(split): list(files.origin_metadata) for split, files in (builder.config.data_files or {}).items()}
    return hashlib.sha256(f"{source.split} {sorted(files.items())}".encode()).hexdigest()


def _builder(source: HubSource) -> Any:
    from datasets import load_dataset_builder

    try:
        return load_dataset_builder(source.repo, source.subset, data_dir=source.folder)
    except (OSError, ValueError, ImportError) as error:
        raise _unreachable(source, error) from error


def _opened(source: HubSource) -> IterableDataset:
    builder = _builder(source)
    try:
        return builder.as_streaming_dataset(split=source.split)
    except (OSError, ValueError) as error:
        raise _unreachable(source, error) from error


def _unreachable(source: HubSource, error: BaseException) -> InputError:
    reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
    return InputError(
        f"{source.name}: {source.repo} cannot be read: {reason}. Correct hf_hub_url, subset, split or folder, or give "
        "a local file_name."
    )


def _rows(source: HubSource, num_shards: int, shard: int, start: Place = START) -> Rows:
    rows = _opened(source)
    if num_shards > 1:
        rows = rows.shard(num_shards=num_shards, index=shard)
    if start.at is not None:
        rows.load_state_dict(start.at)
    number = start.row
    try:
        for values in rows:
            number += 1
            yield values, Place(number, rows.state_dict())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingStopped(
            f"{source.name}: {source.repo} gave no row after row {number} of shard {shard + 1}: {reason}. "
            "Continue with --ckpt_path last."
        ) from error
