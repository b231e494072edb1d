"""What a stream cannot do, refused before a row is read."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import Any

from lf_lightning.types import InputError, Task

ONLY_STREAMS = {"buffer_size": None, "mix_strategy": "concat", "interleave_probs": None}
"""Option that only a stream reads -> its value where nobody has given it."""


def check_stream(task: Task, options: dict[str, Any]) -> None:
    """Refuse options that contradict streaming, or that only streaming reads.

    Args:
        task: What the stage learns.
        options: The data's options by name.

    Raises:
        InputError: Names the option, what it got and what to do.
    """
    if options["streaming"]:
        found = next((line for line in _contradictions(task, options)), None)
        if found is not None:
            raise InputError(found)
        _check_mixing(options)
        return
    for name, value in ONLY_STREAMS.items():
        if options[name] != value:
            raise InputError(
                f"data.{name}: is read with data.streaming: true alone, got {options[name]}. Remove it, or set that."
            )


def _contradictions(task: Task, options: dict[str, Any]) -> Iterator[str]:
    """One line for each option that a stream cannot have."""
    encodes = options["eval_datasets"] or options["test_datasets"]
    if task in ("ppo", "grpo"):
        yield f"data.streaming: must be false for {task}, whose prompts are read before training, got true. Change it."
    if options["packing"] == "knapsack":
        yield (
            "data.packing: knapsack wants the lengths of all rows, which a stream does not know. Set none (with "
            "data.layout: padding_free short rows cost nothing extra) or blocks, or data.streaming: false."
        )
    if options["kl_pairs"] != "step":
        yield (
            f"data.kl_pairs: must be step with data.streaming: true, which does not know the row before, got "
            f"{options['kl_pairs']}. Change one of them."
        )
    if options["max_samples"] is not None:
        yield (
            f"data.max_samples: excludes data.streaming: true, got {options['max_samples']}. "
            "Remove it: trainer.max_steps says how much is read."
        )
    if 0 < options["val_size"] < 1:
        yield (
            f"data.val_size: must be a whole number of rows with data.streaming: true, whose end nobody knows, got "
            f"{options['val_size']}. Give a number of rows, or eval_datasets."
        )
    if options["buffer_size"] is not None and not options["shuffle"]:
        yield f"data.buffer_size: excludes data.shuffle: false, got {options['buffer_size']}. Remove one."
    if options["num_workers"] is not None and not encodes:
        yield (
            f"data.num_workers: a stream is encoded in the training process, got {options['num_workers']}. Remove it."
        )


def _check_mixing(options: dict[str, Any]) -> None:
    strategy, probs, num_datasets = options["mix_strategy"], options["interleave_probs"], len(options["datasets"])
    if strategy != "concat" and num_datasets < 2:
        raise InputError(
            f"data.mix_strategy: {strategy} wants at least two data.datasets, got {num_datasets}. Remove it."
        )
    if probs is None:
        return
    if strategy == "concat":
        raise InputError(
            f"data.interleave_probs: wants a data.mix_strategy that interleaves, got {list(probs)} with concat. "
            "Set interleave_under, interleave_over or interleave_once."
        )
    if len(probs) != num_datasets or not all(isfinite(prob) and prob > 0 for prob in probs):
        raise InputError(
            f"data.interleave_probs: must be {num_datasets} positive numbers, one for each of data.datasets, got "
            f"{list(probs)}. Correct it."
        )


def check_stream_run(
    *, max_steps: int, max_epochs: int | None, every_n_epochs: int | None = None, precompute: bool = False
) -> None:
    """Refuse what a run over a stream cannot be told.

    Args:
        max_steps: Optimizer steps of the run; -1 where nobody has said.
        max_epochs: Epochs of the run; None or -1 where nobody has said.
        every_n_epochs: Epochs between checkpoints.
        precompute: Whether the reference is to run over all rows first.

    Raises:
        InputError: Names the option, what it got and what to do.
    """
    if max_steps < 0:
        raise InputError(
            f"trainer.max_steps: must say how long to train with data.streaming: true, whose end nobody knows, got "
            f"{max_steps}. Set it."
        )
    for name, value in (("trainer.max_epochs", max_epochs), ("checkpoint.every_n_epochs", every_n_epochs)):
        if value not in (None, -1):
            raise InputError(
                f"{name}: must be empty with data.streaming: true, which counts steps alone, got {value}. "
                f"Set {'trainer.max_steps' if name[0] == 't' else 'checkpoint.every_n_steps'} instead."
            )
    if precompute:
        raise InputError(
            "model.init_args.reference.precompute: must be false with data.streaming: true, whose rows are not known "
            "before they are read, got true. Change one of them."
        )
