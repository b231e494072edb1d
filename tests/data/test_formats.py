"""A row says the same conversation in whichever format it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lf_lightning.data.formats import RowError, conversation_of, require_answer, text_of
from lf_lightning.data.source import Source
from lf_lightning.types import Conversation, Message

ALPACA = Source("a", Path("a.json"))
SHAREGPT = Source("s", Path("s.json"), "sharegpt", {"messages": "conversations", "tools": "tools", "system": "sys"})
OPENAI = Source("o", Path("o.json"), "openai")
CALL = {"name": "add", "arguments": {"a": 1}}


def sharegpt(*turns: tuple[str, str], **others: Any) -> Conversation:
    return conversation_of({"conversations": [{"from": who, "value": text} for who, text in turns], **others}, SHAREGPT)


def test_alpaca_joins_instruction_and_input() -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "unused: not among the columns"}
    assert conversation_of(row, ALPACA) == Conversation((Message("user", "Add\n1 2"), Message("assistant", "3")))


def test_alpaca_leaves_empty_parts_out() -> None:
    row = {"instruction": "Add", "input": "", "output": "3"}
    assert conversation_of(row, ALPACA).messages[0] == Message("user", "Add")
    assert conversation_of({"input": "x", "output": "3"}, ALPACA).messages[0] == Message("user", "x")


def test_alpaca_columns_given_replace_all_defaults() -> None:
    source = Source("a", Path("a.json"), columns={"prompt": "q", "response": "a", "system": "s", "history": "h"})
    row = {"q": "Q", "input": "never read", "a": "A", "s": "S", "h": [["q1", "a1"]]}
    assert conversation_of(row, source).messages == (
        Message("system", "S"),
        Message("user", "q1"),
        Message("assistant", "a1"),
        Message("user", "Q"),
        Message("assistant", "A"),
    )


def test_an_alpaca_row_without_an_answer_serves_predict_but_not_training() -> None:
    conversation = conversation_of({"instruction": "Q", "output": None}, ALPACA)
    assert conversation.messages == (Message("user", "Q"),)
    with pytest.raises(RowError, match="has no answer to learn"):
        require_answer(conversation)


def test_an_empty_answer_is_nothing_to_learn() -> None:
    with pytest.raises(RowError, match="turn 2, an answer to learn, is empty"):
        require_answer(conversation_of({"instruction": "Q", "output": ""}, ALPACA))


def test_sharegpt_takes_system_from_the_first_turn_before_the_column() -> None:
    turns = [("system", "S"), ("human", "Q"), ("gpt", "A")]
    expected = (Message("system", "S"), Message("user", "Q"), Message("assistant", "A"))
    assert sharegpt(*turns, sys="column").messages == expected
    assert sharegpt(*turns[1:], sys="S").messages == expected
    assert sharegpt(*turns[1:], sys="").messages == expected[1:]


def test_sharegpt_parses_function_calls_and_tools() -> None:
    conversation = sharegpt(
        ("human", "Q"),
        ("function_call", json.dumps(CALL)),
        ("observation", "1"),
        ("gpt", "A"),
        tools='[{"name": "add"}]',
    )
    assert conversation.messages[1:3] == (Message("assistant", "", (CALL,)), Message("tool", "1"))
    assert conversation.tools == ({"name": "add"},)


@pytest.mark.parametrize("tools", ["", "[]", None, []])
def test_no_tools_are_no_tools(tools: Any) -> None:
    assert sharegpt(("human", "Q"), ("gpt", "A"), tools=tools).tools == ()


@pytest.mark.parametrize(
    ("text", "thought"),
    [
        (json.dumps([CALL]), ""),
        ("<think>\nhm\n</think>\n\n" + json.dumps(CALL), "<think>\nhm\n</think>"),
        ("I add.\n<tool_call>\n" + json.dumps(CALL) + "\n</tool_call>", "I add."),
        ('{"name": "add", "arguments": "{\\"a\\": 1}"}', ""),
    ],
)
def test_a_function_call_may_follow_a_thought(text: str, thought: str) -> None:
    assert sharegpt(("human", "Q"), ("function_call", text)).messages[1] == Message("assistant", thought, (CALL,))


def test_openai_messages_parse_calls_tools_and_text_parts() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "Q"}]},
            {"role": "assistant", "content": None, "tool_calls": [call, call]},
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "A", "tool_calls": None},
        ],
        "tools": {"type": "function"},
    }
    assert conversation_of(row, OPENAI) == Conversation(
        (
            Message("system", "S"),
            Message("user", "Q"),
            Message("assistant", "", (CALL, CALL)),
            Message("tool", "1"),
            Message("tool", "2"),
            Message("assistant", "A"),
        ),
        ({"type": "function"},),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "Q", "output": 3}, "column 'output' must be a string, got 3"),
        ({"text": "Q"}, "column 'instruction' must be a non-empty string; the row has the columns 'text'"),
        ({"instruction": "", "input": ""}, "column 'instruction' must be a non-empty string"),
        ({"instruction": "Q", "h": "x"}, "column 'h' must be a list of [question, answer] pairs, got 'x'"),
        ({"instruction": "Q", "h": [["a", "b"], ["a"]]}, "column 'h', item 2: must be a [question, answer] pair"),
    ],
)
def test_a_wrong_alpaca_row_says_what_is_wrong(row: dict[str, Any], message: str) -> None:
    columns = {"prompt": "instruction", "query": "input", "response": "output", "history": "h"}
    with pytest.raises(RowError) as error:
        conversation_of(row, Source("a", Path("a.json"), columns=columns))
    assert message in str(error.value)


H, G = ("human", "Q"), ("gpt", "A")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((G,), "turn 1 must be by the user or a tool, got 'assistant'"),
        ((H, H), "turn 2 must be by the assistant, got 'user'"),
        ((("system", "S"), G), "turn 2 must be by the user or a tool"),
        ((H, G, ("system", "S")), "turn 3: a system turn must be the first turn"),
        ((H, ("bot", "A")), "turn 2: 'from' must be one of 'human', 'gpt', 'observation', 'function_call', 'system'"),
        ((H, ("function_call", "{x")), "turn 2: function call: broken JSON at character 2"),
        ((H, ("function_call", "{}")), "turn 2: a function call must have a name and arguments, got {}"),
        ((H, ("function_call", '{"name": "f", "arguments": [1]}')), "the arguments of f must be an object, got [1]"),
        ((("system", "S"),), "has no turn beside the system text"),
        ((), "column 'conversations' must be a list of turns; got []"),
    ],
)
def test_a_wrong_sharegpt_row_says_what_is_wrong(turns: Any, message: str) -> None:
    with pytest.raises(RowError) as error:
        sharegpt(*turns)
    assert message in str(error.value)


def test_a_row_without_turns_shows_its_columns() -> None:
    with pytest.raises(RowError, match="column 'conversations' must be a list of turns; the row has the columns 'x'"):
        conversation_of({"x": 1}, SHAREGPT)
    with pytest.raises(RowError, match="turn 1 must be an object, got 'hi'"):
        conversation_of({"conversations": ["hi"]}, SHAREGPT)
    with pytest.raises(RowError, match="turn 1: 'content' must be a string, got None"):
        conversation_of({"messages": [{"role": "user"}]}, OPENAI)
    with pytest.raises(RowError, match="column 'tools': broken JSON"):
        sharegpt(H, G, tools="[{")


def test_text_comes_from_the_prompt_column_or_the_text_column() -> None:
    assert text_of({"body": "T"}, Source("p", Path("p.jsonl"), columns={"prompt": "body"})) == "T"
    assert text_of({"text": "T"}, Source("p", Path("p.txt"), "text")) == "T"
    assert text_of({"body": "T"}, Source("p", Path("p.txt"), "text", {"text": "body"})) == "T"
    for row, got in (({"text": ""}, "got ''"), ({"x": 1}, "got none; the row has the columns 'x'"), ({"text": 2}, "2")):
        with pytest.raises(RowError, match=got):
            text_of(row, Source("p", Path("p.txt"), "text"))
