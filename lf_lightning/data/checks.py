"""Options of the data that make no sense, refused before anything is read."""

from __future__ import annotations

from typing import Any

from lf_lightning.types import BackboneSpec, InputError

LEAST = {
    "max_length": 2,
    "max_samples": 1,
    "val_size": 0,
    "global_batch_size": 1,
    "micro_batch_size": 1,
    "micro_batch_tokens": 1,
    "eval_micro_batch_size": 1,
    "eval_micro_batch_tokens": 1,
    "seed": 0,
    "num_workers": 1,
}
"""Option -> its smallest value."""

EXCLUSIVE = (
    ("micro_batch_size", "micro_batch_tokens"),
    ("eval_micro_batch_size", "eval_micro_batch_tokens"),
    ("val_size", "eval_datasets"),
    ("mask_history", "train_on_prompt"),
)
"""Options of which one at most may be given."""


def check_options(**options: Any) -> None:
    """Refuse values outside their range and combinations that contradict each other.

    Args:
        options: The data's options by name.

    Raises:
        InputError: Names the option, what it got and what to do.
    """
    for name, least in LEAST.items():
        if options[name] is not None and options[name] < least:
            raise InputError(f"data.{name}: must be at least {least}, got {options[name]}. Raise it.")
    for first, second in EXCLUSIVE:
        if options[first] and options[second]:
            raise InputError(
                f"data.{first}: excludes data.{second}, got {options[first]} and {options[second]}. Remove one."
            )
    if options["val_size"] > 1 and options["val_size"] != int(options["val_size"]):
        raise InputError(
            f"data.val_size: must be a whole number of rows or a share below 1, got {options['val_size']}. Round it."
        )
    if options["isolate_documents"] is not None and options["packing"] == "none":
        raise InputError(
            f"data.isolate_documents: asks about packs, got {options['isolate_documents']} with packing: none. "
            "Remove it, or set data.packing."
        )


def check_same_order(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue in another order of units than the checkpoint's: its cursor would point elsewhere.

    Raises:
        InputError: Names the first difference.
    """
    for name, value in before.items():
        if now[name] != value:
            where = "data.datasets" if name == "num_units" else f"data.{name}"
            what = "give as many units" if name == "num_units" else "be the same"
            raise InputError(
                f"{where}: must {what} as in the checkpoint, {value}, got {now[name]}. Change it back, or start afresh."
            )


def given_backbone(backbone: BackboneSpec | None) -> BackboneSpec:
    """The backbone, which only the command line's parser may leave open for a moment.

    Raises:
        InputError: There is none.
    """
    if backbone is None:
        raise InputError("data.backbone: must be the stage's backbone, got none. Pass DataModule(backbone, ...).")
    return backbone
