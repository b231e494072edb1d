"""Ids and labels follow structure; what is too long is cut as LlamaFactory cuts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lf_lightning.data.encode import EncodedRow, EncodeOptions, RowProblem, encode_rows, truncated_lengths
from lf_lightning.data.prompts import prompt_rows
from lf_lightning.data.source import Source
from lf_lightning.data.sources import load_rows, resolve_sources
from lf_lightning.data.templates import Template, load_template
from lf_lightning.data.tokenizer import byte_tokenizer, fit_tokenizer, load_tokenizer
from lf_lightning.types import IGNORE, BackboneSpec

ALPACA = Source("a", Path("a.json"), columns={"prompt": "q", "response": "a", "history": "h", "system": "s"})
TEXT = Source("t", Path("t.jsonl"), "text")


@pytest.mark.parametrize(
    ("source", "target", "budget", "expected"),
    [
        (3000, 2000, 1000, (600, 400)),
        (2000, 3000, 1000, (400, 600)),
        (1000, 100, 1000, (900, 100)),
        (100, 1000, 1000, (100, 900)),
        (100, 500, 1000, (100, 500)),
        (500, 100, 1000, (500, 100)),
        (10, 10, 1000, (10, 10)),
        (0, 10, 4, (0, 4)),
        (10, 0, 4, (4, 0)),
    ],
)
def test_prompt_and_answer_share_the_budget(source: int, target: int, budget: int, expected: tuple[int, int]) -> None:
    assert truncated_lengths(source, target, budget) == expected


def bytes_of(text: str) -> list[int]:
    return byte_tokenizer().encode(text, add_special_tokens=False)


def encoded(
    row: dict[str, Any], *, template: str = "empty", tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> EncodedRow | RowProblem:
    tokenizer = tokenizer or byte_tokenizer()
    source = TEXT if options.get("task") == "pt" else ALPACA
    loaded = load_template(template, tokenizer, options.get("task", "sft"))
    (result,) = encode_rows([row], source, EncodeOptions(**options), tokenizer, loaded)
    return result


def shown(result: EncodedRow | RowProblem, tokenizer: PreTrainedTokenizerBase | None = None) -> list[tuple[str, str]]:
    """Each example as its text and the text of its labels."""
    assert isinstance(result, EncodedRow), result
    decode = (tokenizer or byte_tokenizer()).decode
    return [(decode(e.input_ids), decode([label for label in e.labels if label != IGNORE])) for e in result.examples]


def test_only_the_answer_and_its_stop_token_are_learned() -> None:
    result = encoded({"q": "ab", "a": "cd"})
    assert isinstance(result, EncodedRow)
    (example,) = result.examples
    assert example.input_ids == [100, 101, 102, 103, 2]  # byte b is 3 + b, eos is 2
    assert example.labels == [-100, -100, 102, 103, 2]
    assert (example.num_cut, result.num_cut, result.way, result.row) == (0, 0, "joined", 1)


def test_train_on_prompt_learns_the_prompt_too() -> None:
    assert shown(encoded({"q": "ab", "a": "cd"}, train_on_prompt=True)) == [("abcd<|im_end|>", "abcd<|im_end|>")]


HISTORY = {"q": "cc", "a": "dd", "h": [["aa", "bb"]]}


def test_every_answer_of_a_conversation_is_learned_unless_history_is_masked() -> None:
    assert shown(encoded(HISTORY)) == [("aabbccdd<|im_end|>", "bbdd<|im_end|>")]
    assert shown(encoded(HISTORY, mask_history=True)) == [("aabbccdd<|im_end|>", "dd<|im_end|>")]


def test_turns_take_their_share_in_turn_and_the_last_first_with_mask_history() -> None:
    # 9 tokens, budget 6: the first turn takes 2 + 2, the second has 2 left for 2 + 3: allowance 2 * 3 // 5 = 1
    assert shown(encoded(HISTORY, max_length=6)) == [("aabbcd", "bbd")]
    # the last turn first: 2 + 3 tokens, then 1 is left for 2 + 2: allowance 1 * 2 // 4 = 0, so the prompt takes it
    assert shown(encoded(HISTORY, max_length=6, mask_history=True)) == [("accdd<|im_end|>", "dd<|im_end|>")]
    result = encoded(HISTORY, max_length=4)
    assert shown(result) == [("aabb", "bb")]
    assert isinstance(result, EncodedRow)
    assert result.num_cut == 5


def test_a_row_that_keeps_no_label_is_a_problem() -> None:
    # T = 5 and S = 100 at C = 8: 8 * 5 // 105 = 0 tokens of the answer
    problem = encoded({"q": "x" * 100, "a": "abcd"}, max_length=8)
    assert problem == RowProblem(1, "keeps no token to learn at max_length 8")


def test_a_first_token_is_never_predicted() -> None:
    assert isinstance(encoded({"q": "ab", "a": "c"}, max_length=1, train_on_prompt=True), RowProblem)


def test_problems_carry_their_row_number() -> None:
    tokenizer = byte_tokenizer()
    rows = [{"q": "a", "a": "b"}, {"q": "a", "a": 3}, {"q": "a"}]
    template = load_template("empty", tokenizer)
    results = encode_rows(rows, ALPACA, EncodeOptions(), tokenizer, template, first_row=1001)
    assert [result.row for result in results] == [1001, 1002, 1003]
    assert results[1:] == [
        RowProblem(1002, "column 'a' must be a string, got 3"),
        RowProblem(1003, "has no answer to learn: the last turn must be the assistant's"),
    ]


def test_a_text_of_pt_ends_in_eos_and_is_cut_only_without_packing() -> None:
    everything = ("abcd<|im_end|>", "abcd<|im_end|>")
    assert shown(encoded({"text": "abcd"}, task="pt")) == [everything]
    assert shown(encoded({"text": "abcd"}, task="pt", max_length=3)) == [("abc", "abc")]
    assert shown(encoded({"text": "abcd"}, task="pt", max_length=3, packing="blocks")) == [everything]


def test_a_text_of_pt_gets_the_bos_that_the_tokenizer_gives() -> None:
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    assert shown(encoded({"text": "a"}, task="pt", tokenizer=tokenizer))[0][0] == "a<|im_end|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert shown(encoded({"text": "a"}, task="pt", tokenizer=tokenizer))[0][0] == "<|im_start|>a<|im_end|>"
    assert shown(encoded({"q": "a", "a": "b"}, tokenizer=tokenizer))[0][0] == "ab<|im_end|>"


def test_pt_with_llama3_ends_texts_with_its_own_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot_id|>", "<|end_of_text|>"]})
    result = encoded({"text": "a"}, task="pt", template="llama3", tokenizer=tokenizer)
    assert shown(result, tokenizer) == [("a<|end_of_text|>", "a<|end_of_text|>")]


def test_packing_and_history_change_nothing_of_a_joined_row() -> None:
    assert shown(encoded(HISTORY, packing="knapsack", history="whole")) == shown(encoded(HISTORY))


def spaced_tokenizer() -> PreTrainedTokenizerBase:
    """Words, where each text gets a space in front: `b` alone is `▁b`, after `a` without a space another word."""
    words = ["</s>", "u", *(f"▁{letter}" for letter in "abcd"), "▁ab", "▁abcd", "▁bc"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="u"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    jinja = "{%- for m in messages %}{{- m.content }}{%- endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = jinja
    return tokenizer


def test_auto_keeps_the_prompt_whole_where_cutting_it_changes_its_tokens() -> None:
    tokenizer = spaced_tokenizer()
    row = {"q": " c", "a": " d", "h": [["a", "b"]]}
    result = encoded(row, template="auto", tokenizer=tokenizer)
    assert isinstance(result, EncodedRow)
    # whole, the prompt of the second turn is "ab c"; cut at the answer it would be "a", "b", " c"
    assert result.way == "per_turn"
    assert [(e.input_ids, e.labels) for e in result.examples] == [
        ([2, 3, 0], [-100, 3, 0]),
        ([6, 4, 5, 0], [-100, -100, 5, 0]),
    ]
    masked = encoded(row, template="auto", tokenizer=tokenizer, mask_history=True)
    assert isinstance(masked, EncodedRow)
    assert masked.examples == result.examples[1:]
    named = encoded(row, template="empty", tokenizer=tokenizer)
    assert isinstance(named, EncodedRow)
    assert named.examples[0].input_ids == [2, 3, 4, 5, 0]  # LlamaFactory's way


# ---------------------------------------------------------------- real rows, against an independent computation

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def independent_qwen(row: dict[str, Any], tokenizer: Tokenizer, limit: int) -> tuple[list[int], list[int]]:
    """LlamaFactory's encoding of an alpaca row with template qwen, from reference/llamafactory.md alone."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    system = row.get("system") or QWEN_SYSTEM
    question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
    ids: list[int] = []
    labels: list[int] = []
    for number, (user, answer) in enumerate([*row.get("history", []), (question, row["output"])]):
        prompt = ids_of(f"<|im_start|>system\n{system}<|im_end|>\n") if number == 0 else []
        prompt += ids_of(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
        response = ids_of(f"{answer}<|im_end|>\n")
        room = limit - len(ids)
        if room <= 0:
            break
        if 2 * len(response) < room:
            allowance = room
        elif 2 * len(prompt) < room:
            allowance = room - len(prompt)
        else:
            allowance = room * len(response) // (len(response) + len(prompt))
        response = response[:allowance]
        prompt = prompt[: max(room - len(response), 0)]
        ids += prompt + response
        labels += [IGNORE] * len(prompt) + response
    return ids, labels


def real(parity: Path, name: str, template: str) -> tuple[Source, PreTrainedTokenizerBase, Template]:
    tokenizer = load_tokenizer(BackboneSpec(path=str(parity / "model")))
    loaded = load_template(template, tokenizer)
    fit_tokenizer(tokenizer, loaded)
    return resolve_sources([name], str(parity / "data"))[0], tokenizer, loaded


@pytest.mark.parametrize("limit", [512, 150, 60])
@pytest.mark.parametrize("name", ["alpaca_en_demo", "multi_turn"])
def test_qwen_gives_llamafactorys_ids_and_labels(parity: Path, name: str, limit: int) -> None:
    source, tokenizer, template = real(parity, name, "qwen")
    plain = Tokenizer.from_file(str(parity / "model" / "tokenizer.json"))
    rows = load_rows(source)
    results = encode_rows(rows, source, EncodeOptions(max_length=limit), tokenizer, template)
    assert len(rows) in (96, 24)
    for row, result in zip(rows, results, strict=True):
        assert isinstance(result, EncodedRow)
        (example,) = result.examples
        assert (example.input_ids, example.labels) == independent_qwen(row, plain, limit)


def test_auto_gives_the_ids_of_the_whole_rendering(parity: Path) -> None:
    source, tokenizer, template = real(parity, "multi_turn", "auto")
    plain = Tokenizer.from_file(str(parity / "model" / "tokenizer.json"))
    rows = load_rows(source)
    for row, result in zip(rows, encode_rows(rows, source, EncodeOptions(), tokenizer, template), strict=True):
        ((question, answer),) = row["history"]
        last = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        head = f"<|im_start|>system\n{row['system']}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        middle = f"<|im_start|>user\n{last}<|im_end|>\n<|im_start|>assistant\n"
        texts = [head + "<|im_start|>assistant\n", f"{answer}<|im_end|>\n", middle, f"{row['output']}<|im_end|>\n"]
        parts = [plain.encode(text, add_special_tokens=False).ids for text in texts]
        assert isinstance(result, EncodedRow)
        (example,) = result.examples
        assert example.input_ids == plain.encode("".join(texts), add_special_tokens=False).ids
        learned = [IGNORE] * len(parts[0]) + parts[1] + [IGNORE] * len(parts[2]) + parts[3]
        assert example.labels == learned


@pytest.mark.parametrize("template", ["auto", "qwen", "chatml", "default", "alpaca", "empty"])
@pytest.mark.parametrize("name", ["multi_turn", "alpaca_en_demo"])
def test_training_starts_with_the_prompt_of_inference(parity: Path, name: str, template: str) -> None:
    source, tokenizer, loaded = real(parity, name, template)
    options = EncodeOptions(max_length=100_000)
    results = encode_rows(load_rows(source), source, options, tokenizer, loaded)
    for prompt, result in zip(prompt_rows([source], tokenizer, loaded), results, strict=True):
        assert isinstance(result, EncodedRow)
        ids, labels = result.examples[0].input_ids, result.examples[0].labels
        assert ids[: len(prompt.ids)] == list(prompt.ids)
        assert IGNORE not in labels[len(prompt.ids) :]
        assert labels[len(prompt.ids) - 1] == IGNORE
        assert prompt.reference in tokenizer.decode(ids[len(prompt.ids) :])


def test_tool_rows_of_glaive_are_problems_of_a_template_without_tools(shared: Path) -> None:
    _, tokenizer, template = real(shared / "parity", "identity", "auto")
    (source,) = resolve_sources(["glaive_toolcall_en_demo"], str(shared / "data"))
    results = encode_rows(load_rows(source), source, EncodeOptions(), tokenizer, template)
    reasons = [result.reason for result in results if isinstance(result, RowProblem)]
    assert len(results) == 300
    assert reasons.count("holds tool calls, which this template cannot show") == 153
    assert reasons.count("lists tools, which this template cannot show") == 38
    assert len(reasons) == 191


def test_identity_and_json_rows_are_untouched(shared: Path) -> None:
    (source,) = resolve_sources(["identity"], str(shared / "data"))
    assert load_rows(source) == json.loads((shared / "data" / "identity.json").read_text(encoding="utf-8"))
