"""A row says the same judgement in whichever format it comes, and a wrong row says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lf_lightning.data.formats import RowError
from lf_lightning.data.judgements import Feedback, Ranked, feedback_of, ranked_of
from lf_lightning.data.source import Source
from lf_lightning.types import Conversation, Message

SIDES = {"chosen": "good", "rejected": "bad"}
ALPACA = Source(
    "a", Path("a"), columns={"prompt": "q", "query": "x", "response": "a", "history": "h", **SIDES}, ranking=True
)
CHAT = Source("s", Path("s"), "sharegpt", {"messages": "turns", **SIDES}, ranking=True)
OPENAI = Source("o", Path("o"), "openai", {"messages": "turns", "tools": "tools", **SIDES}, ranking=True)
MARGIN = Source("m", Path("m"), columns={"prompt": "q", "margin": "by", **SIDES}, ranking=True)
TAGGED = Source("a", Path("a"), columns={"prompt": "q", "response": "a", "kto_tag": "label"})
TAGGED_CHAT = Source("s", Path("s"), "sharegpt", {"messages": "turns", "kto_tag": "label"})


def gpt(text: Any, who: str = "gpt") -> dict[str, Any]:
    return {"from": who, "value": text}


ASKED = {"turns": [gpt("Q", "human")]}
QUESTION = {"q": "Q", "good": "G", "bad": "B"}


def test_alpaca_columns_hold_the_two_answers_and_the_response_is_not_read() -> None:
    row = {"q": "Q", "x": "X", "a": 3, "h": [["q1", "a1"]], "good": "G", "bad": "B"}
    prompt = Conversation((Message("user", "q1"), Message("assistant", "a1"), Message("user", "Q\nX")))
    assert ranked_of(row, ALPACA) == Ranked(prompt, Message("assistant", "G"), Message("assistant", "B"), 0.0)


def test_sharegpt_answers_are_turns() -> None:
    row = {"turns": [gpt("S", "system"), gpt("Q", "human")], "good": gpt("G"), "bad": gpt("B")}
    prompt = Conversation((Message("system", "S"), Message("user", "Q")))
    assert ranked_of(row, CHAT) == Ranked(prompt, Message("assistant", "G"), Message("assistant", "B"), 0.0)
    call = gpt('{"name": "f", "arguments": {}}', "function_call")
    assert ranked_of({**row, "good": call}, CHAT).chosen.tool_calls == ({"name": "f", "arguments": {}},)


def test_openai_answers_are_turns_or_lists_of_one() -> None:
    good, bad = {"role": "assistant", "content": "G"}, {"role": "assistant", "content": "B"}
    row = {"turns": [{"role": "user", "content": "Q"}], "good": [good], "bad": bad, "tools": [{"name": "f"}]}
    prompt = Conversation((Message("user", "Q"),), ({"name": "f"},))
    assert ranked_of(row, OPENAI) == Ranked(prompt, Message("assistant", "G"), Message("assistant", "B"), 0.0)


@pytest.mark.parametrize(("value", "margin"), [(0, 0.0), (2, 2.0), (0.5, 0.5), (-1.5, -1.5)])
def test_a_margin_is_any_finite_number(value: float, margin: float) -> None:
    assert ranked_of({**QUESTION, "by": value}, MARGIN).margin == margin


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        (
            ALPACA,
            {"q": "Q", "bad": "B"},
            "column 'good' must be an answer, got none; the row has the columns 'q', 'bad'",
        ),
        (ALPACA, {"q": "Q", "good": "G", "bad": None}, "column 'bad' must be an answer, got none"),
        (ALPACA, {"q": "Q", "good": 3, "bad": "B"}, "column 'good' must be a string, got 3"),
        (ALPACA, {"q": "Q", "good": "", "bad": "B"}, "column 'good', an answer, is empty"),
        (ALPACA, {"q": "Q", "good": "G", "bad": ""}, "column 'bad', an answer, is empty"),
        (ALPACA, {"q": "Q", "good": "G", "bad": "G"}, "columns 'good' and 'bad' are equal"),
        (ALPACA, {"good": "G", "bad": "B"}, "column 'q' must be a non-empty string"),
        (CHAT, {"good": gpt("G"), "bad": gpt("B")}, "column 'turns' must be a list of turns"),
        (
            CHAT,
            {"turns": [gpt("Q", "human"), gpt("A")], "good": gpt("G"), "bad": gpt("B")},
            "column 'turns' must end with a turn of the user or a tool: the answers stand in columns 'good' and 'bad'",
        ),
        (CHAT, {**ASKED, "good": "G", "bad": gpt("B")}, "column 'good' must be one turn, an object, got 'G'"),
        (CHAT, {**ASKED, "good": gpt("G"), "bad": [gpt("B"), gpt("C")]}, "column 'bad' must be one turn"),
        (
            CHAT,
            {**ASKED, "good": gpt("G", "human"), "bad": gpt("B")},
            "column 'good' must be a turn of the assistant, got 'user'",
        ),
        (CHAT, {**ASKED, "good": gpt("G"), "bad": gpt("B", "bot")}, "column 'bad': 'from' must be one of 'human'"),
        (CHAT, {**ASKED, "good": gpt(7), "bad": gpt("B")}, "column 'good': 'value' must be a string, got 7"),
        (CHAT, {**ASKED, "good": gpt("G"), "bad": gpt("")}, "column 'bad', an answer, is empty"),
        (CHAT, {**ASKED, "good": gpt("G"), "bad": gpt("G")}, "columns 'good' and 'bad' are equal"),
        (MARGIN, QUESTION, "column 'by' must be a finite number, got none; the row has the columns"),
        (MARGIN, {**QUESTION, "by": "2"}, "column 'by' must be a finite number, got '2'"),
        (MARGIN, {**QUESTION, "by": True}, "column 'by' must be a finite number, got True"),
        (MARGIN, {**QUESTION, "by": float("nan")}, "column 'by' must be a finite number, got nan"),
    ],
)
def test_a_wrong_pair_says_what_is_wrong(source: Source, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        ranked_of(row, source)
    assert message in str(error.value)


@pytest.mark.parametrize("tag", [True, False])
def test_a_tag_judges_the_last_answer(tag: bool) -> None:
    conversation = Conversation((Message("user", "Q"), Message("assistant", "A")))
    assert feedback_of({"q": "Q", "a": "A", "label": tag}, TAGGED) == Feedback(conversation, tag)
    row = {"turns": [gpt("Q", "human"), gpt("A")], "label": tag}
    assert feedback_of(row, TAGGED_CHAT) == Feedback(conversation, tag)


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        (
            TAGGED,
            {"q": "Q", "a": "A", "label": "true"},
            "column 'label' must be true or false without quotes, got 'true'",
        ),
        (TAGGED, {"q": "Q", "a": "A", "label": 1}, "column 'label' must be true or false without quotes, got 1"),
        (
            TAGGED,
            {"q": "Q", "a": "A"},
            "column 'label' must be true or false without quotes, got none; the row has the columns 'q', 'a'",
        ),
        (TAGGED, {"q": "Q", "a": "", "label": True}, "its last turn, the answer to judge, is empty"),
        (TAGGED, {"q": "Q", "label": True}, "has no answer to judge: the last turn must be the assistant's"),
        (TAGGED_CHAT, {**ASKED, "label": True}, "has no answer to judge"),
        (TAGGED_CHAT, {"turns": [gpt("Q", "human"), gpt("")], "label": True}, "is empty"),
    ],
)
def test_wrong_feedback_says_what_is_wrong(source: Source, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as error:
        feedback_of(row, source)
    assert message in str(error.value)
