"""Text to tokens and back: the tokenizer of a model folder, or one token per byte for models made from scratch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lf_lightning.console import say
from lf_lightning.data.templates import NAMED, Template
from lf_lightning.types import BackboneSpec, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)


def load_tokenizer(spec: BackboneSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone, with a pad token: its own, else its eos, else the token with id 0.

    Training never looks at the pad token: what counts is told by masks.

    Raises:
        InputError: The folder is missing, holds no tokenizer, or a broken one.
    """
    name = spec.tokenizer or spec.path
    assert name is not None
    if name == "bytes":
        return byte_tokenizer()
    key = "model.init_args.backbone." + ("tokenizer" if spec.tokenizer else "path")
    _check_folder(name, key)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        reason = f"it misses {reason}" if isinstance(error, KeyError) else reason
        where = name if Path(name).expanduser().exists() else f"{name}, which is no folder here"
        raise InputError(
            f"{key}: no tokenizer can be read from {where}: {reason}. Give a folder that save_pretrained wrote."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or str(tokenizer.convert_ids_to_tokens(0))
    return tokenizer


def add_new_tokens(tokenizer: PreTrainedTokenizerBase, spec: BackboneSpec) -> dict[int, tuple[int, ...]]:
    """Teach a tokenizer the new tokens of a backbone, in place.

    Returns:
        Id of each token that it did not know -> ids of its description, empty where it has none.

    Raises:
        InputError: A description has no words.
    """
    described = {**_descriptions(spec.new_tokens), **_descriptions(spec.new_special_tokens)}
    ids = {
        token: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for token, text in described.items()
        if text
    }
    num_known = len(tokenizer)
    tokenizer.add_tokens(list(spec.new_tokens))
    tokenizer.add_tokens(list(spec.new_special_tokens), special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    found = {token: vocabulary[token] for token in spec.added_tokens}
    known = [token for token, number in found.items() if number < num_known]
    if known:
        say(f"model.init_args.backbone.new_tokens: the tokenizer knows {', '.join(known)} already")
    return {number: ids.get(token, ()) for token, number in found.items() if number >= num_known}


def _descriptions(tokens: Sequence[str] | dict[str, str]) -> dict[str, str]:
    if not isinstance(tokens, dict):
        return {}
    for token, text in tokens.items():
        if not text.strip():
            raise InputError(
                f"model.init_args.backbone.new_tokens: {token} must have a description, got none. "
                "Write one, or give a list of tokens."
            )
    return tokens


def _check_folder(name: str, key: str) -> None:
    """Refuse a folder that is missing or holds no tokenizer; a hub name is left to transformers."""
    folder = Path(name).expanduser()
    looks_local = folder.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1
    if not folder.exists():
        if looks_local:
            raise InputError(f"{key}: {name} does not exist. Correct the path.")
        return
    found = [file for file in TOKENIZER_FILES if (folder / file).is_file()]
    if not found:
        raise InputError(
            f"{key}: {name} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}). "
            f"Copy the tokenizer's files there, or set model.init_args.backbone.tokenizer."
        )
    for file in found:
        if file.endswith(".json"):
            try:
                json.loads((folder / file).read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{key}: {folder / file} is broken JSON: {error}. Copy the file again.") from error


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte of UTF-8, and three control tokens; 259 words, made in the process.

    Ids: 0 `<|endoftext|>` (pad), 1 `<|im_start|>`, 2 `<|im_end|>` (eos), byte b is 3 + b. The chat template is chatml.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*specials, *_byte_letters()]
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=specials[0],
        eos_token=specials[2],
        extra_special_tokens=[specials[1]],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (NAMED / "chatml.jinja").read_text(encoding="utf-8")
    return tokenizer


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's table), byte 0 first."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Give the tokenizer a named template, so that what is saved with the model renders and stops as it was trained.

    In place: `chat_template`, and `eos_token` where the template replaces it. `auto` changes nothing.
    """
    if template.name == "auto":
        return
    tokenizer.chat_template = template.jinja
    if template.replace_eos:
        tokenizer.eos_token = template.stop_tokens[0]
