"""From judged rows to token ids: the prompt as inference sees it, once, and the answers to it apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lf_lightning.data.encode import (
    Encoded,
    EncodedRow,
    EncodeOptions,
    Ids,
    RowProblem,
    parsed_rows,
    token_ids,
    truncated_lengths,
)
from lf_lightning.data.judgements import feedback_of, ranked_of
from lf_lightning.data.source import Source
from lf_lightning.data.templates import Template, segments_of
from lf_lightning.types import IGNORE, Conversation, Message, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAIR_FACTS: dict[str, type[np.generic]] = {
    "prompt_length": np.int64,
    "chosen_length": np.int64,
    "margin": np.float64,
}
"""What the store keeps of a pair, whose document is prompt, chosen answer, rejected answer."""
FEEDBACK_FACTS: dict[str, type[np.generic]] = {
    "prompt_length": np.int64,
    "full_prompt_length": np.int64,
    "full_response_length": np.int64,
    "is_desirable": np.bool_,
}
"""What the store keeps of a feedback row, whose document is prompt and answer, each cut to max_length alone.

Lengths before any cut: a prompt is cut once with its own answer and once with its partner's.
"""
FACTS: dict[Task, dict[str, type[np.generic]]] = {"rm": PAIR_FACTS, "dpo": PAIR_FACTS, "kto": FEEDBACK_FACTS}


class Texts(NamedTuple):
    """A row as texts, each tokenized on its own."""

    prompt: tuple[str, ...]
    answers: tuple[str, ...]  # chosen and rejected; of feedback one
    judgement: float  # the margin; of feedback 1 where it was liked, else 0

    def ids(self, ids: Ids) -> tuple[list[int], list[list[int]]]:
        """The tokens of the prompt and of each answer."""
        return [token for text in self.prompt for token in ids[text]], [ids[answer] for answer in self.answers]


def encode_judgements(
    rows: Sequence[dict[str, Any]],
    source: Source,
    options: EncodeOptions,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    first_row: int = 1,
) -> list[EncodedRow | RowProblem]:
    """One document for each row of rm, dpo or kto, or why it has none, in one call of the tokenizer.

    Args:
        rows: Rows as the file has them.
        source: Their dataset.
        options: What decides ids and labels.
        tokenizer: Its special tokens are never added by itself.
        template: The template.
        first_row: Number of the first row, for messages.
    """

    def parse(row: dict[str, Any]) -> Texts:
        if options.task == "kto":
            conversation, is_desirable = feedback_of(row, source)
            prompt, answer = _parts(conversation, template, tokenizer)
            return Texts(prompt, (answer,), float(is_desirable))
        pair = ranked_of(row, source)
        sides = [_parts(_answered(pair.prompt, answer), template, tokenizer) for answer in (pair.chosen, pair.rejected)]
        return _one_prompt(*sides, margin=pair.margin)

    parsed = parsed_rows(rows, first_row, parse)
    texts = [each for each in parsed.values() if isinstance(each, Texts)]
    ids = token_ids((text for each in texts for text in (*each.prompt, *each.answers)), tokenizer)
    encode = _encoded_feedback if options.task == "kto" else _encoded_pair
    results: list[EncodedRow | RowProblem] = []
    for number, each in parsed.items():
        result = encode(each, ids, options.max_length) if isinstance(each, Texts) else each
        if isinstance(result, Encoded):
            results.append(EncodedRow(number, (result,), result.num_cut, "joined"))
        else:
            results.append(RowProblem(number, result) if isinstance(result, str) else result)
    return results


def _answered(prompt: Conversation, answer: Message) -> Conversation:
    return Conversation((*prompt.messages, answer), prompt.tools)


def _parts(
    conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, ...], str]:
    """The prompt, cut as it is tokenized at inference, and the last answer with its stop token."""
    rendered = segments_of(conversation, template, tokenizer, mask_history=True, join_turns=template.by_message)
    *earlier, last = rendered.examples[-1]
    prompt = [segment.text for turn in earlier for segment in (*turn.prompt, *turn.answer)]
    (answer,) = last.answer
    return (*prompt, *(segment.text for segment in last.prompt)), answer.text


def _one_prompt(chosen: tuple[tuple[str, ...], str], rejected: tuple[tuple[str, ...], str], *, margin: float) -> Texts:
    """The two sides with one prompt: the shorter one where the template ends it in two ways, the rest is answer."""
    prompt, _ = min(chosen, rejected, key=lambda side: sum(map(len, side[0])))
    length = sum(map(len, prompt))
    answers = tuple("".join((*texts, answer))[length:] for texts, answer in (chosen, rejected))
    return Texts(prompt, answers, margin)


def _encoded_pair(texts: Texts, ids: Ids, max_length: int) -> Encoded | str:
    """A pair in one document; a string says why there is none."""
    prompt, (chosen, rejected) = texts.ids(ids)
    source, target = truncated_lengths(len(prompt), max(len(chosen), len(rejected)), max_length)
    kept = prompt[:source], chosen[:target], rejected[:target]
    if not prompt:
        return "its prompt has no token"
    if not target:
        return f"its answers keep no token at max_length {max_length}"
    if kept[1] == kept[2]:
        return f"its answers are equal in the {target} tokens that they keep at max_length {max_length}"
    flat = [token for part in kept for token in part]
    labels = [IGNORE] * source + flat[source:]
    facts = {"prompt_length": source, "chosen_length": len(kept[1]), "margin": texts.judgement}
    return Encoded(flat, labels, len(prompt) + len(chosen) + len(rejected) - len(flat), facts)


def _encoded_feedback(texts: Texts, ids: Ids, max_length: int) -> Encoded | str:
    """A judged answer in one document; a string says why there is none."""
    prompt, (response,) = texts.ids(ids)
    source, target = truncated_lengths(len(prompt), len(response), max_length)
    if not prompt:
        return "its prompt has no token"
    if not target:
        return f"its answer keeps no token at max_length {max_length}"
    kept = prompt[:max_length], response[:max_length]
    labels = [IGNORE] * len(kept[0]) + kept[1]
    facts = {
        "prompt_length": len(kept[0]),
        "full_prompt_length": len(prompt),
        "full_response_length": len(response),
        "is_desirable": texts.judgement,
    }
    return Encoded(kept[0] + kept[1], labels, len(prompt) + len(response) - source - target, facts)
