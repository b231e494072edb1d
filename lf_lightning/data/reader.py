"""Reads datasets as one run sees them: with its tokenizer, its template and its options."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lf_lightning.data.build import Encoder
from lf_lightning.data.checks import ROLLING, check_task
from lf_lightning.data.encode import EncodeOptions
from lf_lightning.data.prompts import Prompt, prompt_rows
from lf_lightning.data.source import Source
from lf_lightning.data.sources import resolve_sources
from lf_lightning.data.store import TokenStore, build_store
from lf_lightning.data.templates import Template, load_template
from lf_lightning.data.tokenizer import add_new_tokens, fit_tokenizer, load_tokenizer
from lf_lightning.types import BackboneSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Names = Sequence[str | dict[str, Any]]
"""Datasets as the configuration names them."""


class Reader:
    """Tokenizer and template are loaded when they are first needed.

    Args:
        backbone: Whose tokenizer encodes.
        options: What decides ids and labels.
        given: The DataModule's options by name.
    """

    def __init__(self, backbone: BackboneSpec, options: EncodeOptions, given: dict[str, Any]) -> None:
        self._backbone, self._options, self._given = backbone, options, given

    @cached_property
    def _both(self) -> tuple[PreTrainedTokenizerBase, Template]:
        tokenizer = load_tokenizer(self._backbone)
        self._new_rows = add_new_tokens(tokenizer, self._backbone)
        template = load_template(self._given["template"], tokenizer, self._options.task)
        fit_tokenizer(tokenizer, template)
        return tokenizer, template

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the template that the data is rendered with."""
        return self._both[0]

    @property
    def new_rows(self) -> dict[int, tuple[int, ...]]:
        """Id of each token that the backbone's own tokenizer does not know -> ids of its description."""
        self._both  # noqa: B018  # which finds them
        return self._new_rows

    @property
    def template(self) -> Template:
        """The chat template."""
        return self._both[1]

    def store(self, names: Names) -> TokenStore:
        """Encode datasets, or open them from the cache."""
        return self.store_of(self.sources(names), cache_dir=self._given["cache_dir"])

    def store_of(self, sources: Sequence[Source], *, cache_dir: str | None) -> TokenStore:
        """Encode sources, or open them from a cache."""
        given = self._given
        return build_store(
            sources,
            self._options,
            self.tokenizer,
            self.template,
            cache_dir=Path(cache_dir).expanduser() if cache_dir else None,
            num_workers=given["num_workers"],
            max_samples=given["max_samples"],
            invalid_rows=given["invalid_rows"],
        )

    def encoder(self, sources: Sequence[Source]) -> Encoder:
        """What encodes the rows of sources one by one.

        Raises:
            InputError: A dataset does not suit the task.
        """
        for source in sources:
            check_task(source, self._options.task)
        return Encoder(tuple(sources), self._options, self.tokenizer, self.template)

    def prompts(self, names: Names) -> list[Prompt]:
        """The prompts of datasets with the answers that the data gives."""
        return self.prompts_of(self.sources(names))

    def prompts_of(self, sources: Sequence[Source]) -> list[Prompt]:
        """The prompts of sources with the answers that the data gives."""
        return prompt_rows(
            sources,
            self.tokenizer,
            self.template,
            task=self._options.task,
            max_samples=self._given["max_samples"],
            invalid_rows=self._given["invalid_rows"],
            max_length=self._options.max_length if self._options.task in ROLLING else None,
        )

    def sources(self, names: Names, *, streaming: bool = False) -> list[Source]:
        """What the configuration names."""
        given = self._given
        return resolve_sources(
            list(names), given["dataset_dir"], allow_outside=given["allow_outside"], streaming=streaming
        )
