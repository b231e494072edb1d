"""Log-probs of target tokens straight from hidden states, without ever holding a (tokens x vocabulary) tensor.

Two forms. `cross_entropy_sums` is a sum, so its gradients are made in the forward pass, chunk by chunk, and nothing is
computed twice. `token_log_probs` takes any upstream gradient and computes each chunk again in the backward pass; where
the output layer is frozen it makes the gradient of each row in the forward pass instead, and scales it later.

A chunk is C rows of hidden states. Its logits live in one buffer that all chunks share: they become e^(z - max) in
place, then the gradient of the loss. The division by the sum of each row is left to the (C, H) operand of the matrix
products, which is V / H times smaller.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lf_lightning.types import IGNORE, OutputLayer

CPU_CHUNK_ROWS = 256
"""Rows per chunk on a CPU: 512 and 1,024 rows gained 5 % in time, and cost memory in proportion."""

ACCELERATOR_CHUNK_BYTES = 2**30
"""Float32 logits per chunk on an accelerator, in bytes."""

WEIGHT_BLOCK_ROWS = 8192
"""Words at a time where the weight gradient is made in half precision and summed in float32."""


class CrossEntropySums(NamedTuple):
    """Sums over the counted positions of a batch."""

    nll: Tensor  # scalar float32 (float64 for float64 inputs): sum of negative log-likelihoods, in nats
    num_correct: Tensor  # scalar int64, no gradient: positions whose target is the first of the largest logits


def cross_entropy_sums(
    hidden: Tensor, output_layer: OutputLayer, targets: Tensor, *, chunk_size: int | None = None
) -> CrossEntropySums:
    """Cross-entropy and number of correct predictions, summed over the positions that count.

    nll = sum over n of (logsumexp(z_n) - z_n[target_n]),  z = cap(scale * (hidden @ weight.T + bias))

    The gradients are made in the forward pass, in one (V, H) buffer for the weight where it is trained and none where
    it is frozen; the backward pass multiplies them by the upstream scalar in place and hands them over. A second
    backward pass through a retained graph computes them again. With nothing counted both sums are zero, and nll is
    still connected to its inputs (zero gradients), so that collectives in the backward pass run.

    Args:
        hidden: Last hidden states of the backbone; (B, T, H). Under autocast they and the weight are cast once to its
            type; otherwise they have the weight's type.
        output_layer: How hidden states become logits. Half-precision products are summed up in float32.
        targets: Token to predict at each position, IGNORE where none counts; (B, T) int64.
        chunk_size: Rows whose logits are held at a time, > 0; changes memory and speed only. None: 256 on a CPU,
            about 1 GiB of float32 logits on an accelerator.

    Source: gradients in the forward pass as in Hsu et al. 2024, arXiv:2410.10989, section 3.2 (fused linear cross
    entropy). Departs from it: plain PyTorch, a sum instead of a mean, and float16 gradients of logits are rounded
    before the loss scale of a GradScaler is applied, not after.
    """
    index, rows, counted = _counted_rows(hidden, targets)
    call = _Call.of(hidden, output_layer, num_rows=len(index), chunk_size=chunk_size)
    inputs = (rows, output_layer.weight, output_layer.bias, counted, call)
    return CrossEntropySums(*_CrossEntropy.apply(*inputs))  # type: ignore[no-untyped-call]


def token_log_probs(
    hidden: Tensor, output_layer: OutputLayer, targets: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """Log-prob of each target token.

    log p_n = z_n[target_n] - logsumexp(z_n),  z = cap(scale * (hidden @ weight.T + bias))

    Any upstream gradient is right. Where weight or bias are trained, the backward pass computes each chunk of logits
    again; where both are frozen, it only scales the rows of a (counted positions, H) gradient kept from the forward
    pass.

    Args:
        hidden: Last hidden states of the backbone; (B, T, H). Types as in `cross_entropy_sums`.
        output_layer: How hidden states become logits.
        targets: Token at each position, IGNORE where none counts; (B, T) int64.
        chunk_size: Rows whose logits are held at a time, as in `cross_entropy_sums`.

    Returns:
        Log-probs in nats, <= 0, and 0 where nothing counts; (B, T) float32 (float64 for float64 inputs). With nothing
        counted they are still connected to the inputs (zero gradients).

    Source: the log-softmax of the output layer at the target; recomputation as in Chen et al. 2016, arXiv:1604.06174.
    """
    index, rows, counted = _counted_rows(hidden, targets)
    call = _Call.of(hidden, output_layer, num_rows=len(index), chunk_size=chunk_size)
    inputs = (rows, output_layer.weight, output_layer.bias, counted, call)
    log_probs: Tensor = _TokenLogProbs.apply(*inputs)  # type: ignore[no-untyped-call]
    return log_probs.new_zeros(targets.numel()).index_copy(0, index, log_probs).view_as(targets)


def _counted_rows(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat positions (N,) of targets that count, with their hidden states (N, H) and targets (N,)."""
    assert hidden.shape[:-1] == targets.shape, f"hidden {tuple(hidden.shape)} does not fit {tuple(targets.shape)}"
    flat = targets.flatten()
    index = (flat != IGNORE).nonzero().squeeze(1)
    return index, hidden.flatten(0, -2).index_select(0, index), flat.index_select(0, index)


class _Call(NamedTuple):
    """What a pass over the chunks needs to know besides tensors."""

    scale: float
    softcap: float | None
    chunk_size: int
    dtype: torch.dtype  # of the matrix products
    with_grad: bool

    @classmethod
    def of(cls, hidden: Tensor, layer: OutputLayer, *, num_rows: int, chunk_size: int | None) -> _Call:
        """Settle type and chunk, outside of the autograd function: inside, autograd's own switches are off."""
        assert chunk_size is None or chunk_size > 0, f"chunk_size must be > 0, got {chunk_size}"
        device, dtype = hidden.device.type, hidden.dtype
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            assert dtype == layer.weight.dtype, f"hidden is {dtype}, the output layer {layer.weight.dtype}"
        if chunk_size is None:
            chunk_size = CPU_CHUNK_ROWS if device == "cpu" else ACCELERATOR_CHUNK_BYTES // (4 * len(layer.weight))
        chunk_size = max(1, min(chunk_size, num_rows))
        return cls(layer.scale, layer.softcap, chunk_size, dtype, torch.is_grad_enabled())


class _Head:
    """The output layer in the type of the matrix products, with the buffers that every chunk uses again."""

    def __init__(self, weight: Tensor, bias: Tensor | None, call: _Call) -> None:
        self.weight = weight.to(call.dtype)
        self.bias = bias
        self.call = call
        self.sum_dtype = torch.promote_types(call.dtype, torch.float32)
        is_half = call.dtype != self.sum_dtype
        # On a CPU the product (V, H) x (H, C) is 1.3 times as fast as (C, H) x (H, V): chunks lie word by word there.
        self.by_word = weight.device.type == "cpu" and not is_half
        self.logits = self._buffer(self.sum_dtype)
        self.projected = self._buffer(call.dtype) if is_half else self.logits

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        """An empty (C, V) tensor; word by word, its memory is that of (V, C)."""
        size, num_words = self.call.chunk_size, len(self.weight)
        if self.by_word:
            return self.weight.new_empty((num_words, size), dtype=dtype).t()
        return self.weight.new_empty((size, num_words), dtype=dtype)

    def project(self, rows: Tensor) -> Tensor:
        """Logits of a chunk, in the shared buffer; (C, V) float32 or float64."""
        projected, logits = self.projected[: len(rows)], self.logits[: len(rows)]
        torch.mm(rows.to(self.call.dtype), self.weight.t(), out=projected)
        if projected.dtype != logits.dtype:
            logits.copy_(projected)
        if self.bias is not None:
            logits.add_(self.bias)
        if self.call.scale != 1.0:
            logits.mul_(self.call.scale)
        if self.call.softcap is not None:
            logits.div_(self.call.softcap).tanh_().mul_(self.call.softcap)
        return logits


class _Chunk(NamedTuple):
    """One chunk of C rows, after its logits became the gradient of its negative log-likelihoods."""

    span: slice  # where it lies in all rows
    rows: Tensor  # (C, H) hidden states
    residual: Tensor  # (C, V) total * (softmax(z) - one_hot(target)), times the slope of the cap
    total: Tensor  # (C,) sum of e^(z - max) over the words
    coefficient: Tensor  # (C,) weight of each row's nll


