"""Questions to the user's own model before the first step, because no list of families could answer them."""

from __future__ import annotations

import torch
from torch import Tensor

from lf_lightning.models.backbone import Backbone
from lf_lightning.types import IGNORE, Document, InputError, Layout, OutputLayer, TokenBatch

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest difference that rounding explains, as a share of the hidden states' deviation."""


def check_output_layer(backbone: Backbone) -> None:
    """Make sure that our way from hidden states to logits is the model's own.

    Raises:
        InputError: The model computes its logits in a way that `Backbone.output_layer` does not know.
    """
    input_ids = _words(backbone, 8)

    def both(hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> tuple[Tensor, Tensor]:
        own = backbone.causal_lm(input_ids=input_ids, use_cache=False).logits
        return own.float(), _logits(hidden, output_layer, targets).float()

    with _Quiet(backbone), backbone.padded_attention():
        # both inside one forward, where weights are whole under every sharding
        want, got = backbone(_batch(input_ids, documents=None), kernel=both)
    if not _close(got, want, backbone):
        raise InputError(
            f"model.init_args.backbone: the output layer of {type(backbone.causal_lm).__name__} is not a linear layer "
            f"with bias, scale and softcap: logits differ by {(got - want).abs().max():.2g}. Use another model."
        )


def documents_are_isolated(backbone: Backbone, layout: Layout) -> bool:
    """Whether two documents in one row give what each gives alone, and the second does not see the first.

    Models that carry state or position biases across a row (recurrent, convolutional, ALiBi) do not. In the padded
    layout it is transformers that finds the documents, by their positions, and not for every family.
    """
    if layout == "padding_free" and _attends_in_chunks(backbone):
        return False
    first, second, other = _words(backbone, 7, seed=1), _words(backbone, 9, seed=2), _words(backbone, 7, seed=3)
    documents = (Document(7), Document(9))
    try:
        with _Quiet(backbone):
            alone = [_run(backbone, ids, layout="padded") for ids in (first, second)]
            together = _run(backbone, torch.cat([first, second], dim=1), layout=layout, documents=documents)
            changed = _run(backbone, torch.cat([other, second], dim=1), layout=layout, documents=documents)
    except _Foreign:
        return False
    same = _close(together, torch.cat(alone, dim=1), backbone)
    return same and _close(changed[:, 7:], together[:, 7:], backbone)


def branches_are_isolated(backbone: Backbone) -> bool:
    """Whether two branches on one trunk give what trunk and branch give alone, and the second does not see the first.

    Only our own attention of the padding-free layout can: flash_attention_2 finds documents by their positions.
    """
    if _attends_in_chunks(backbone):
        return False
    trunk, first, other, second, last = (
        _words(backbone, length, seed=seed) for seed, length in enumerate((7, 5, 5, 6, 4))
    )
    documents = (Document(7, (5, 6)), Document(4))  # a document after it must start afresh
    rows = [torch.cat([trunk, branch, second, last], dim=1) for branch in (first, other)]
    try:
        with _Quiet(backbone):
            alone = [
                _run(backbone, torch.cat([trunk, first], dim=1), layout="padded"),
                _run(backbone, torch.cat([trunk, second], dim=1), layout="padded")[:, 7:],
                _run(backbone, last, layout="padded"),
            ]
            together, changed = (_run(backbone, row, layout="padding_free", documents=documents) for row in rows)
    except _Foreign:
        return False
    same = _close(together, torch.cat(alone, dim=1), backbone)
    return same and _close(changed[:, 12:], together[:, 12:], backbone)


class _Foreign(Exception):
    """The family takes no positions or documents, or builds a mask of its own."""


def _attends_in_chunks(backbone: Backbone) -> bool:
    """Whether a model attends in chunks by its mask alone (llama4); they are longer than what a probe would try."""
    return bool(backbone.causal_lm.config.get_text_config().to_dict().get("attention_chunk_size"))


def _run(
    backbone: Backbone, input_ids: Tensor, *, layout: Layout, documents: tuple[Document, ...] | None = None
) -> Tensor:
    """Last hidden states of a row, (1, T, H), with the attention of a layout; the model keeps its own layout."""
    layout_before: Layout = "padding_free" if backbone.is_padding_free else "padded"
    backbone.set_layout(layout)
    try:
        hidden: Tensor = backbone(_batch(input_ids, documents=documents), kernel=_hidden)
    except (TypeError, ValueError) as error:
        if documents is None:
            raise
        raise _Foreign from error
    finally:
        backbone.set_layout(layout_before)
    return hidden


def _hidden(hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> Tensor:
    return hidden


def _logits(hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> Tensor:
    logits = hidden @ output_layer.weight.to(hidden.dtype).T
    if output_layer.bias is not None:
        logits = logits + output_layer.bias
    logits = logits * output_layer.scale
    cap = output_layer.softcap
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _words(backbone: Backbone, length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(backbone.vocabulary, (1, length), generator=generator)
    return words.to(next(backbone.parameters()).device)


def _batch(input_ids: Tensor, *, documents: tuple[Document, ...] | None) -> TokenBatch:
    positions = None
    if documents is not None:
        ranges = []
        for trunk, branches in documents:
            ranges += [(0, trunk), *((trunk, trunk + branch) for branch in branches)]
        positions = torch.cat([torch.arange(*limits, device=input_ids.device) for limits in ranges])[None]
    return TokenBatch(
        input_ids=input_ids,
        targets=torch.full_like(input_ids, IGNORE),
        positions=positions,
        documents=documents,
        num_units=1,
        num_tokens=input_ids.shape[1],
    )


def _close(got: Tensor, want: Tensor, backbone: Backbone) -> bool:
    tolerance = TOLERANCE[next(backbone.causal_lm.base_model.parameters()).dtype]
    if torch.is_autocast_enabled(got.device.type):
        tolerance = TOLERANCE[torch.bfloat16]
    return bool(((got - want).abs().max() <= tolerance * want.float().std()).item())


class _Quiet:
    """Evaluation mode without gradients, random state and mode put back afterwards."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def __enter__(self) -> None:
        self._was_training = self._backbone.training
        self._backbone.eval()
        self._grad = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        self._random = torch.random.get_rng_state()

    def __exit__(self, *_: object) -> None:
        torch.random.set_rng_state(self._random)
        torch.set_grad_enabled(self._grad)
        self._backbone.train(self._was_training)
