"""What a row says: each dataset format parsed into the one Conversation, or into a text for pt."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from lf_lightning.data.source import Source
from lf_lightning.types import Conversation, Message, Role

ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
SHAREGPT_COLUMNS = {"messages": "conversations"}
OPENAI_COLUMNS = {"messages": "messages", "tools": "tools"}
SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
OPENAI_TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "system_tag": "system",
}
DEFAULT_COLUMNS = {"alpaca": ALPACA_COLUMNS, "sharegpt": SHAREGPT_COLUMNS, "openai": OPENAI_COLUMNS}
DEFAULT_TAGS = {"sharegpt": SHAREGPT_TAGS, "openai": OPENAI_TAGS}
ROLE_TAGS: dict[str, Role] = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "assistant",
    "system_tag": "system",
}


class RowError(ValueError):
    """A row breaks the rules of its format. The message tells what; the caller adds file and row."""


def conversation_of(row: dict[str, Any], source: Source) -> Conversation:
    """The conversation that a row of an alpaca, sharegpt or openai dataset holds.

    A column that is missing or null counts as absent, an empty system text too. The last turn is the user's where the
    row has no answer: right for predict, refused by `require_answer` for training.

    Raises:
        RowError: The row breaks the rules of its format.
    """
    return FORMATS[source.formatting](row, source)


def require_answer(conversation: Conversation) -> None:
    """Refuse a conversation that training cannot use.

    Raises:
        RowError: The last turn is not the assistant's, or a turn of the assistant is empty.
    """
    if not conversation.messages or conversation.messages[-1].role != "assistant":
        raise RowError("has no answer to learn: the last turn must be the assistant's")
    for number, message in enumerate(conversation.messages, start=1):
        if message.role == "assistant" and not message.content and not message.tool_calls:
            raise RowError(f"turn {number}, an answer to learn, is empty")


def text_of(row: dict[str, Any], source: Source) -> str:
    """The text of a row for pt: column `text` of the text formatting, column `prompt` of alpaca.

    Raises:
        RowError: The column is missing, not a string, or empty.
    """
    column = _text_column(source)
    text = column_text(row, column)
    if not text:
        got = "got ''" if text == "" else f"got none; the row has {columns_shown(row)}"
        raise RowError(f"column {column!r} must be a non-empty string, {got}")
    return text


def _text_column(source: Source) -> str:
    if source.formatting == "text":
        return source.columns.get("text") or source.columns.get("prompt") or "text"
    return (source.columns or ALPACA_COLUMNS).get("prompt", "instruction")


def columns_shown(row: dict[str, Any]) -> str:
    """The columns of a row, as a message names them."""
    shown = ", ".join(repr(name) for name in list(row)[:8])
    return f"the columns {shown}" if shown else "no columns"


def column_text(row: dict[str, Any], column: str | None) -> str | None:
    """The string in a column, None where the column is absent.

    Raises:
        RowError: The column holds something else.
    """
    value = None if column is None else row.get(column)
    if value is not None and not isinstance(value, str):
        raise RowError(f"column {column!r} must be a string, got {shortened(value)}")
    return value


def shortened(value: Any) -> str:
    """A value as a message shows it, in 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _alpaca(row: dict[str, Any], source: Source) -> Conversation:
    columns = source.columns or ALPACA_COLUMNS
    messages = _system(column_text(row, columns.get("system")))
    for user, assistant in _history(row, columns.get("history")):
        messages += [Message("user", user), Message("assistant", assistant)]
    asked = [column_text(row, columns.get("prompt")), column_text(row, columns.get("query"))]
    parts = [text for text in asked if text]
    if not parts:
        column = columns.get("prompt", "instruction")
        raise RowError(f"column {column!r} must be a non-empty string; the row has {columns_shown(row)}")
    messages.append(Message("user", "\n".join(parts)))
    answer = column_text(row, columns.get("response"))
    if answer is not None:
        messages.append(Message("assistant", answer))
    return Conversation(tuple(messages), _tools(row, columns.get("tools")))


def _system(text: str | None) -> list[Message]:
    return [Message("system", text)] if text else []


def _history(row: dict[str, Any], column: str | None) -> list[tuple[str, str]]:
    value = None if column is None else row.get(column)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowError(f"column {column!r} must be a list of [question, answer] pairs, got {shortened(value)}")
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(
                f"column {column!r}, item {number}: must be a [question, answer] pair, got {shortened(pair)}"
            )
    return [(user, assistant) for user, assistant in value]


def _tools(row: dict[str, Any], column: str | None) -> tuple[dict[str, Any], ...]:
    value = None if column is None else row.get(column)
    if isinstance(value, str) and value.strip():
        value = _json(value, f"column {column!r}")
    if not value:
        return ()
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"column {column!r} must be a list of objects, one for each tool, got {shortened(value)}")
    return tuple(tools)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{where}: broken JSON at character {error.pos + 1}: {error.msg}: {shortened(text)}") from error


