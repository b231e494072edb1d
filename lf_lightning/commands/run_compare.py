"""Whether two runs are the same run, bit for bit: weights, state to continue from, and everything they logged."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lf_lightning.callbacks.folder import MANIFEST, complete_checkpoints, sha256, step_of
from lf_lightning.callbacks.run_log import JSONL, SAMPLES

CLOCKS = ("elapsed_time", "remaining_time", "throughput", "time_elapsed")
"""Fields of logs and states that say how long something took: they differ between any two runs."""
COUNTS = ".val_loop."
"""Lightning's counts of validation batches in an epoch: a resume begins them anew, and no step depends on them."""
STATE = "trainer_state"

Values = dict[str, str]
"""Name of a value -> its hash, or the value itself where it is short."""


class Comparison(NamedTuple):
    """One part of two runs."""

    part: str  # for example `weights`
    num_values: int  # of the first run
    digest: str  # of all values of the first run, in hex
    difference: str | None  # the first one, by name; None where there is none


def compare(part: str, straight: Values, other: Values) -> Comparison:
    """Compare named values.

    Args:
        part: What they are.
        straight: Those of the run that was left alone; without any, that is the difference.
        other: Those of the run that is held against it.
    """
    digest = hashlib.sha256(json.dumps(straight, sort_keys=True).encode()).hexdigest()
    return Comparison(part, len(straight), digest, None if straight == other and straight else _first(straight, other))


def _first(straight: Values, other: Values) -> str:
    """The first difference, in words."""
    for name in dict.fromkeys((*straight, *other)):
        if straight.get(name) != other.get(name):
            return f"{name}: {straight.get(name, 'absent')} straight, {other.get(name, 'absent')} resumed"
    return "nothing to compare"


def compare_checkpoints(straight: Path, other: Path) -> list[Comparison]:
    """Compare two checkpoint folders: the weights, and what a resume continues from.

    Args:
        straight: A complete checkpoint.
        other: Another one of the same step.
    """
    return [
        compare("weights", weights_of(straight), weights_of(other)),
        compare("state", state_of(straight / STATE), state_of(other / STATE)),
    ]


def compare_runs(straight: Path, other: Path) -> list[Comparison]:
    """Compare two finished runs: `final/`, the state of the last checkpoint, every line of the logs.

    Args:
        straight: The folder of the run that was left alone.
        other: That of the run that is held against it.
    """
    found = [compare("final weights", weights_of(straight / "final"), weights_of(other / "final"))]
    states = [last_state(run) for run in (straight, other)]
    found += [compare("last state", *states)] if any(states) else []
    found += [compare("log", log_of(straight / JSONL), log_of(other / JSONL))]
    samples = [log_of(run / SAMPLES) for run in (straight, other)]
    return found + ([compare("samples", *samples)] if any(samples) else [])


def last_state(run: Path) -> Values:
    """What the newest complete checkpoint of a run would continue from, with its step."""
    checkpoints = complete_checkpoints(run)
    return {"step": str(step_of(checkpoints[-1])), **state_of(checkpoints[-1] / STATE)} if checkpoints else {}


# ---------------------------------------------------------------------- values


def weights_of(folder: Path) -> Values:
    """Every tensor of the safetensors files at the top of a folder."""
    found: Values = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as handle:
            found |= {f"{path.name}: {name}": tensor_digest(handle.get_tensor(name)) for name in sorted(handle.keys())}
    return found


def state_of(folder: Path) -> Values:
    """Every value of a trainer_state/ folder: tensors and plain Python by name, other files by their bytes."""
    found: Values = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".ckpt":
            found.update(leaves(torch.load(path, map_location="cpu", weights_only=True), at=""))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as handle:
                found |= {f"{name}: {key}": tensor_digest(handle.get_tensor(key)) for key in sorted(handle.keys())}
        else:
            found[name] = sha256(path)
    return found


def leaves(value: Any, *, at: str) -> Iterator[tuple[str, str]]:
    """Name and digest of everything in nested containers, clocks left out.

    Args:
        value: Tensors and plain Python, in dictionaries, lists and tuples.
        at: Name of the whole.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key not in CLOCKS and COUNTS not in str(key):
                yield from leaves(item, at=f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, at=f"{at}[{index}]")
    else:
        yield at, tensor_digest(value) if isinstance(value, Tensor) else plain(value)


def tensor_digest(tensor: Tensor) -> str:
    """Type, shape and hash of the bits of a tensor."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind}{list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"


def plain(value: Any) -> str:
    """A plain value, whole where it is short; Python writes a float so that other bits read differently."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def log_of(path: Path) -> Values:
    """Every value of a file of one JSON object a line, clocks left out; a line is named by its number and step."""
    if not path.is_file():
        return {}
    found: Values = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        row = json.loads(line) if line else {}
        place = f"{path.name}, line {number}, step {row.get('current_steps')}"
        found.update(leaves(row, at=place))
    return found


# ---------------------------------------------------------------------- torn


def torn(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that calls itself complete: sizes, hashes, and whether every file opens.

    Args:
        checkpoint: A folder with a manifest.

    Returns:
        The first fault; None where there is none.
    """
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (ValueError, KeyError, OSError) as error:
        return f"{MANIFEST}: cannot be read ({error})"
    present = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()}
    for name in sorted(present - listed.keys() - {MANIFEST}):
        return f"{name}: is not in the manifest"
    for name, facts in listed.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["size"]:
            return f"{name}: has {path.stat().st_size if path.is_file() else 'no'} bytes of {facts['size']}"
        if sha256(path) != facts["sha256"]:
            return f"{name}: has another hash"
    try:
        weights, state = weights_of(checkpoint), state_of(checkpoint / STATE)
    except (OSError, RuntimeError, ValueError, SafetensorError, pickle.UnpicklingError) as error:
        return f"cannot be opened: {error}"
    if not weights or not state:
        return f"holds no {'state' if weights else 'weights'}"
    return None
