"""What a row says: each dataset format parsed into the one Conversation, or into a text for pt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from lf_lightning.types import Conversation, InputError, Message, Role, Source, Task

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
    text = _text(row, column)
    if not text:
        got = "got ''" if text == "" else f"got none; the row has {_names(row)}"
        raise RowError(f"column {column!r} must be a non-empty string, {got}")
    return text


def check_task(source: Source, task: Task) -> None:
    """Refuse a dataset whose rows the task cannot use as they are meant.

    Raises:
        InputError: Preference or feedback rows in sft or pt, plain texts in sft, questions with answers in pt.
    """
    if source.ranking or "chosen" in source.columns or "kto_tag" in source.columns:
        kind = "liked and disliked answers (kto_tag)" if "kto_tag" in source.columns else "ranked answers (ranking)"
        raise InputError(f"{source.name}: holds {kind}, which {task} cannot learn from. Choose another dataset.")
    if task == "sft" and source.formatting == "text":
        raise InputError(
            f"{source.name}: holds plain texts (formatting: text), sft wants conversations. "
            f"Use model.class_path: PT, or formatting alpaca, sharegpt or openai."
        )
    if task == "pt" and source.formatting in ("sharegpt", "openai"):
        raise InputError(
            f"{source.name}: holds conversations (formatting: {source.formatting}), pt wants plain texts. "
            f"Use model.class_path: SFT, or formatting text with columns: {{text: <column>}}."
        )
    if task == "pt" and source.formatting == "alpaca" and "response" in (source.columns or ALPACA_COLUMNS):
        raise InputError(
            f"{source.name}: holds questions with answers, pt wants plain texts. "
            f"Use model.class_path: SFT, or name the text column alone: columns: {{prompt: <column>}}."
        )


def _text_column(source: Source) -> str:
    if source.formatting == "text":
        return source.columns.get("text") or source.columns.get("prompt") or "text"
    return (source.columns or ALPACA_COLUMNS).get("prompt", "instruction")


def _names(row: dict[str, Any]) -> str:
    shown = ", ".join(repr(name) for name in list(row)[:8])
    return f"the columns {shown}" if shown else "no columns"


def _text(row: dict[str, Any], column: str | None) -> str | None:
    """The string in a column, None where the column is absent."""
    value = None if column is None else row.get(column)
    if value is not None and not isinstance(value, str):
        raise RowError(f"column {column!r} must be a string, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _alpaca(row: dict[str, Any], source: Source) -> Conversation:
    columns = source.columns or ALPACA_COLUMNS
    messages = _system(_text(row, columns.get("system")))
    for user, assistant in _history(row, columns.get("history")):
        messages += [Message("user", user), Message("assistant", assistant)]
    asked = [_text(row, columns.get("prompt")), _text(row, columns.get("query"))]
    parts = [text for text in asked if text]
    if not parts:
        column = columns.get("prompt", "instruction")
        raise RowError(f"column {column!r} must be a non-empty string; the row has {_names(row)}")
    messages.append(Message("user", "\n".join(parts)))
    answer = _text(row, columns.get("response"))
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
        raise RowError(f"column {column!r} must be a list of [question, answer] pairs, got {_short(value)}")
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowError(f"column {column!r}, item {number}: must be a [question, answer] pair, got {_short(pair)}")
    return [(user, assistant) for user, assistant in value]


def _tools(row: dict[str, Any], column: str | None) -> tuple[dict[str, Any], ...]:
    value = None if column is None else row.get(column)
    if isinstance(value, str) and value.strip():
        value = _json(value, f"column {column!r}")
    if not value:
        return ()
    tools = [value] if isinstance(value, dict) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"column {column!r} must be a list of objects, one for each tool, got {_short(value)}")
    return tuple(tools)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{where}: broken JSON at character {error.pos + 1}: {error.msg}: {_short(text)}") from error


def _turns(
    row: dict[str, Any], column: str | None, system: str | None, parse: Callable[[Any], Message]
) -> list[Message]:
    """The parsed turns of a row, the system text first; a system turn of the row replaces that of the column."""
    value = None if column is None else row.get(column)
    if not isinstance(value, list) or not value:
        got = f"the row has {_names(row)}" if value is None else f"got {_short(value)}"
        raise RowError(f"column {column!r} must be a list of turns; {got}")
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} must be an object, got {_short(turn)}")
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
        raise RowError(f"{key!r} must be one of {', '.join(repr(known) for known in roles)}, got {_short(role)}")
    return roles[role]


def _content(turn: dict[str, Any], key: str) -> str:
    """The text of a turn: a string, or a list of text parts."""
    value = turn.get(key)
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, got {_short(value)}")
    return value


def _sharegpt(row: dict[str, Any], source: Source) -> Conversation:
    columns, tags = source.columns or SHAREGPT_COLUMNS, source.tags or SHAREGPT_TAGS

    def parse(turn: dict[str, Any]) -> Message:
        tag = _role_tag(turn, tags)
        content = _content(turn, tags.get("content_tag", ""))
        return _function_call(content) if tag == "function_tag" else Message(ROLE_TAGS[tag], content)

    messages = _turns(row, columns.get("messages"), _text(row, columns.get("system")), parse)
    return Conversation(tuple(messages), _tools(row, columns.get("tools")))


def _openai(row: dict[str, Any], source: Source) -> Conversation:
    columns, tags = source.columns or OPENAI_COLUMNS, source.tags or OPENAI_TAGS
    key = tags.get("content_tag", "")

    def parse(turn: dict[str, Any]) -> Message:
        tag = _role_tag(turn, tags)
        calls = turn.get("tool_calls")
        if ROLE_TAGS[tag] != "assistant" or not calls:
            return Message(ROLE_TAGS[tag], _content(turn, key))
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise RowError(f"'tool_calls' must be a list of objects, got {_short(calls)}")
        content = "" if turn.get(key) is None else _content(turn, key)
        return Message("assistant", content, _calls([call.get("function", call) for call in calls]))

    messages = _turns(row, columns.get("messages"), _text(row, columns.get("system")), parse)
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
            raise RowError(f"a function call must have a name and arguments, got {_short(call)}")
        arguments = call.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = _json(arguments, f"arguments of {call['name']}")
        if not isinstance(arguments, dict):
            raise RowError(f"the arguments of {call['name']} must be an object, got {_short(arguments)}")
        parsed.append({"name": call["name"], "arguments": arguments})
    if not parsed:
        raise RowError("a function call must have a name and arguments, got none")
    return tuple(parsed)


def _no_conversation(row: dict[str, Any], source: Source) -> Conversation:
    raise RowError("is a plain text, not a conversation")


FORMATS: dict[str, Callable[[dict[str, Any], Source], Conversation]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "openai": _openai,
    "text": _no_conversation,
}
