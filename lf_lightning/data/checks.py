"""Options of the data that make no sense, and datasets that do not suit the task, refused before a row is read."""

from __future__ import annotations

from typing import Any

from lf_lightning.data.formats import ALPACA_COLUMNS
from lf_lightning.data.source import Source
from lf_lightning.data.stream_checks import check_stream
from lf_lightning.types import BackboneSpec, InputError, Task

LEAST = {
    "max_length": 2,
    "max_samples": 1,
    "val_size": 0,
    "global_batch_size": 1,
    "rollout_size": 1,
    "buffer_size": 0,
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

JUDGING: tuple[Task, ...] = ("rm", "dpo", "kto")
"""Tasks that learn from judged answers."""

ROLLING: tuple[Task, ...] = ("ppo", "grpo")
"""Tasks that learn from the policy's own responses to prompts."""

_RANKED = ("ranking", "ranked answers", "Set ranking: true and columns: {chosen: <column>, rejected: <column>}")
WANTS: dict[Task, tuple[str | None, str, str]] = {
    "pt": (None, "plain texts", "Choose another dataset"),
    "sft": (None, "conversations", "Choose another dataset"),
    "rm": _RANKED,
    "dpo": _RANKED,
    "kto": ("feedback", "liked and disliked answers", "Set columns: {kto_tag: <column>}"),
    "ppo": (None, "prompts", "Choose another dataset"),
    "grpo": (None, "prompts", "Choose another dataset"),
}
"""Task -> the judgement that it wants, in words, and how a dataset gets it."""

MEANINGLESS = {"packing": "none", "train_on_prompt": False, "mask_history": False, "history": "per_turn"}
"""Option -> the only value with judged answers and responses: only these are learned, and nothing is packed."""
UNUSED = {
    "num_workers": "prompts are encoded in this process",
    "eval_micro_batch_size": "validation answers model.init_args.generation.batch_size prompts at once",
    "eval_micro_batch_tokens": "validation answers model.init_args.generation.batch_size prompts at once",
}
"""Option that nothing reads with prompts alone -> why."""


def check_options(task: Task, **options: Any) -> None:
    """Refuse values outside their range and combinations that contradict each other.

    Args:
        task: What the stage learns.
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
    _check_judging(task, options)
    _check_rolling(task, options)
    check_stream(task, options)


def _check_judging(task: Task, options: dict[str, Any]) -> None:
    learned = "the judged answers" if task in JUDGING else "its own responses"
    for name, value in MEANINGLESS.items() if task in (*JUDGING, *ROLLING) else ():
        if options[name] != value:
            raise InputError(
                f"data.{name}: must be {str(value).lower()} for {task}, which learns {learned} alone, "
                f"got {str(options[name]).lower()}. Remove it."
            )
    if options["kl_pairs"] != "step" and task != "kto":
        raise InputError(f"data.kl_pairs: is of kto only, got {options['kl_pairs']} with {task}. Remove it.")
    share = options["share_prompt"]
    if share is not None and task not in JUDGING:
        raise InputError(
            f"data.share_prompt: is of rm, dpo and kto only, got {str(share).lower()} with {task}. Remove it."
        )
    if share and options["layout"] == "padded":
        raise InputError(
            "data.share_prompt: true needs both responses in one row, got layout: padded. "
            "Set data.layout: padding_free, or remove one."
        )


def _check_rolling(task: Task, options: dict[str, Any]) -> None:
    rollout_size, batch_size = options["rollout_size"], options["global_batch_size"]
    if task not in ROLLING:
        if rollout_size is not None:
            raise InputError(f"data.rollout_size: is of ppo and grpo only, got {rollout_size} with {task}. Remove it.")
        return
    if rollout_size is not None and rollout_size < batch_size:
        raise InputError(
            f"data.rollout_size: must be at least data.global_batch_size, {batch_size}, got {rollout_size}. Raise it."
        )
    for name, reason in UNUSED.items():
        if options[name] is not None:
            raise InputError(f"data.{name}: {reason} with {task}, got {options[name]}. Remove it.")


def check_task(source: Source, task: Task) -> None:
    """Refuse a dataset whose rows the task cannot use as they are meant.

    Raises:
        InputError: Names the dataset, what it holds, what the task wants and what to set.
    """
    kinds, (kind, wanted, advice) = kinds_of(source), WANTS[task]
    if task in ROLLING and kinds:  # whatever is judged there, the prompts serve
        kind = "ranking" if "ranking" in kinds else "feedback"
    if bool(kinds) != bool(kind) or (kind and kind not in kinds):
        raise InputError(
            f"{source.name}: holds {_holds(source)}, {task} wants {wanted}. {advice}, or use {_stage_of(source)}."
        )
    if kind == "ranking":
        _check_ranking(source, task)
    if task == "pt":
        _check_texts(source)
    elif source.formatting == "text":
        raise InputError(
            f"{source.name}: holds plain texts (formatting: text), {task} wants {wanted}. "
            f"Use model.class_path: PT, or formatting alpaca, sharegpt or openai."
        )


def kinds_of(source: Source) -> set[str]:
    """Which judgements the rows of a dataset hold: `ranking`, `feedback`, both or none."""
    ranks = source.ranking or "chosen" in source.columns or "rejected" in source.columns
    return {kind for kind, holds in (("ranking", ranks), ("feedback", "kto_tag" in source.columns)) if holds}


def _holds(source: Source) -> str:
    kinds = kinds_of(source)
    if "ranking" in kinds:
        return "ranked answers (ranking)"
    return "liked and disliked answers (kto_tag)" if kinds else f"unjudged rows (formatting: {source.formatting})"


def _stage_of(source: Source) -> str:
    """The stage that the rows of a dataset are for."""
    kinds = kinds_of(source)
    if kinds:
        return "model.class_path: RM or DPO" if "ranking" in kinds else "model.class_path: KTO"
    return "model.class_path: PT" if source.formatting == "text" else "model.class_path: SFT"


def _check_ranking(source: Source, task: Task) -> None:
    missing = [side for side in ("chosen", "rejected") if side not in source.columns]
    if missing:
        raise InputError(
            f"{source.name}: columns must name chosen and rejected where answers are ranked, got "
            f"{', '.join(source.columns) or 'none'}. Add columns: {{{missing[0]}: <column>}}."
        )
    if not source.ranking:
        raise InputError(f"{source.name}: ranking must be true where columns name chosen and rejected. Set it.")
    if task == "dpo" and "margin" in source.columns:
        raise InputError(f"{source.name}: columns.margin is read by rm alone, got it with dpo. Remove it from columns.")


def _check_texts(source: Source) -> None:
    if source.formatting in ("sharegpt", "openai"):
        raise InputError(
            f"{source.name}: holds conversations (formatting: {source.formatting}), pt wants plain texts. "
            f"Use model.class_path: SFT, or formatting text with columns: {{text: <column>}}."
        )
    if source.formatting == "alpaca" and "response" in (source.columns or ALPACA_COLUMNS):
        raise InputError(
            f"{source.name}: holds questions with answers, pt wants plain texts. "
            f"Use model.class_path: SFT, or name the text column alone: columns: {{prompt: <column>}}."
        )


def given_backbone(backbone: BackboneSpec | None) -> BackboneSpec:
    """The backbone, which only the command line's parser may leave open for a moment.

    Raises:
        InputError: There is none.
    """
    if backbone is None:
        raise InputError("data.backbone: must be the stage's backbone, got none. Pass DataModule(backbone, ...).")
    return backbone
