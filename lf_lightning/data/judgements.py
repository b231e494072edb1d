"""What a row judges: two answers of which one was preferred, or one answer that was liked or not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

from lf_lightning.data.formats import RowError, column_text, columns_shown, conversation_of, message_of, shortened
from lf_lightning.data.source import Source
from lf_lightning.types import Conversation, Message


class Ranked(NamedTuple):
    """A prompt with two answers."""

    prompt: Conversation  # the last turn is the user's or a tool's
    chosen: Message
    rejected: Message
    margin: float = 0.0  # how much better the chosen answer is; 0 where the data does not say


class Feedback(NamedTuple):
    """A conversation whose last turn, the assistant's, was liked or not."""

    conversation: Conversation
    is_desirable: bool


def ranked_of(row: dict[str, Any], source: Source) -> Ranked:
    """The pair that a row of a ranking dataset holds. A response column is not read.

    Raises:
        RowError: The row breaks the rules of its format, an answer is missing or empty, or both are equal.
    """
    columns = {ours: theirs for ours, theirs in source.columns.items() if ours != "response"}
    prompt = conversation_of(row, replace(source, columns=columns))
    if prompt.messages[-1].role == "assistant":
        raise RowError(
            f"column {columns.get('messages')!r} must end with a turn of the user or a tool: the answers stand in "
            f"columns {columns['chosen']!r} and {columns['rejected']!r}"
        )
    chosen, rejected = (_answer(row, columns[side], source) for side in ("chosen", "rejected"))
    if chosen == rejected:
        raise RowError(f"columns {columns['chosen']!r} and {columns['rejected']!r} are equal")
    return Ranked(prompt, chosen, rejected, _margin(row, columns.get("margin")))


def feedback_of(row: dict[str, Any], source: Source) -> Feedback:
    """The judged conversation that a row of a kto_tag dataset holds.

    Raises:
        RowError: The row breaks the rules of its format, has no answer, or its tag is not true or false.
    """
    conversation = conversation_of(row, source)
    last = conversation.messages[-1]
    if last.role != "assistant":
        raise RowError("has no answer to judge: the last turn must be the assistant's")
    if not last.content and not last.tool_calls:
        raise RowError("its last turn, the answer to judge, is empty")
    column = source.columns["kto_tag"]
    tag = row.get(column)
    if not isinstance(tag, bool):
        raise RowError(f"column {column!r} must be true or false without quotes, got {_got(row, tag)}")
    return Feedback(conversation, tag)


def _got(row: dict[str, Any], value: Any) -> str:
    return f"none; the row has {columns_shown(row)}" if value is None else shortened(value)


def _answer(row: dict[str, Any], column: str, source: Source) -> Message:
    if source.formatting == "alpaca":
        text = column_text(row, column)
        answer = None if text is None else Message("assistant", text)
    else:
        answer = _turn(row, column, source)
    if answer is None:
        raise RowError(f"column {column!r} must be an answer, got none; the row has {columns_shown(row)}")
    if not answer.content and not answer.tool_calls:
        raise RowError(f"column {column!r}, an answer, is empty")
    return answer


def _turn(row: dict[str, Any], column: str, source: Source) -> Message | None:
    """The turn in a column, as an object or a list of one; None where the column is absent."""
    value = row.get(column)
    if value is None:
        return None
    turn = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(turn, dict):
        raise RowError(f"column {column!r} must be one turn, an object, got {shortened(value)}")
    try:
        answer = message_of(turn, source)
    except RowError as error:
        raise RowError(f"column {column!r}: {error}") from error
    if answer.role != "assistant":
        raise RowError(f"column {column!r} must be a turn of the assistant, got {answer.role!r}")
    return answer


def _margin(row: dict[str, Any], column: str | None) -> float:
    if column is None:
        return 0.0
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RowError(f"column {column!r} must be a finite number, got {_got(row, value)}")
    return float(value)
