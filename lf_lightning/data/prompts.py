"""Prompts for generation: the same conversations as in training, up to the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lf_lightning.console import say
from lf_lightning.data.checks import JUDGING, ROLLING, check_task, kinds_of
from lf_lightning.data.encode import bos_ids, token_ids
from lf_lightning.data.formats import RowError, conversation_of, text_of
from lf_lightning.data.judgements import feedback_of, ranked_of
from lf_lightning.data.source import Source
from lf_lightning.data.sources import load_rows
from lf_lightning.data.store import InvalidRows, row_error
from lf_lightning.data.templates import Template, prompt_segments
from lf_lightning.types import Conversation, Segment, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt(NamedTuple):
    """A text to answer."""

    text: str
    ids: tuple[int, ...]
    reference: str  # the answer that the row gives, "" where it gives none
    source: str  # name of the dataset
    row: int  # 1-based


def prompt_rows(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    task: Task = "sft",
    max_samples: int | None = None,
    invalid_rows: InvalidRows = "stop",
    max_length: int | None = None,
) -> list[Prompt]:
    """The prompts of all rows: everything before the last answer, which is the reference. Nothing is cut.

    Args:
        sources: The datasets; rows may lack an answer.
        tokenizer: The tokenizer, fitted to the template.
        template: The template.
        task: With `pt` the text of a row is the prompt, and there is no reference; with `rm`, `dpo`, `kto`, `ppo` and
            `grpo` a row may hold judged answers (the reference is the chosen or the judged one) or a conversation as in
            sft.
        max_samples: Use only the first rows of each dataset, this many.
        invalid_rows: `stop` at the first row that cannot be used, or `skip` such rows and report how many.
        max_length: Most tokens of prompt and answer together: a prompt that leaves no room cannot be used. None: none
            is too long.

    Raises:
        InputError: A dataset does not suit the task, a file is broken, or a row is invalid.
    """
    prompts: list[Prompt] = []
    for source in sources:
        check_task(source, "sft" if task in JUDGING and not kinds_of(source) else task)
        rows = load_rows(source, max_samples)
        found, dropped = _source_prompts(source, rows, tokenizer, template, task=task, stops=invalid_rows == "stop")
        for prompt in found:
            if max_length is None or len(prompt.ids) < max_length:
                prompts.append(prompt)
                continue
            reason = f"the prompt has {len(prompt.ids)} tokens and leaves no room in data.max_length {max_length}"
            if invalid_rows == "stop":
                raise row_error(source, prompt.row, reason)
            dropped.append(f"row {prompt.row}: {reason}")
        if dropped:
            say(f"{source.name}: {len(dropped)} of {len(rows)} prompts dropped ({dropped[0]})")
    return prompts


def _source_prompts(
    source: Source,
    rows: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    task: Task,
    stops: bool,
) -> tuple[list[Prompt], list[str]]:
    """The prompts of a dataset, and why the rows that are not among them were dropped."""
    parsed: dict[int, tuple[tuple[Segment, ...], str]] = {}
    dropped: list[str] = []
    for number, row in enumerate(rows, start=1):
        try:
            if task == "pt":
                parsed[number] = (Segment(text_of(row, source), False),), ""
            else:
                conversation = _conversation(row, source, task)
                parsed[number] = prompt_segments(conversation, template, tokenizer), _reference(conversation)
        except RowError as error:
            if stops:
                raise row_error(source, number, str(error)) from error
            dropped.append(f"row {number}: {error}")
    ids = token_ids((segment.text for segments, _ in parsed.values() for segment in segments), tokenizer)
    opening = bos_ids(tokenizer) if task == "pt" else []
    prompts = [
        Prompt(
            text="".join(segment.text for segment in segments),
            ids=tuple(opening + [token for segment in segments for token in ids[segment.text]]),
            reference=reference,
            source=source.name,
            row=number,
        )
        for number, (segments, reference) in parsed.items()
    ]
    return prompts, dropped


def _conversation(row: dict[str, Any], source: Source, task: Task) -> Conversation:
    """The conversation of a row, whatever judges it: a pair ends with its chosen answer."""
    kinds = kinds_of(source)
    if task not in (*JUDGING, *ROLLING) or not kinds:
        return conversation_of(row, source)
    if task == "kto" or "ranking" not in kinds:
        return feedback_of(row, source).conversation
    pair = ranked_of(row, source)
    return Conversation((*pair.prompt.messages, pair.chosen), pair.prompt.tools)


def _reference(conversation: Conversation) -> str:
    last = conversation.messages[-1]
    if last.role != "assistant":
        return ""
    calls = json.dumps(last.tool_calls, ensure_ascii=False) if last.tool_calls else ""
    return "\n".join(part for part in (last.content, calls) if part)
