"""Words that a model does not know yet: more rows of its embedding, with a reasonable start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lf_lightning.models.adapters import is_tied
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NewRows = Mapping[int, Sequence[int]]
"""Id of a new word -> ids of the words that describe it, none where nothing does."""


def add_rows(model: PreTrainedModel, vocab_size: int, new_rows: NewRows, *, noise: float | None) -> None:
    """Give new words their rows in embedding and output layer: the mean of all others, or of those that describe them.

    The folder's embedding may have rows to spare already; otherwise it grows to the size of the vocabulary.

    Args:
        model: Its weights are whole.
        vocab_size: Words of the tokenizer, the new ones included.
        new_rows: Which words are new.
        noise: Standard deviation of normal noise on top; empty means 1 / sqrt(H) for words that nothing describes, and
            0 for the others.

    Raises:
        InputError: The output layer is not a linear layer.
    """
    embedding = _weight(model.get_input_embeddings())
    known = min(embedding.shape[0], min(new_rows))
    if embedding.shape[0] < vocab_size:
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            raise InputError(
                "model.init_args.backbone.new_tokens: need a model whose output layer is linear, got "
                f"{type(model.get_output_embeddings()).__name__}. Leave them out."
            )
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for layer in [model.get_input_embeddings()] + ([] if is_tied(model) else [model.get_output_embeddings()]):
        _fill(_weight(layer), known, new_rows, noise)


def vocabulary_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the embedding and, where that is not tied to it, of the output layer."""
    wanted: list[Any] = [model.get_input_embeddings()] + ([] if is_tied(model) else [model.get_output_embeddings()])
    return [name for name, module in model.named_modules() if any(module is each for each in wanted)]


@torch.no_grad()
def _fill(weight: Tensor, known: int, new_rows: NewRows, noise: float | None) -> None:
    old = weight[:known].float()
    mean, usual = old.mean(0), old.shape[1] ** -0.5
    for row, described_by in new_rows.items():
        start = old[list(described_by)].mean(0) if described_by else mean
        spread = (0.0 if described_by else usual) if noise is None else noise
        weight[row] = (start + spread * torch.randn(start.shape)).to(weight.dtype)


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight
