"""What the data and a checkpoint that it continues must have in common: else the cursor would point at other rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lf_lightning.console import say
from lf_lightning.data.prompts import Prompt
from lf_lightning.data.store import TokenStore
from lf_lightning.types import InputError

DECIDING = (
    "streaming",
    "buffer_size",
    "mix_strategy",
    "interleave_probs",
    "template",
    "max_samples",
    "val_size",
    "shuffle",
    "max_length",
    "packing",
    "isolate_documents",
    "train_on_prompt",
    "mask_history",
    "history",
    "kl_pairs",
    "global_batch_size",
)
"""Options that decide which tokens make a step."""
PLACING = ("seed", "buffer_size", "mix_strategy", "interleave_probs", "val_size", "shuffle", "content")
"""What the place in a stream means nothing without."""
WHERE = {
    "group_size": "model.init_args.constants.group_size",
    "num_epochs": "model.init_args.constants.num_epochs",
    "num_units": "data.datasets",
    "content": "data.datasets",
    "tokens": "data.template",
}
"""What the order follows from -> the option, where it has another name."""
SAID = {
    "num_units": "give as many units as in the checkpoint, {before}, got {now}",
    "tokens": "give the tokens of the checkpoint, got another template or tokenizer",
    "content": "give the rows of the checkpoint, in the same tokens, got others",
}
"""What the line says, where it is not that an option must be the same."""


def contents_of_store(store: TokenStore) -> str:
    """Digest over every token and label of a store, in hexadecimal."""
    labels = hashlib.sha256(np.ascontiguousarray(store.labels).data).hexdigest()
    return hashlib.sha256(f"{store.fingerprint} {labels}".encode()).hexdigest()[:32]


def contents_of_prompts(prompts: Sequence[Prompt]) -> str:
    """Digest over every prompt and what the data answers, in hexadecimal."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(f"{prompt.ids} {prompt.reference!r}\n".encode())
    return digest.hexdigest()[:32]


def check_continues(before: dict[str, Any], now: dict[str, Any], *, accepts: bool, in_rollout: bool) -> None:
    """Refuse to continue with other data than the checkpoint's, or in another order.

    Args:
        before: What the order and the rows followed from when the checkpoint was saved.
        now: The same of the data that continues.
        accepts: Say the differences and go on (`data.accept_changes`).
        in_rollout: The checkpoint is in the midst of a rollout, whose responses belong to its own prompts and plan.

    Raises:
        InputError: Names the first difference.
    """
    found = list(_differences(before, now))
    if not found:
        return
    if before.get("streaming", False) != now["streaming"]:
        raise InputError(f"{found[0]}. Change it back, or start afresh.")
    if not accepts:
        raise InputError(f"{found[0]}. Change it back, start afresh, or set data.accept_changes: true.")
    if in_rollout:
        raise InputError(
            f"{found[0]}, since the checkpoint is in the midst of a rollout. Change it back, or continue from a "
            "checkpoint at the end of a rollout."
        )
    for line in found:
        say(f"accepted: {line}")
    if now["streaming"] and not keeps_place(before, now):
        say("accepted: the place in the stream means nothing any more, the next pass over it begins")


def keeps_place(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a place in the stream that `before` tells of is one in the stream of `now`."""
    return all(before.get(name) == now.get(name) for name in PLACING)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for name, value in before.items():
        if now.get(name) != value:
            where = WHERE.get(name, f"data.{name}")
            text = SAID.get(name, "be the same as in the checkpoint, {before}, got {now}")
            yield f"{where}: must {text.format(before=_shown(value), now=_shown(now.get(name)))}"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
