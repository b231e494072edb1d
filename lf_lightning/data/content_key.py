"""The name of encoded data: a digest of everything that decides it, so that what is there needs no check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lf_lightning.data.build import Encoder
from lf_lightning.data.files import file_digest
from lf_lightning.data.source import Source
from lf_lightning.data.sources import source_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def content_key(encoder: Encoder, max_samples: int | None, invalid_rows: str) -> str:
    """Everything that decides the arrays, as one digest; paths and times do not count.

    Args:
        encoder: All that encodes a row.
        max_samples: Rows that are used of each source; None uses all.
        invalid_rows: What becomes of rows that cannot be used.
    """
    key = hashlib.sha256()
    for part in (*_source_facts(encoder.sources), *_code_facts(), *tokenizer_facts(encoder.tokenizer)):
        key.update(hashlib.sha256(part.encode()).digest())
    rest = [asdict(encoder.options), asdict(encoder.template), max_samples, invalid_rows]
    key.update(json.dumps(rest, sort_keys=True).encode())
    return key.hexdigest()[:40]


def _source_facts(sources: Sequence[Source]) -> Iterable[str]:
    for source in sources:
        facts = asdict(source) | {"path": [(path.suffix, file_digest(path)) for path in source_files(source)]}
        yield json.dumps(facts, sort_keys=True, default=repr)  # records may hold what YAML knows and JSON does not


def _code_facts() -> Iterable[str]:
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *(here / "named").iterdir()]):
        yield f"{path.name} {file_digest(path)}"
    yield f"{version('transformers')} {version('tokenizers')}"


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> Iterable[str]:
    """Everything of a tokenizer that decides ids."""
    from transformers import PreTrainedTokenizerFast

    if isinstance(tokenizer, PreTrainedTokenizerFast):
        yield tokenizer.backend_tokenizer.to_str()
    else:
        yield f"{type(tokenizer).__name__} {sorted(tokenizer.get_vocab().items())} {tokenizer.init_kwargs}"
    yield f"{tokenizer.special_tokens_map} {tokenizer.all_special_tokens}"
