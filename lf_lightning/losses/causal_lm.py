"""Losses of supervised fine-tuning beside plain cross-entropy: functions of the logits of a chunk of tokens.

`token_loss_sums` runs one of them over a batch, a chunk of tokens at a time, so that no (tokens x vocabulary) tensor is
ever held; `counted_states` keeps what a second model says of the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lf_lightning.losses.chunks import Call, Chunk, Gradients, Head
from lf_lightning.losses.log_probs import counted_rows
from lf_lightning.types import OutputLayer

TOP_WORDS = 20
"""Likeliest words over which EAFT takes its entropy."""
CHUNKS_HELD = 4
"""Tensors of a chunk's size that such a loss and its gradient hold at a time."""


class TokenLosses(NamedTuple):
    """What a loss says of each of C tokens."""

    loss: Tensor  # (C,) what is minimised
    nll: Tensor  # (C,) negative log-likelihood, in nats
    kl: Tensor | None = None  # (C,) KL(reference || policy), in nats; None where there is no reference


TokenLoss = Callable[[Tensor, Tensor, Tensor | None], TokenLosses]
"""Takes logits (C, V), targets (C,) and a reference's logits (C, V) or None; changes none of them."""


class TokenLossSums(NamedTuple):
    """Sums over the counted positions of a batch."""

    loss: Tensor  # scalar float32 (float64 for float64 inputs): what is minimised
    nll: Tensor  # scalar, no gradient: negative log-likelihood, in nats
    kl: Tensor  # scalar, no gradient: KL(reference || policy), in nats; 0 without a reference
    num_correct: Tensor  # scalar int64, no gradient: positions whose target is the first of the largest logits


class CountedStates(NamedTuple):
    """What a second model says of the N counted positions of a batch: its hidden states, and how they become logits."""

    rows: Tensor  # (N, H)
    output_layer: OutputLayer


# ---------------------------------------------------------------------- the losses


