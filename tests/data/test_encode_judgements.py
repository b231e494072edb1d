"""One prompt, the answers to it apart: ids, labels and cuts worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from lf_lightning.data.encode import Encoded, EncodedRow, EncodeOptions, RowProblem
from lf_lightning.data.encode_judgements import encode_judgements
from lf_lightning.data.prompts import prompt_rows
from lf_lightning.data.source import Source
from lf_lightning.data.templates import load_template
from lf_lightning.data.tokenizer import byte_tokenizer, load_tokenizer
from lf_lightning.types import IGNORE, BackboneSpec, Task

PAIRS = Source(
    "p", Path("p"), columns={"prompt": "q", "history": "h", "chosen": "c", "rejected": "r", "margin": "m"}, ranking=True
)
TAGS = Source("t", Path("t"), columns={"prompt": "q", "response": "a", "history": "h", "kto_tag": "good"})
N = IGNORE


def encoded(
    row: dict[str, Any],
    task: Task = "dpo",
    *,
    template: str = "empty",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int = 64,
) -> EncodedRow | RowProblem:
    tokenizer = tokenizer or byte_tokenizer()
    source, given = (TAGS, row) if task == "kto" else (PAIRS, {"m": 0, **row})
    options = EncodeOptions(task, max_length)
    (result,) = encode_judgements([given], source, options, tokenizer, load_template(template, tokenizer))
    return result


def only(result: EncodedRow | RowProblem) -> Encoded:
    assert isinstance(result, EncodedRow), result
    (example,) = result.examples
    return example


def parts(example: Encoded) -> tuple[list[int], list[int], list[int]]:
    prompt, chosen = int(example.facts["prompt_length"]), int(example.facts["chosen_length"])
    ids = example.input_ids
    return ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :]


@pytest.mark.parametrize("task", ["rm", "dpo"])
def test_a_pair_is_prompt_chosen_rejected_and_learns_the_answers(task: Task) -> None:
    result = encoded({"q": "ab", "c": "cd", "r": "e", "m": 1.5}, task)
    example = only(result)
    assert example.input_ids == [100, 101, 102, 103, 2, 104, 2]  # byte b is 3 + b, eos is 2
    assert example.labels == [N, N, 102, 103, 2, 104, 2]
    assert example.facts == {"prompt_length": 2, "chosen_length": 3, "margin": 1.5}
    assert isinstance(result, EncodedRow)
    assert (result.num_cut, result.way) == (0, "joined")


def test_feedback_is_prompt_and_answer() -> None:
    example = only(encoded({"q": "ab", "a": "cd", "good": True}, "kto"))
    assert example.input_ids == [100, 101, 102, 103, 2]
    assert example.labels == [N, N, 102, 103, 2]
    assert example.facts == {"prompt_length": 2, "full_prompt_length": 2, "full_response_length": 3, "is_desirable": 1}
    assert only(encoded({"q": "ab", "a": "cd", "good": False}, "kto")).facts["is_desirable"] == 0


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "budget", "kept"),
    [  # lengths of the texts; an answer has a stop token more, and the longer answer decides
        (3000, 1999, 7, 1000, (600, 400, 8)),
        (3000, 7, 1999, 1000, (600, 8, 400)),
        (2000, 2999, 1500, 1000, (400, 600, 600)),
        (1000, 99, 50, 1000, (900, 100, 51)),
        (100, 999, 1200, 1000, (100, 900, 900)),
        (100, 20, 499, 1000, (100, 21, 500)),
        (10, 9, 8, 1000, (10, 10, 9)),
    ],
)
def test_a_pair_is_cut_by_its_longer_answer(
    prompt: int, chosen: int, rejected: int, budget: int, kept: tuple[int, int, int]
) -> None:
    result = encoded({"q": "p" * prompt, "c": "c" * chosen, "r": "r" * rejected}, max_length=budget)
    assert tuple(map(len, parts(only(result)))) == kept
    assert isinstance(result, EncodedRow)
    assert result.num_cut == prompt + chosen + rejected + 2 - sum(kept)


def test_feedback_keeps_what_a_partner_may_need() -> None:
    # alone: 2 x 9 >= 12 and 2 x 8 >= 12, so 12 x 9 // 17 = 6 of the answer and 6 of the prompt; 5 are cut
    result = encoded({"q": "p" * 8, "a": "a" * 8, "good": True}, "kto", max_length=12)
    example = only(result)
    assert len(example.input_ids) == 17
    assert isinstance(result, EncodedRow)
    assert result.num_cut == 5
    # nothing beyond max_length can serve
    facts = only(encoded({"q": "p" * 20, "a": "a" * 30, "good": True}, "kto", max_length=12)).facts
    assert facts == {"prompt_length": 12, "full_prompt_length": 20, "full_response_length": 31, "is_desirable": 1}


def test_a_pair_that_the_cut_makes_equal_or_empty_is_a_problem() -> None:
    # 2 x 8 >= 8 and 2 x 2 < 8: answers keep 6 tokens, which are six c on both sides
    row = {"q": "ab", "c": "c" * 6, "r": "c" * 7}
    assert encoded(row, max_length=8) == RowProblem(
        1, "its answers are equal in the 6 tokens that they keep at max_length 8"
    )
    assert isinstance(encoded(row, max_length=9), EncodedRow)
    # T = 5 and S = 100 at C = 8: 8 x 5 // 105 = 0
    assert encoded({"q": "x" * 100, "c": "abcd", "r": "a"}, max_length=8) == RowProblem(
        1, "its answers keep no token at max_length 8"
    )


def test_feedback_that_the_cut_leaves_empty_is_a_problem() -> None:
    assert encoded({"q": "x" * 100, "a": "abcd", "good": True}, "kto", max_length=8) == RowProblem(
        1, "its answer keeps no token at max_length 8"
    )


def test_problems_carry_their_row_number() -> None:
    tokenizer = byte_tokenizer()
    rows = [
        {"q": "a", "c": "b", "r": "c", "m": 0},
        {"q": "a", "c": "b", "r": "b", "m": 0},
        {"q": "a", "r": "b", "m": 0},
    ]
    template = load_template("empty", tokenizer)
    results = encode_judgements(rows, PAIRS, EncodeOptions("dpo"), tokenizer, template, first_row=1001)
    assert [result.row for result in results] == [1001, 1002, 1003]
    assert results[1] == RowProblem(1002, "columns 'c' and 'r' are equal")


HISTORY = {"q": "cc", "h": [["aa", "bb"]]}


def check_prompts(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """The prompt in training is the prompt at inference, token by token, and the answers decode to what was given."""
    template = load_template(name, tokenizer)
    for source, row in (
        (PAIRS, {**HISTORY, "c": "yes", "r": "no", "m": 0}),
        (TAGS, {**HISTORY, "a": "yes", "good": True}),
    ):
        task: Task = "kto" if source is TAGS else "rm"
        records = Source(source.name, None, "alpaca", source.columns, {}, source.ranking, (row,))
        (prompt,) = prompt_rows([records], tokenizer, template, task=task)
        (result,) = encode_judgements([row], source, EncodeOptions(task), tokenizer, template)
        example = only(result)
        length = int(example.facts["prompt_length"])
        assert tuple(example.input_ids[:length]) == prompt.ids
        assert example.labels == [N] * length + example.input_ids[length:]
        assert prompt.reference == "yes"
        stop = template.stop_tokens[0]
        answer = tokenizer.decode(example.input_ids[length:])
        assert "".join(answer.split()) == (f"yes{stop}" if task == "kto" else f"yes{stop}no{stop}")


@pytest.mark.parametrize("name", ["auto", "chatml", "default", "empty"])
def test_the_prompt_is_what_inference_sees(name: str) -> None:
    check_prompts(byte_tokenizer(), name)


@pytest.mark.parametrize("name", ["auto", "qwen"])
def test_the_prompt_of_a_real_tokenizer_is_what_inference_sees(name: str, parity: Path) -> None:
    check_prompts(load_tokenizer(BackboneSpec(path=str(parity / "model"))), name)


def test_a_whole_prompt_is_whole_with_a_tokenizer_that_opens_each_text_with_a_space() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert tokenizer.encode("a", add_special_tokens=False) == [35, 100]
    check_prompts(tokenizer, "auto")


THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<t>{% endif %}"
)


def test_sides_that_end_the_prompt_in_two_ways_share_the_shorter_one() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    decode = tokenizer.decode
    for chosen, rejected in (("<t>x", "y"), ("y", "<t>x")):
        example = only(encoded({"q": "Q", "c": chosen, "r": rejected}, template="auto", tokenizer=tokenizer))
        texts = [decode(ids) for ids in parts(example)]
        assert texts == ["[user]Q[assistant]", f"{chosen}<|im_end|>", f"{rejected}<|im_end|>"]
    example = only(encoded({"q": "Q", "c": "<t>x", "r": "<t>y"}, template="auto", tokenizer=tokenizer))
    texts = [decode(ids) for ids in parts(example)]
    assert texts == ["[user]Q[assistant]<t>", "x<|im_end|>", "y<|im_end|>"]
