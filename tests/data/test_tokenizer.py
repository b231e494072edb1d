"""Tokenizers load, carry what training needs, and survive saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lf_lightning.data.templates import load_template
from lf_lightning.data.tokenizer import byte_tokenizer, fit_tokenizer, load_tokenizer
from lf_lightning.types import BackboneSpec, InputError

CHAT = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "ok"}]


def test_a_byte_is_a_token() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("hé\n<|im_end|>\x00", add_special_tokens=False) == [107, 198, 172, 13, 2, 3]
    assert len(tokenizer) == 259
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


@pytest.mark.parametrize("text", ["", " a  b\t\n\n", "日本語 🙂 ñ", "".join(map(chr, range(1, 600))), "don't , stop ."])
def test_bytes_decode_to_the_same_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())


def test_the_byte_tokenizer_has_chatml() -> None:
    text = byte_tokenizer().apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["auto", "default", "qwen", "alpaca", "empty"])
def test_a_saved_tokenizer_is_the_same_tokenizer(tmp_path: Path, name: str) -> None:
    tokenizer = byte_tokenizer()
    fit_tokenizer(tokenizer, load_template(name, tokenizer))
    tokenizer.save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path)
    texts = [tokenizer.apply_chat_template(CHAT, tokenize=False), " <|im_start|> é\n\n"]
    assert reopened.apply_chat_template(CHAT, tokenize=False) == texts[0]
    for text in texts:
        assert reopened(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (reopened.eos_token, reopened.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)


def test_the_spec_names_bytes_or_a_folder(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(BackboneSpec(architecture={"model_type": "llama"}, tokenizer="bytes"))) == 259
    assert len(load_tokenizer(BackboneSpec(path="elsewhere", tokenizer=str(tmp_path)))) == 259
    assert len(load_tokenizer(BackboneSpec(path=str(tmp_path)))) == 259


@pytest.mark.parametrize(("eos", "pad"), [("</s>", "</s>"), (None, "a")])
def test_a_missing_pad_token_is_eos_or_token_0(tmp_path: Path, eos: str | None, pad: str) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "u": 2}, unk_token="u"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos).save_pretrained(tmp_path)
    assert load_tokenizer(BackboneSpec(path=str(tmp_path))).pad_token == pad


def test_fitting_sets_eos_only_where_the_template_replaces_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    fit_tokenizer(tokenizer, load_template("default", tokenizer))
    assert tokenizer.eos_token == "<|endoftext|>"
    fit_tokenizer(tokenizer, load_template("qwen", tokenizer))
    assert tokenizer.eos_token == "<|im_end|>"
    assert "You are Qwen" in tokenizer.chat_template


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no tokenizer (none of tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json is broken JSON"),
        ({"tokenizer.json": "{}"}, "no tokenizer can be read from"),
    ],
)
def test_an_unreadable_folder_is_one_line(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        load_tokenizer(BackboneSpec(path=str(tmp_path)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(InputError, match=r"backbone\.tokenizer: \./gone does not exist"):
        load_tokenizer(BackboneSpec(path="x", tokenizer="./gone"))
