"""How a conversation is shown to the model: one chat template renders training text and inference prompt alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lf_lightning.data.formats import RowError
from lf_lightning.data.sources import nearest
from lf_lightning.types import Conversation, InputError, Message, Segment, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = Path(__file__).parent / "named"
PROBE = "ProbeOfTheAnswer"

History = Literal["per_turn", "whole"]
Way = Literal["joined", "per_turn", "last_turn"]


@dataclass(frozen=True)
class Template:
    """A chat template and what belongs to it.

    Args:
        name: `auto`, or the name of a template in `named/`.
        jinja: Text of the chat template.
        stop_tokens: Tokens that end an answer, the usual one first.
        end_of_text: Token that ends a document of pt.
        replace_eos: The first stop token becomes the tokenizer's eos.
        by_message: Each message's text is tokenized on its own (LlamaFactory's way, kept by the named templates);
            otherwise the whole prompt is.
        opening: Characters before the first turn of the user where no system text is given; named templates only.
        closing_tokens: All control tokens: an answer that ends in one of them needs no further stop token.
    """

    name: str
    jinja: str
    stop_tokens: tuple[str, ...]
    end_of_text: str
    replace_eos: bool = False
    by_message: bool = False
    opening: int = 0
    closing_tokens: tuple[str, ...] = ()


class Turn(NamedTuple):
    """A prompt and the answer to it. Truncation gives each turn its share of the budget."""

    prompt: tuple[Segment, ...]
    answer: tuple[Segment, ...]


Example = tuple[Turn, ...]
"""One token sequence to be: its turns in order."""


class Rendered(NamedTuple):
    """What a conversation becomes: one example, or one for each turn of the assistant."""

    examples: tuple[Example, ...]
    way: Way  # joined: one example, all turns; per_turn: one for each turn; last_turn: one, only the last turn learned


class _View(NamedTuple):
    """One turn of the assistant as inference saw it, and just after it."""

    cut: int  # characters of `text` that are prompt; the rest is the answer
    text: str  # messages up to and with the answer


def load_template(name: str, tokenizer: PreTrainedTokenizerBase, task: Task = "sft") -> Template:
    """The template called `name`; call it before `fit_tokenizer`.

    Args:
        name: `auto` for the chat template that the tokenizer carries, or a named one: default, empty, chatml, qwen,
            llama3, alpaca.
        tokenizer: Its vocabulary must have the stop tokens.
        task: With `pt` no chat template is rendered, and `auto` asks for none.

    Raises:
        InputError: No template has this name, the tokenizer carries none, or it lacks a stop token.
    """
    if name == "auto":
        return _auto_template(tokenizer, task)
    table = json.loads((NAMED / "templates.json").read_text(encoding="utf-8"))
    if name not in table:
        raise InputError(f"data.template: unknown template {name!r}.{nearest(name, ['auto', *table])}")
    entry = table[name]
    stops = tuple(entry["stop_tokens"])
    if not entry["replace_eos"]:
        stops = (*stops, _eos_token(tokenizer, f"data.template: {name}"))
    end_of_text = entry.get("end_of_text", stops[0])
    _check_vocabulary((*stops, end_of_text) if task == "pt" else stops, tokenizer, name)
    jinja = (NAMED / f"{name}.jinja").read_text(encoding="utf-8")
    opening, specials = _opening(jinja, tokenizer), _special_tokens(tokenizer)
    return Template(name, jinja, stops, end_of_text, entry["replace_eos"], True, opening, specials)


def _auto_template(tokenizer: PreTrainedTokenizerBase, task: Task) -> Template:
    jinja: Any = tokenizer.chat_template
    if isinstance(jinja, dict):
        jinja = jinja.get("default")
    if not jinja and task != "pt":
        raise InputError(
            "data.template: auto wants a chat template in the tokenizer, got none. Use a chat model's tokenizer, or "
            "set data.template to default, empty, chatml, qwen, llama3 or alpaca."
        )
    specials = _special_tokens(tokenizer)
    closing = _closing_token(jinja, tokenizer, specials) if jinja else None
    eos = tokenizer.eos_token if closing and task != "pt" else _eos_token(tokenizer, "data.template: auto")
    stops = tuple(dict.fromkeys(str(token) for token in (closing, eos) if token))
    return Template("auto", jinja or "", stops, str(eos or stops[0]), closing_tokens=specials)


def _eos_token(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if tokenizer.eos_token is None:
        raise InputError(f"{where} ends answers with the tokenizer's eos token, got a tokenizer without one. Set it.")
    return str(tokenizer.eos_token)


def _check_vocabulary(tokens: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise InputError(
                f"data.template: {name} needs the token {token!r}, which the tokenizer lacks. "
                f"Set data.template to auto or default, or take the tokenizer that {name} was made for."
            )


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*map(str, tokenizer.all_special_tokens), *added]))


def _closing_token(jinja: str, tokenizer: PreTrainedTokenizerBase, specials: tuple[str, ...]) -> str | None:
    """The first control token after an answer, None where the template closes answers with none."""
    probe = Conversation((Message("user", "a"), Message("assistant", PROBE)))
    try:
        text = _render(probe, jinja, tokenizer, prompt=False)
    except RowError:
        return None
    tail = text.rpartition(PROBE)[2]
    return min((token for token in specials if token in tail), key=tail.index, default=None)


def stop_token_ids(template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the tokens that end generation."""
    ids = tokenizer.convert_tokens_to_ids(list(template.stop_tokens))
    assert isinstance(ids, list)
    return ids