class _Gradients:
    """Gradients of sum over n of coefficient_n * nll_n / scale, added up chunk by chunk; None for what is frozen."""

    def __init__(self, needs: tuple[bool, ...], rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))

        self.rows = zeros(rows) if needs[0] else None
        self.weight = zeros(weight) if needs[1] else None
        self.bias = zeros(bias) if needs[2] and bias is not None else None

    def add(self, head: _Head, chunk: _Chunk) -> None:
        """Add those of one chunk, in two matrix products."""
        residual, total = chunk.residual, chunk.total
        over_total = chunk.coefficient / total
        if self.bias is not None:
            self.bias.add_(torch.mv(residual.t(), over_total))
        if head.projected.dtype == residual.dtype:
            operand, row_weight = residual, over_total.unsqueeze(1)
        else:  # half precision: softmax in [0, 1] fits, the undivided residual would overflow float16
            operand = torch.div(residual, total.unsqueeze(1), out=head.projected[: len(total)])
            row_weight = chunk.coefficient.unsqueeze(1)
        if self.rows is not None:
            torch.mul(torch.mm(operand, head.weight), row_weight, out=self.rows[chunk.span])
        if self.weight is not None:
            _add_product(self.weight, operand.t(), (chunk.rows * row_weight).to(operand.dtype))

    def give(self, likes: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Give them away, each in the type of the input (rows, weight, bias) that it belongs to."""
        parts = (self.rows, self.weight, self.bias)
        return tuple(
            None if part is None or like is None else part.to(like.dtype)
            for part, like in zip(parts, likes, strict=True)
        )

    def times(self, factor: Tensor) -> _Gradients:
        """Multiply all of them in place by a scalar tensor."""
        for part in (self.rows, self.weight, self.bias):
            if part is not None:
                part.mul_(factor)
        return self


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (V, C) @ right (C, H) to total (V, H), in the type of total, through small blocks where types differ."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    for block, words in zip(total.split(WEIGHT_BLOCK_ROWS), left.split(WEIGHT_BLOCK_ROWS), strict=True):
        block.add_(torch.mm(words, right))


def _exponentiate(logits: Tensor, target: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Write e^(z - max) of a chunk of logits (C, V) to `out`, which may be the logits themselves.

    Returns:
        The sum of the exponentials over the words, the log-prob of the target, and whether the target is the first of
        the largest logits; each (C,).
    """
    column = target.unsqueeze(1)
    picked = logits.gather(1, column)
    logits.scatter_(1, column, -torch.inf)
    rival = logits.amax(1, keepdim=True)  # the best of the other words: cheaper than argmax, and ties are rare
    logits.scatter_(1, column, picked)
    is_correct, is_tie = (picked > rival).squeeze(1), (picked == rival).squeeze(1)
    if bool(is_tie.any()):
        is_correct[is_tie] = logits[is_tie].argmax(1) == target[is_tie]
    top = torch.maximum(picked, rival)
    total = torch.sub(logits, top, out=out).exp_().sum(1)
    return total, (picked - top).squeeze(1) - total.log(), is_correct


def _run(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    call: _Call,
    gradients: _Gradients | None = None,
    coefficient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pass over all chunks: log-probs (N,), whether each target is the prediction (N,), gradients where asked for.

    `coefficient` (N,) weighs each row's nll in the gradients; None is one for each.
    """
    head = _Head(weight, bias, call)
    log_probs = rows.new_empty(len(rows), dtype=head.sum_dtype)
    is_correct = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    coefficient = torch.ones_like(log_probs) if coefficient is None else coefficient
    # The slope of the cap needs the logits once more; elsewhere their own buffer takes the exponentials.
    spare = head.logits if gradients is None or call.softcap is None else torch.empty_like(head.logits)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), call.chunk_size):
            span = slice(start, start + call.chunk_size)
            logits, target = head.project(rows[span]), targets[span]
            residual = spare[: len(target)]
            total, log_probs[span], is_correct[span] = _exponentiate(logits, target, out=residual)
            if gradients is None:
                continue
            residual.scatter_add_(1, target.unsqueeze(1), -total.unsqueeze(1))
            if call.softcap is not None:  # the cap's slope is 1 - (z / softcap)^2
                residual.addcmul_(residual, logits.square_(), value=-1.0 / call.softcap**2)
            gradients.add(head, _Chunk(span, rows[span], residual, total, coefficient[span]))
    return log_probs, is_correct


class _CrossEntropy(torch.autograd.Function):
    """Sum of negative log-likelihoods; gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: _Call
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:3]
        gradients = _Gradients(needs, rows, weight, bias) if call.with_grad and any(needs) else None
        log_probs, is_correct = _run(rows, weight, bias, targets, call=call, gradients=gradients)
        ctx.call, ctx.gradients = call, gradients
        ctx.save_for_backward(rows, weight, bias, targets)
        num_correct = is_correct.sum()
        ctx.mark_non_differentiable(num_correct)
        return -log_probs.sum(), num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nll: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, bias, targets = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # given away below: autograd may keep them as .grad
        if gradients is None:
            gradients = _Gradients(ctx.needs_input_grad[:3], rows, weight, bias)
            _run(rows, weight, bias, targets, call=ctx.call, gradients=gradients)
        return *gradients.times(grad_nll * ctx.call.scale).give((rows, weight, bias)), None, None


class _TokenLogProbs(torch.autograd.Function):
    """Log-prob of each row's target (N,), for any upstream gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: _Call) -> Tensor:
        needs = ctx.needs_input_grad[:3]
        ctx.call, ctx.dtype, ctx.is_frozen = call, rows.dtype, not (needs[1] or needs[2])
        unit = _Gradients(needs, rows, weight, bias) if call.with_grad and needs[0] and ctx.is_frozen else None
        log_probs, _ = _run(rows, weight, bias, targets, call=call, gradients=unit)
        if unit is not None:
            ctx.save_for_backward(unit.rows)
        else:
            ctx.save_for_backward(rows, weight, bias, targets)
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor) -> tuple[Tensor | None, ...]:
        coefficient = -ctx.call.scale * grad_log_probs
        if ctx.is_frozen:
            (unit,) = ctx.saved_tensors
            return (unit * coefficient.unsqueeze(1)).to(ctx.dtype), None, None, None, None
        rows, weight, bias, targets = ctx.saved_tensors
        gradients = _Gradients(ctx.needs_input_grad[:3], rows, weight, bias)
        _run(rows, weight, bias, targets, call=ctx.call, gradients=gradients, coefficient=coefficient)
        return *gradients.give((rows, weight, bias)), None, None
