"""A dataset for another task and an option without a meaning are refused, each in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lf_lightning import BackboneSpec, DataModule
from lf_lightning.data.checks import check_task
from lf_lightning.data.source import Source
from lf_lightning.types import InputError, Task

SPEC = BackboneSpec(architecture={"model_type": "llama"}, tokenizer="bytes")
PLACE = Path("d")
SIDES = {"chosen": "c", "rejected": "r"}
CHAT = Source("d", PLACE, "sharegpt")
ALPACA = Source("d", PLACE)
TEXT = Source("d", PLACE, "text")
RANKED = Source("d", PLACE, "sharegpt", {"messages": "m", **SIDES}, ranking=True)
JUDGED = Source("d", PLACE, columns={"prompt": "p", "response": "r", "kto_tag": "label"})

LIKED = "liked and disliked answers"
TO_RANK = "Set ranking: true and columns: {chosen: <column>, rejected: <column>}, or use model.class_path:"
TO_JUDGE = "Set columns: {kto_tag: <column>}, or use model.class_path:"


@pytest.mark.parametrize(
    ("source", "task", "message"),
    [
        (TEXT, "sft", "holds plain texts (formatting: text), sft wants conversations. Use model.class_path: PT"),
        (CHAT, "pt", "holds conversations (formatting: sharegpt), pt wants plain texts. Use model.class_path: SFT"),
        (ALPACA, "pt", "holds questions with answers, pt wants plain texts. Use model.class_path: SFT"),
        (
            RANKED,
            "sft",
            "holds ranked answers (ranking), sft wants conversations. "
            "Choose another dataset, or use model.class_path: RM or DPO.",
        ),
        (RANKED, "pt", "holds ranked answers (ranking), pt wants plain texts. Choose another dataset"),
        (RANKED, "kto", f"holds ranked answers (ranking), kto wants liked and disliked answers. {TO_JUDGE} RM or DPO."),
        (JUDGED, "sft", "holds liked and disliked answers (kto_tag), sft wants conversations. Choose another dataset"),
        (JUDGED, "pt", "holds liked and disliked answers (kto_tag), pt wants plain texts. Choose another dataset"),
        (JUDGED, "dpo", f"holds liked and disliked answers (kto_tag), dpo wants ranked answers. {TO_RANK} KTO."),
        (JUDGED, "rm", f"holds liked and disliked answers (kto_tag), rm wants ranked answers. {TO_RANK} KTO."),
        (CHAT, "dpo", f"holds unjudged rows (formatting: sharegpt), dpo wants ranked answers. {TO_RANK} SFT."),
        (ALPACA, "rm", f"holds unjudged rows (formatting: alpaca), rm wants ranked answers. {TO_RANK} SFT."),
        (CHAT, "kto", f"holds unjudged rows (formatting: sharegpt), kto wants {LIKED}. {TO_JUDGE} SFT."),
        (TEXT, "dpo", f"holds unjudged rows (formatting: text), dpo wants ranked answers. {TO_RANK} PT."),
        (
            Source("d", PLACE, "text", {"kto_tag": "label"}),
            "kto",
            "holds plain texts (formatting: text), kto wants liked and disliked answers.",
        ),
        (
            Source("d", PLACE, ranking=True),
            "dpo",
            "columns must name chosen and rejected where answers are ranked, got none. Add columns: {chosen: <column>}",
        ),
        (
            Source("d", PLACE, "sharegpt", {"messages": "m", "chosen": "c"}, ranking=True),
            "rm",
            "got messages, chosen. Add columns: {rejected: <column>}.",
        ),
        (
            Source("d", PLACE, columns={"prompt": "p", **SIDES}),
            "dpo",
            "ranking must be true where columns name chosen and rejected. Set it.",
        ),
    ],
)
def test_a_dataset_for_another_task_is_refused(source: Source, task: Task, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_task(source, task)
    assert str(error.value).startswith("d: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "task"),
    [
        (ALPACA, "sft"),
        (CHAT, "sft"),
        (Source("c4", PLACE, columns={"prompt": "text"}), "pt"),
        (TEXT, "pt"),
        (RANKED, "rm"),
        (RANKED, "dpo"),
        (JUDGED, "kto"),
        (Source("d", PLACE, columns={"prompt": "p", "response": "a", "kto_tag": "l", **SIDES}, ranking=True), "kto"),
        (Source("d", PLACE, columns={"prompt": "p", "response": "a", "kto_tag": "l", **SIDES}, ranking=True), "dpo"),
    ],
)
def test_a_dataset_for_the_task_passes(source: Source, task: Task) -> None:
    check_task(source, task)


@pytest.mark.parametrize("task", ["rm", "dpo", "kto"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("packing", "blocks", "must be none for"),
        ("train_on_prompt", True, "must be false for"),
        ("mask_history", True, "must be false for"),
        ("history", "whole", "must be per_turn for"),
    ],
)
def test_options_of_whole_conversations_mean_nothing_for_judged_answers(
    task: Task, name: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError) as error:
        DataModule(SPEC, task, **{name: value})
    got = str(value).lower()
    line = f"data.{name}: {message} {task}, which learns the judged answers alone, got {got}. Remove it."
    assert str(error.value) == line
    DataModule(SPEC, "sft", **{name: value})


@pytest.mark.parametrize("task", ["pt", "sft", "rm", "dpo"])
def test_the_pairing_is_of_kto_only(task: Task) -> None:
    with pytest.raises(InputError, match=f"data.kl_pairs: is of kto only, got dataset with {task}"):
        DataModule(SPEC, task, kl_pairs="dataset")
    DataModule(SPEC, "kto", kl_pairs="dataset")


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("task", ["pt", "sft"])
def test_sharing_is_of_two_answers(task: Task, share: bool) -> None:
    with pytest.raises(InputError, match=f"data.share_prompt: is of rm, dpo and kto only, got {str(share).lower()}"):
        DataModule(SPEC, task, share_prompt=share)


def test_sharing_needs_one_row() -> None:
    with pytest.raises(InputError, match=r"data\.share_prompt: true needs both responses in one row, got layout"):
        DataModule(SPEC, "dpo", share_prompt=True, layout="padded")
    DataModule(SPEC, "dpo", share_prompt=False, layout="padded")