def prompt_of(conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that generation starts from: all turns but a last answer, then the header of the answer.

    Raises:
        RowError: The template refuses the conversation, or cannot show its tools.
    """
    return _render(_asked(conversation, template), template.jinja, tokenizer, prompt=True)


def prompt_segments(
    conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[Segment, ...]:
    """The same text cut as it is tokenized: at messages for named templates, else not at all.

    The ids of these segments are the ids of the prompt in training.

    Raises:
        RowError: The template refuses the conversation, or cannot show its tools.
    """
    asked = _asked(conversation, template)
    text = _render(asked, template.jinja, tokenizer, prompt=True)
    if not template.by_message:
        return (Segment(text, False),)
    cuts = _message_ends(asked, template, tokenizer)
    cuts += [edge for view in _views(asked, template, tokenizer) for edge in (view.cut, len(view.text))]
    return _pieces(text, 0, len(text), sorted(cuts), learn=False)


def _asked(conversation: Conversation, template: Template) -> Conversation:
    messages = conversation.messages
    if messages[-1].role == "assistant":
        messages = messages[:-1]
    asked = Conversation(messages, conversation.tools)
    _check_tools(asked, template)
    return asked


def _check_tools(conversation: Conversation, template: Template) -> None:
    if any(message.tool_calls for message in conversation.messages) and "tool_calls" not in template.jinja:
        raise RowError("holds tool calls, which this template cannot show")
    if conversation.tools and "tools" not in template.jinja:
        raise RowError("lists tools, which this template cannot show")


def segments_of(
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    *,
    history: History = "per_turn",
    mask_history: bool = False,
    train_on_prompt: bool = False,
    join_turns: bool = True,
) -> Rendered:
    """The training text of a conversation, cut where learning starts and stops.

    Turn i learns what `render(messages[:i+1])` has beyond the inference prompt `render(messages[:i])`; where the
    template changes the end of that prompt, beyond what the two have in common. An answer that ends in no control
    token gets the stop token. All turns are one example unless the template rewrites earlier turns.

    Args:
        conversation: It ends with an answer.
        template: The template.
        tokenizer: Renders the template, with its special tokens.
        history: Where earlier turns are rewritten: `per_turn` makes an example of each turn, as of that turn;
            `whole` makes one of the whole conversation and learns the last turn only.
        mask_history: Learn the last turn only.
        train_on_prompt: Learn the prompts too.
        join_turns: False makes examples of one turn each even where the template would allow one for all.

    Raises:
        RowError: The template refuses the conversation, or cannot show its tools.
    """
    messages = conversation.messages
    assert messages[-1].role == "assistant"
    _check_tools(conversation, template)
    views = _views(conversation, template, tokenizer)
    chained = all(
        later.text.startswith(earlier.text) and later.cut >= len(earlier.text) for earlier, later in pairwise(views)
    )
    cuts = _message_ends(conversation, template, tokenizer) if template.by_message else []
    if len(views) == 1 or (chained and join_turns):
        starts = [0, *(len(view.text) for view in views[:-1])]
        turns = tuple(
            _turn(view, start, cuts, learn=not mask_history or view is views[-1], prompt=train_on_prompt)
            for view, start in zip(views, starts, strict=True)
        )
        return Rendered(((*turns[:-1], _closed(turns[-1], template)),), "joined")
    last_only = mask_history or history == "whole"
    chosen = views[-1:] if last_only else views
    turns = tuple(_turn(view, 0, cuts, learn=True, prompt=train_on_prompt) for view in chosen)
    return Rendered(tuple((_closed(turn, template),) for turn in turns), "last_turn" if last_only else "per_turn")


def _views(conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[_View]:
    views = []
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant":
            before, after = (
                Conversation(conversation.messages[:end], conversation.tools) for end in (index, index + 1)
            )
            prompt = _render(before, template.jinja, tokenizer, prompt=True)
            text = _render(after, template.jinja, tokenizer, prompt=False)
            views.append(_View(_common_length(prompt, text), text))
    return views


def _common_length(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next(position for position in range(len(a)) if a[position] != b[position : position + 1])


def _turn(view: _View, start: int, cuts: list[int], *, learn: bool, prompt: bool) -> Turn:
    answer = Segment(view.text[view.cut :], learn)
    return Turn(_pieces(view.text, start, view.cut, cuts, learn=prompt), (answer,) if answer.text else ())


def _closed(turn: Turn, template: Template) -> Turn:
    """The turn with a stop token after its answer, where it has none."""
    text = turn.answer[0].text if turn.answer else ""
    if text.rstrip().endswith((*template.stop_tokens, *template.closing_tokens)):
        return turn
    return Turn(turn.prompt, (Segment(text + template.stop_tokens[0], True),))


def _pieces(text: str, start: int, end: int, cuts: list[int], *, learn: bool) -> tuple[Segment, ...]:
    edges = [start, *(cut for cut in cuts if start < cut < end), end]
    return tuple(Segment(text[a:b], learn) for a, b in pairwise(edges) if a < b)


def _message_ends(conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Characters after which a message follows one that is not an answer: where named templates cut a prompt.

    A named template writes a message the same way wherever it stands, so the rendering of the first messages is the
    beginning of the rendering of all.
    """
    messages = conversation.messages
    ends = [template.opening] if messages[0].role != "system" else []
    for end in range(1, len(messages)):
        if "assistant" not in (messages[end - 1].role, messages[end].role):
            ends.append(len(_render(Conversation(messages[:end]), template.jinja, tokenizer, prompt=False)))
    return ends


def _opening(jinja: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters that a named template writes before the first turn of the user: its bos and default system text."""
    system, user = Message("system", ""), Message("user", "")
    alone, empty, both = (
        len(_render(Conversation(messages), jinja, tokenizer, prompt=False))
        for messages in ((user,), (system,), (system, user))
    )
    return alone - (both - empty)


def _render(conversation: Conversation, jinja: str, tokenizer: PreTrainedTokenizerBase, *, prompt: bool) -> str:
    from jinja2 import TemplateError

    tools: list[Any] = [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in conversation.tools
    ]
    try:
        text = tokenizer.apply_chat_template(
            [_as_dict(message) for message in conversation.messages],
            tools=tools or None,
            chat_template=jinja,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except TemplateError as error:
        raise RowError(f"the chat template refuses it: {' '.join(str(error).split())}") from error
    assert isinstance(text, str)
    return text


def _as_dict(message: Message) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        shown["tool_calls"] = [{"type": "function", "function": call} for call in message.tool_calls]
    return shown