def smoothed_loss(logits: Tensor, targets: Tensor, *, label_smoothing: float) -> TokenLosses:
    """Cross-entropy with a target that is spread a little over all words.

    loss = (1 - eps) nll + eps * mean over v of (-log p_v),  nll = -log p_target

    Args:
        logits: Of each token; (C, V).
        targets: Word of each token; (C,) int64.
        label_smoothing: eps, in [0, 1); 0 is plain cross-entropy.

    Source: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    log_p = logits.log_softmax(1)
    nll = _nll(log_p, targets)
    return TokenLosses((1 - label_smoothing) * nll - label_smoothing * log_p.mean(1), nll)


def dft_loss(logits: Tensor, targets: Tensor) -> TokenLosses:
    """Dynamic fine-tuning: tokens weigh as much as the model believes in them already.

    loss = p_target * nll, no gradient through p_target

    Args:
        logits: Of each token; (C, V).
        targets: Word of each token; (C,) int64.

    Source: Wu et al. 2025, arXiv:2508.05629, equation 9.
    """
    nll = _nll(logits.log_softmax(1), targets)
    return TokenLosses(nll.detach().neg().exp() * nll, nll)


def eaft_loss(logits: Tensor, targets: Tensor, *, alpha: float) -> TokenLosses:
    """Entropy-adaptive fine-tuning: tokens of which the model is sure weigh little, so that it need not unlearn them.

    loss = (H / log K)^alpha * nll, no gradient through the weight; H is the entropy of the K likeliest words, whose
    probabilities are scaled to sum to 1, K = min(20, V)

    Args:
        logits: Of each token; (C, V), V >= 2.
        targets: Word of each token; (C,) int64.
        alpha: Sharpness of the weight, >= 0; 0 is plain cross-entropy.

    Source: Diao et al. 2026, arXiv:2601.02151. LlamaFactory 0.9.5 divides by 3.0 instead of log 20 = 2.9957.
    """
    nll = _nll(logits.log_softmax(1), targets)
    top = logits.detach().topk(min(TOP_WORDS, logits.shape[1]), dim=1).values.softmax(1)
    entropy = torch.special.entr(top).sum(1)
    return TokenLosses((entropy / math.log(top.shape[1])) ** alpha * nll, nll)


def asft_loss(logits: Tensor, targets: Tensor, reference: Tensor, *, alpha: float) -> TokenLosses:
    """Anchored supervised fine-tuning: DFT, held near the model that training started from.

    loss = p_target * nll + alpha * KL(q || p),  q the words' probabilities under the reference, p under the policy

    Args:
        logits: Of each token; (C, V).
        targets: Word of each token; (C,) int64.
        reference: Logits of the reference, no gradient; (C, V).
        alpha: Weight of the anchor, >= 0.

    Source: Zhu et al. 2025, arXiv:2509.23753.
    """
    log_p, log_q = logits.log_softmax(1), reference.log_softmax(1)
    nll = _nll(log_p, targets)
    # A word that a bias of -inf forbids to both has the term 0 (-inf + inf) = 0, not NaN.
    kl = (log_q.exp() * (log_q - log_p).masked_fill(log_q.isneginf(), 0.0)).sum(1)
    return TokenLosses(nll.detach().neg().exp() * nll + alpha * kl, nll, kl)


def _nll(log_p: Tensor, targets: Tensor) -> Tensor:
    return -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)


# ---------------------------------------------------------------------- over a batch


def token_loss_sums(
    hidden: Tensor,
    output_layer: OutputLayer,
    targets: Tensor,
    *,
    loss: TokenLoss,
    reference: CountedStates | None = None,
    chunk_size: int | None = None,
) -> TokenLossSums:
    """A loss summed over the positions that count, with its gradients made in the forward pass.

    With nothing counted the sums are zero and the loss is still connected to its inputs (zero gradients).

    Args:
        hidden: Last hidden states of the backbone; (B, T, H). Types as in `cross_entropy_sums`.
        output_layer: How hidden states become logits.
        targets: Token to predict at each position, IGNORE where none counts; (B, T) int64.
        loss: The loss of a chunk of tokens.
        reference: What `counted_states` kept of the same batch, for a loss that reads it.
        chunk_size: Rows whose logits are held at a time, > 0; changes memory and speed only. None: 256 on a CPU, about
            1 GiB for all of a chunk's tensors on an accelerator.
    """
    index, rows, counted = counted_rows(hidden, targets)
    call = Call.of(hidden, output_layer, num_rows=len(index), chunk_size=chunk_size)
    if chunk_size is None and hidden.device.type != "cpu":
        call = call._replace(chunk_size=max(1, call.chunk_size // CHUNKS_HELD))
    with torch.no_grad():
        other = None if reference is None else _ReferenceLogits(hidden, reference, call.chunk_size)
    inputs = (rows, output_layer.weight, output_layer.bias, counted, call, loss, other)
    return TokenLossSums(*_TokenLossSums.apply(*inputs))  # type: ignore[no-untyped-call]


def counted_states(hidden: Tensor, output_layer: OutputLayer, targets: Tensor, *, keeps_weights: bool) -> CountedStates:
    """Hidden states of the positions that count, with the output layer that makes logits of them.

    Args:
        hidden: Last hidden states of a model; (B, T, H).
        output_layer: How they become logits.
        targets: As in `token_loss_sums`.
        keeps_weights: Whether the weights of the layer outlive this call; False copies them, as is needed where a
            sharded model frees them after its forward.
    """
    _, rows, _ = counted_rows(hidden, targets)
    layer = output_layer._replace(weight=output_layer.weight.detach())
    if not keeps_weights:
        bias = None if layer.bias is None else layer.bias.detach().clone()
        layer = layer._replace(weight=layer.weight.clone(), bias=bias)
    return CountedStates(rows.detach(), layer)


class _ReferenceLogits:
    """Logits of the reference, a chunk at a time."""

    def __init__(self, hidden: Tensor, reference: CountedStates, chunk_size: int) -> None:
        layer = reference.output_layer
        call = Call.of(reference.rows, layer, num_rows=len(reference.rows), chunk_size=chunk_size)
        self.rows, self.head = reference.rows, Head(layer.weight, layer.bias, call)

    def of(self, span: slice) -> Tensor:
        """In a buffer that the next chunk uses again; (C, V)."""
        return self.head.project(self.rows[span])


class _TokenLossSums(torch.autograd.Function):
    """The four sums; gradients of the first are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        call: Call,
        loss: TokenLoss,
        reference: _ReferenceLogits | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        needs = ctx.needs_input_grad[:3]
        gradients = Gradients(needs, rows, weight, bias) if call.with_grad and any(needs) else None
        inputs = (rows, weight, bias, targets)
        sums = _run(inputs, call=call, loss=loss, reference=reference, gradients=gradients)
        ctx.again, ctx.gradients = (call, loss, reference), gradients
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        (call, loss, reference), gradients = ctx.again, ctx.gradients
        ctx.gradients = None  # given away below: autograd may keep them as .grad
        if gradients is None:
            gradients = Gradients(ctx.needs_input_grad[:3], *inputs[:3])
            _run(inputs, call=call, loss=loss, reference=reference, gradients=gradients)
        return *gradients.times(grad_loss * call.scale).give(inputs[:3]), None, None, None, None


def _run(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor],
    *,
    call: Call,
    loss: TokenLoss,
    reference: _ReferenceLogits | None,
    gradients: Gradients | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pass over all chunks; gradients are added up where asked for."""
    rows, weight, bias, targets = inputs
    head = Head(weight, bias, call)
    sums = torch.zeros(3, dtype=torch.float64, device=rows.device)
    num_correct = torch.zeros((), dtype=torch.int64, device=rows.device)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), call.chunk_size):
            span = slice(start, start + call.chunk_size)
            logits, target = head.project(rows[span]), targets[span]
            num_correct += (logits.argmax(1) == target).sum()
            leaf = logits.detach().requires_grad_(gradients is not None)
            with torch.set_grad_enabled(gradients is not None):
                found = loss(leaf, target, None if reference is None else reference.of(span))
                total = found.loss.sum()
            for place, values in enumerate(found):
                sums[place] += 0 if values is None else values.detach().sum().double()
            if gradients is None:
                continue
            (residual,) = torch.autograd.grad(total, leaf)
            if call.softcap is not None:  # the cap's slope is 1 - (z / softcap)^2
                residual = residual.addcmul(residual, logits.square_(), value=-1.0 / call.softcap**2)
            ones = torch.ones_like(found.loss.detach())
            gradients.add(head, Chunk(span, rows[span], residual, ones, ones))
    return *sums.to(head.sum_dtype).unbind(), num_correct  # type: ignore[return-value]