def _turns(
    row: dict[str, Any], column: str | None, system: str | None, parse: Callable[[Any], Message]
) -> list[Message]:
    """The parsed turns of a row, the system text first; a system turn of the row replaces that of the column."""
    value = None if column is None else row.get(column)
    if not isinstance(value, list) or not value:
        got = f"the row has {columns_shown(row)}" if value is None else f"got {shortened(value)}"
        raise RowError(f"column {column!r} must be a list of turns; {got}")
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} must be an object, got {shortened(turn)}")
        try:
            messages.append(parse(turn))
        except RowError as error:
            raise RowError(f"turn {number}: {error}") from error
    if messages[0].role == "system":
        system = messages.pop(0).content
    _check_order(messages, first=len(value) - len(messages) + 1)
    return _system(system) + messages


def _check_order(messages: list[Message], first: int) -> None:
    """User or tool, then assistant, in alternation; consecutive tool results count as one."""
    if not messages:
        raise RowError("has no turn beside the system text")
    answered, previous = True, ""
    for number, message in enumerate(messages, start=first):
        asks = message.role in ("user", "tool")
        if message.role == "system":
            raise RowError(f"turn {number}: a system turn must be the first turn")
        if asks != answered and not (message.role == previous == "tool"):
            wanted = "the user or a tool" if answered else "the assistant"
            raise RowError(f"turn {number} must be by {wanted}, got {message.role!r}: turns must alternate")
        answered, previous = not asks, message.role


def _roles(tags: dict[str, str]) -> dict[str, str]:
    """What the file calls a role -> our tag of it."""
    return {tags[tag]: tag for tag in ROLE_TAGS if tag in tags}


def _role_tag(turn: dict[str, Any], tags: dict[str, str]) -> str:
    roles, key = _roles(tags), tags.get("role_tag", "")
    role = turn.get(key)
    if not isinstance(role, str) or role not in roles:
        raise RowError(f"{key!r} must be one of {', '.join(repr(known) for known in roles)}, got {shortened(role)}")
    return roles[role]


def _content(turn: dict[str, Any], key: str) -> str:
    """The text of a turn: a string, or a list of text parts."""
    value = turn.get(key)
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, got {shortened(value)}")
    return value


def message_of(turn: dict[str, Any], source: Source) -> Message:
    """One turn of a sharegpt or openai row.

    Raises:
        RowError: Its role is unknown, or its content is no text and no call.
    """
    tags = source.tags or DEFAULT_TAGS[source.formatting]
    tag, key = _role_tag(turn, tags), tags.get("content_tag", "")
    calls = turn.get("tool_calls") if source.formatting == "openai" else None
    if ROLE_TAGS[tag] != "assistant" or not calls:
        content = _content(turn, key)
        return _function_call(content) if tag == "function_tag" else Message(ROLE_TAGS[tag], content)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"'tool_calls' must be a list of objects, got {shortened(calls)}")
    content = "" if turn.get(key) is None else _content(turn, key)
    return Message("assistant", content, _calls([call.get("function", call) for call in calls]))


def _conversation(row: dict[str, Any], source: Source) -> Conversation:
    columns = source.columns or DEFAULT_COLUMNS[source.formatting]
    system = column_text(row, columns.get("system"))
    messages = _turns(row, columns.get("messages"), system, partial(message_of, source=source))
    return Conversation(tuple(messages), _tools(row, columns.get("tools")))


def _function_call(content: str) -> Message:
    """A function turn: the JSON of one call or a list of calls, after a thought where there is one."""
    thought, text = "", content
    opening, closing = content.find("<tool_call>"), content.rfind("</tool_call>")
    if 0 <= opening < closing:
        thought, text = content[:opening], content[opening + len("<tool_call>") : closing]
    elif "</think>" in content:
        head, _, text = content.rpartition("</think>")
        thought = f"{head}</think>"
    calls = _json(text.strip(), "function call")
    return Message("assistant", thought.strip(), _calls(calls if isinstance(calls, list) else [calls]))


def _calls(calls: list[Any]) -> tuple[dict[str, Any], ...]:
    parsed = []
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise RowError(f"a function call must have a name and arguments, got {shortened(call)}")
        arguments = call.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"arguments of {call['name']}")
        if not isinstance(arguments, dict):
            raise RowError(f"the arguments of {call['name']} must be an object, got {shortened(arguments)}")
        parsed.append({"name": call["name"], "arguments": arguments})
    if not parsed:
        raise RowError("a function call must have a name and arguments, got none")
    return tuple(parsed)


def _no_conversation(row: dict[str, Any], source: Source) -> Conversation:
    raise RowError("is a plain text, not a conversation")


FORMATS: dict[str, Callable[[dict[str, Any], Source], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _conversation,
    "openai": _conversation,
    "text": _no_conversation,
}
