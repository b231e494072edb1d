"""What the model sees in training is what it sees at inference, and only answers with their stop token are learned."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lf_lightning.data.formats import RowError
from lf_lightning.data.templates import (
    Rendered,
    Template,
    load_template,
    prompt_of,
    prompt_segments,
    segments_of,
    stop_token_ids,
)
from lf_lightning.data.tokenizer import byte_tokenizer
from lf_lightning.types import Conversation, InputError, Message, Segment

ONE = Conversation((Message("user", "Q1"), Message("assistant", "A1")))
TWO = Conversation((*ONE.messages, Message("user", "Q2"), Message("assistant", "A2")))
SYSTEM = Conversation((Message("system", "S"), *TWO.messages))

# The ways of real templates, made short (reference/templates.md).
QWEN3 = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{{- m.content + '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""  # an empty thought in the last turn only
PHI3 = """{%- for m in messages %}{{- '<' + m.role + '>' + m.content + '<|im_start|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- else %}{{- eos_token }}{%- endif %}"""  # eos at the very end
R1 = """{%- for m in messages %}{{- m.role + ':' + m.content }}
{%- if m.role == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:<think>\n' }}{%- endif %}"""  # the prompt opens a thought
GLM = """{%- for m in messages %}{{- '<' + m.role + '>' + m.content }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{%- endif %}"""  # no stop token
GEMMA = """{%- for m in messages %}{%- if m.role == 'system' %}{{ raise_exception('System role\nnot supported') }}
{%- endif %}{{- m.content + eos_token }}{%- endfor %}"""
TOOLS = """{%- for t in tools or [] %}{{- t | tojson }}{%- endfor %}
{%- for m in messages %}{{- m.role + ':' + m.content }}
{%- for c in m.tool_calls or [] %}{{- c.function.name + (c.function.arguments | tojson) }}{%- endfor %}
{{- '<|im_end|>' }}{%- endfor %}{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}"""


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def auto(tokenizer: PreTrainedTokenizerBase, jinja: str) -> Template:
    tokenizer.chat_template = jinja
    return load_template("auto", tokenizer)


def shown(rendered: Rendered) -> list[list[tuple[str, str]]]:
    """Each example as its (prompt, answer) turns, segments joined by |, what is not learned in an answer in ()."""

    def answer(segments: tuple[Segment, ...]) -> str:
        return "|".join(text if learn else f"({text})" for text, learn in segments)

    return [[("|".join(s.text for s in turn.prompt), answer(turn.answer)) for turn in e] for e in rendered.examples]


def joined(*turns: tuple[str, str]) -> list[list[tuple[str, str]]]:
    return [list(turns)]


NAMED = {
    "chatml": joined(
        ("<|im_start|>system\nS<|im_end|>\n|<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n", "A1<|im_end|>\n"),
        ("<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n", "A2<|im_end|>\n"),
    ),
    "default": joined(
        ("System: S<|im_end|>\n|Human: Q1<|im_end|>\nAssistant:", "A1<|im_end|>\n"),
        ("Human: Q2<|im_end|>\nAssistant:", "A2<|im_end|>\n"),
    ),
    "alpaca": joined(
        ("S|### Instruction:\nQ1\n\n### Response:\n", "A1<|im_end|>\n\n"),
        ("### Instruction:\nQ2\n\n### Response:\n", "A2<|im_end|>\n\n"),
    ),
    "empty": joined(("S|Q1", "A1"), ("Q2", "A2<|im_end|>")),
}
NAMED["qwen"] = NAMED["chatml"]


@pytest.mark.parametrize("name", sorted(NAMED))
def test_named_templates_have_llamafactorys_slots(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    template = load_template(name, tokenizer)
    assert shown(segments_of(SYSTEM, template, tokenizer)) == NAMED[name]


def test_llama3_has_its_headers_and_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "extra_special_tokens": ["<|eot_id|>"]})
    template = load_template("llama3", tokenizer)
    ask = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    system = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>|"
    assert shown(segments_of(SYSTEM, template, tokenizer)) == joined(
        (system + ask.format("Q1"), "A1<|eot_id|>"), (ask.format("Q2"), "A2<|eot_id|>")
    )
    assert shown(segments_of(ONE, template, tokenizer))[0][0][0] == "<|begin_of_text|>|" + ask.format("Q1")
    assert template.end_of_text == "<|end_of_text|>"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "qwen",
            "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
        ),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the "
            "request.\n\n",
        ),
    ],
)
def test_a_default_system_text_is_a_segment_of_its_own(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str
) -> None:
    template = load_template(name, tokenizer)
    first, *rest = prompt_segments(ONE, template, tokenizer)
    assert first == Segment(text, False)
    assert len(rest) == 1
    assert segments_of(ONE, template, tokenizer).examples[0][0].prompt == (first, *rest)
    assert not prompt_of(SYSTEM, template, tokenizer).startswith(text)


def test_auto_learns_each_answer_of_one_sequence(tokenizer: PreTrainedTokenizerBase) -> None:
    template = load_template("auto", tokenizer)
    rendered = segments_of(SYSTEM, template, tokenizer)
    assert rendered.way == "joined"
    assert shown(rendered) == joined(
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n", "A1<|im_end|>\n"),
        ("<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n", "A2<|im_end|>\n"),
    )


