"""From rows to token ids and labels: what is learned is known from structure, what is too long is cut by rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from lf_lightning.data.formats import RowError, conversation_of, require_answer, text_of
from lf_lightning.data.source import Source
from lf_lightning.data.templates import Example, History, Rendered, Template, Way, segments_of
from lf_lightning.types import IGNORE, Segment, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = dict[str, list[int]]
"""Token ids of each text of a batch."""

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class EncodeOptions:
    """What decides ids and labels, beside the rows, the template and the tokenizer.

    Args:
        task: `pt` learns every token of a text, `sft` the answers of a conversation, `rm` and `dpo` the two answers
            of a pair, `kto` the answer that is judged.
        max_length: Most tokens of an example, > 0. Texts of pt are cut only where nothing is packed.
        packing: How units are made later.
        train_on_prompt: Learn the prompts too.
        mask_history: Learn the last answer only, and cut earlier turns first.
        history: Rows whose earlier turns the template rewrites: an example for each turn, or the last turn only.
    """

    task: Task = "sft"
    max_length: int = 2048
    packing: Literal["none", "blocks", "knapsack"] = "none"
    train_on_prompt: bool = False
    mask_history: bool = False
    history: History = "per_turn"


class Encoded(NamedTuple):
    """One token sequence."""

    input_ids: list[int]
    labels: list[int]  # not shifted: the id where the token is learned, else IGNORE
    num_cut: int  # tokens that did not fit into max_length
    facts: Mapping[str, float] = MappingProxyType({})  # what else the store keeps of it: `encode_judgements.FACTS`


class EncodedRow(NamedTuple):
    """What became of a row: its examples, at least one."""

    row: int  # 1-based
    examples: tuple[Encoded, ...]
    num_cut: int  # tokens cut from all its examples, and of examples that kept nothing to learn
    way: Way


class RowProblem(NamedTuple):
    """Why a row cannot be used."""

    row: int  # 1-based
    reason: str


class _Piece(NamedTuple):
    ids: list[int]
    learn: bool


def truncated_lengths(source: int, target: int, budget: int) -> tuple[int, int]:
    """Tokens that a prompt and its answer keep, both from their beginning.

    T < C/2: the answer stays whole; else S < C/2: the prompt stays whole; else both shrink in proportion.

    Args:
        source: Tokens of the prompt, S.
        target: Tokens of the answer, T.
        budget: Tokens for both, C.

    Source: LlamaFactory's infer_seqlen, so that its users' rows are cut where they were.
    """
    if 2 * target < budget:
        allowance = budget
    elif 2 * source < budget:
        allowance = budget - source
    else:
        allowance = budget * target // (source + target)
    kept = min(target, allowance)
    return min(source, max(budget - kept, 0)), kept


def encode_rows(
    rows: Sequence[dict[str, Any]],
    source: Source,
    options: EncodeOptions,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    first_row: int = 1,
) -> list[EncodedRow | RowProblem]:
    """Ids and labels of a batch of rows of pt or sft, or why a row has none, in one call of the tokenizer.

    Args:
        rows: Rows as the file has them.
        source: Their dataset.
        options: What decides ids and labels.
        tokenizer: Its special tokens are never added by itself, except a bos that it gives every text of pt.
        template: The template; of pt only the end of a text.
        first_row: Number of the first row, for messages.
    """
    encode = _encode_texts if options.task == "pt" else _encode_conversations
    return encode(rows, source, options, tokenizer, template, first_row=first_row)


def token_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Ids of each text, in one call and without added special tokens."""
    unique = list(dict.fromkeys(texts))
    if not unique:
        return {}
    encoding = tokenizer(
        unique,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return dict(zip(unique, encoding["input_ids"], strict=True))


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The bos token where the tokenizer gives one to every text, else nothing."""
    added = tokenizer("", return_attention_mask=False)["input_ids"]
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id in added[:1] else []


def parsed_rows(
    rows: Sequence[dict[str, Any]], first_row: int, parse: Callable[[dict[str, Any]], Parsed]
) -> dict[int, Parsed | RowProblem]:
    """What `parse` makes of each row, or why it cannot use it, by row number."""
    parsed: dict[int, Parsed | RowProblem] = {}
    for number, row in enumerate(rows, start=first_row):
        try:
            parsed[number] = parse(row)
        except RowError as error:
            parsed[number] = RowProblem(number, str(error))
    return parsed


def _encode_texts(
    rows: Sequence[dict[str, Any]],
    source: Source,
    options: EncodeOptions,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    first_row: int,
) -> list[EncodedRow | RowProblem]:
    texts = parsed_rows(rows, first_row, lambda row: text_of(row, source) + template.end_of_text)
    ids = token_ids((text for text in texts.values() if isinstance(text, str)), tokenizer)
    bos = bos_ids(tokenizer)
    limit = options.max_length if options.packing == "none" else None
    return [
        _checked(number, [_encoded_text(bos + ids[text], limit)], "joined", options) if isinstance(text, str) else text
        for number, text in texts.items()
    ]


def _encoded_text(ids: list[int], limit: int | None) -> Encoded:
    kept = ids[:limit]
    return Encoded(kept, list(kept), len(ids) - len(kept))


def _checked(number: int, examples: list[Encoded], way: Way, options: EncodeOptions) -> EncodedRow | RowProblem:
    """The row without examples that keep nothing to learn (the first token of an example is never predicted)."""
    kept = tuple(example for example in examples if any(label != IGNORE for label in example.labels[1:]))
    if not kept:
        return RowProblem(number, f"keeps no token to learn at max_length {options.max_length}")
    num_cut = sum(example.num_cut for example in examples)
    lost = sum(len(example.input_ids) for example in examples) - sum(len(example.input_ids) for example in kept)
    return EncodedRow(number, kept, num_cut + lost, way)


def _encode_conversations(
    rows: Sequence[dict[str, Any]],
    source: Source,
    options: EncodeOptions,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    *,
    first_row: int,
) -> list[EncodedRow | RowProblem]:
    def parse(row: dict[str, Any], join_turns: bool = True) -> Rendered:
        conversation = conversation_of(row, source)
        require_answer(conversation)
        return segments_of(
            conversation,
            template,
            tokenizer,
            history=options.history,
            mask_history=options.mask_history,
            train_on_prompt=options.train_on_prompt,
            join_turns=join_turns,
        )

    rendered = parsed_rows(rows, first_row, parse)
    whole = {number: _whole_prompt(each, template) for number, each in rendered.items() if isinstance(each, Rendered)}
    ids = token_ids(_texts(rendered.values(), whole.values()), tokenizer)
    differing = [number for number, text in whole.items() if text and _differs(rendered[number], text, ids)]
    apart = {number: parse(rows[number - first_row], join_turns=False) for number in differing}
    ids |= token_ids(_texts(apart.values(), ()), tokenizer)
    results: list[EncodedRow | RowProblem] = []
    for number, parsed in (rendered | apart).items():
        if isinstance(parsed, Rendered):
            examples = [_encoded(example, ids, options) for example in parsed.examples]
            results.append(_checked(number, examples, parsed.way, options))
        else:
            results.append(parsed)
    return results


def _segments(example: Example) -> list[Segment]:
    return [segment for turn in example for segment in (*turn.prompt, *turn.answer)]


def _texts(rendered: Iterable[Rendered | RowProblem], others: Iterable[str | None]) -> list[str]:
    texts = [text for text in others if text]
    for each in rendered:
        if isinstance(each, Rendered):
            texts += [segment.text for example in each.examples for segment in _segments(example)]
    return texts


def _prompt_segments(rendered: Rendered) -> list[Segment]:
    """All segments before the last answer of the one example."""
    (example,) = rendered.examples
    return [*_segments(example[:-1]), *example[-1].prompt]


def _whole_prompt(rendered: Rendered, template: Template) -> str | None:
    """The last inference prompt, where training cuts it and inference does not."""
    if template.by_message or rendered.way != "joined" or len(rendered.examples[0]) == 1:
        return None
    return "".join(segment.text for segment in _prompt_segments(rendered))


def _differs(rendered: Rendered | RowProblem, whole: str, ids: Ids) -> bool:
    assert isinstance(rendered, Rendered)
    cut = [token for segment in _prompt_segments(rendered) for token in ids[segment.text]]
    return cut != ids[whole]


def _encoded(example: Example, ids: Ids, options: EncodeOptions) -> Encoded:
    """Ids and labels of an example; each turn takes its share of what the turns before it left.

    With `mask_history` the last turn is served first.
    """
    kept: list[list[_Piece]] = []
    budget = options.max_length
    total = sum(len(ids[segment.text]) for segment in _segments(example))
    for turn in reversed(example) if options.mask_history else example:
        if budget <= 0:
            break
        prompt, answer = ([_Piece(ids[text], learn) for text, learn in part] for part in (turn.prompt, turn.answer))
        source, target = truncated_lengths(_size(prompt), _size(answer), budget)
        kept.append(_prefix(prompt, source) + _prefix(answer, target))
        budget -= source + target
    turns = reversed(kept) if options.mask_history else kept
    pieces = [piece for turn_pieces in turns for piece in turn_pieces]
    input_ids = [token for piece in pieces for token in piece.ids]
    labels = [token if piece.learn else IGNORE for piece in pieces for token in piece.ids]
    return Encoded(input_ids, labels, total - len(input_ids))


def _size(pieces: list[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _prefix(pieces: list[_Piece], length: int) -> list[_Piece]:
    """The first `length` tokens of the pieces."""
    kept = []
    for piece in pieces:
        kept.append(_Piece(piece.ids[:length], piece.learn))
        length -= len(kept[-1].ids)
    return kept