def test_a_template_that_rewrites_history_gives_an_example_per_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    template = auto(tokenizer, QWEN3)
    first = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    second = first + "A1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    answers = "<think>\n\n</think>\n\nA1<|im_end|>\n", "<think>\n\n</think>\n\nA2<|im_end|>\n"
    rendered = segments_of(TWO, template, tokenizer)
    assert rendered.way == "per_turn"
    assert shown(rendered) == [[(first, answers[0])], [(second, answers[1])]]
    for options in ({"history": "whole"}, {"mask_history": True}):
        rendered = segments_of(TWO, template, tokenizer, **options)  # type: ignore[arg-type]
        assert (rendered.way, shown(rendered)) == ("last_turn", [[(second, answers[1])]])


def test_eos_at_the_very_end_is_learned_there(tokenizer: PreTrainedTokenizerBase) -> None:
    template = auto(tokenizer, PHI3)
    assert template.stop_tokens == ("<|im_start|>", "<|im_end|>")
    assert shown(segments_of(TWO, template, tokenizer)) == [
        [("<user>Q1<|im_start|><assistant>", "A1<|im_start|><|im_end|>")],
        [("<user>Q1<|im_start|><assistant>A1<|im_start|><user>Q2<|im_start|><assistant>", "A2<|im_start|><|im_end|>")],
    ]


def test_a_prompt_that_the_turn_does_not_keep_is_learned_after_what_they_share(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = auto(tokenizer, R1)
    assert prompt_of(ONE, template, tokenizer) == "user:Q1assistant:<think>\n"
    assert shown(segments_of(TWO, template, tokenizer)) == joined(
        ("user:Q1assistant:", "A1<|im_end|>"), ("user:Q2assistant:", "A2<|im_end|>")
    )


def test_an_answer_without_a_stop_token_gets_one_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    template = auto(tokenizer, GLM)
    assert template.stop_tokens == ("<|im_end|>",)
    assert shown(segments_of(TWO, template, tokenizer)) == joined(
        ("<user>Q1<assistant>", "A1"), ("<user>Q2<assistant>", "A2<|im_end|>")
    )


def test_mask_history_learns_the_last_turn_only(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = segments_of(TWO, auto(tokenizer, GLM), tokenizer, mask_history=True)
    assert shown(rendered) == joined(("<user>Q1<assistant>", "(A1)"), ("<user>Q2<assistant>", "A2<|im_end|>"))


def test_train_on_prompt_learns_everything(tokenizer: PreTrainedTokenizerBase) -> None:
    (example,) = segments_of(SYSTEM, load_template("qwen", tokenizer), tokenizer, train_on_prompt=True).examples
    assert all(segment.learn for turn in example for segment in (*turn.prompt, *turn.answer))


def test_turns_can_be_kept_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = segments_of(TWO, auto(tokenizer, GLM), tokenizer, join_turns=False)
    assert rendered.way == "per_turn"
    assert shown(rendered) == [
        [("<user>Q1<assistant>", "A1<|im_end|>")],
        [("<user>Q1<assistant>A1<user>Q2<assistant>", "A2<|im_end|>")],
    ]


def test_a_template_may_refuse_a_row(tokenizer: PreTrainedTokenizerBase) -> None:
    template = auto(tokenizer, GEMMA)
    with pytest.raises(RowError, match="the chat template refuses it: System role not supported"):
        segments_of(SYSTEM, template, tokenizer)
    assert prompt_of(ONE, template, tokenizer) == "Q1<|im_end|>"


CALL: dict[str, Any] = {"name": "add", "arguments": {"a": 1}}
CALLING = Conversation(
    (
        Message("user", "Q"),
        Message("assistant", "", (CALL,)),
        Message("tool", "1"),
        Message("assistant", "A"),
    ),
    ({"name": "add"},),
)


def test_tool_calls_go_through_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tools = '{"type": "function", "function": {"name": "add"}}'
    assert shown(segments_of(CALLING, auto(tokenizer, TOOLS), tokenizer)) == joined(
        (tools + "user:Q<|im_end|>assistant:", 'add{"a": 1}<|im_end|>'), ("tool:1<|im_end|>assistant:", "A<|im_end|>")
    )


@pytest.mark.parametrize("name", ["auto", "qwen"])
def test_tool_calls_that_a_template_cannot_show_are_refused(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    template = load_template(name, tokenizer)
    with pytest.raises(RowError, match="holds tool calls, which this template cannot show"):
        segments_of(CALLING, template, tokenizer)
    with pytest.raises(RowError, match="lists tools, which this template cannot show"):
        prompt_of(Conversation(ONE.messages, CALLING.tools), template, tokenizer)


def test_stop_tokens_are_those_of_template_and_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert stop_token_ids(load_template("chatml", tokenizer), tokenizer) == [2, 1]
    assert stop_token_ids(load_template("default", tokenizer), tokenizer) == [2]
    tokenizer.eos_token = "<|endoftext|>"
    assert stop_token_ids(load_template("auto", tokenizer), tokenizer) == [2, 0]
    assert stop_token_ids(load_template("qwen", tokenizer), tokenizer) == [2]


def test_wrong_templates_are_one_line(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"data\.template: unknown template 'qwem'. Did you mean 'qwen'\?"):
        load_template("qwem", tokenizer)
    with pytest.raises(InputError, match=r"llama3 needs the token '<\|eot_id\|>', which the tokenizer lacks"):
        load_template("llama3", tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="auto wants a chat template in the tokenizer, got none"):
        load_template("auto", tokenizer)
    assert load_template("auto", tokenizer, "pt").end_of_text == "<|im_end|>"
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="got a tokenizer without one"):
        load_template("default", tokenizer)
