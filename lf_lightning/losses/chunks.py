"""The output layer a chunk of rows at a time: what both forms of `log_probs.py` are made of.

A chunk is C rows of hidden states. Its logits live in one buffer that all chunks share: they become e^(z - max) in
place, then the gradient of the loss. The division by the sum of each row is left to the (C, H) operand of the matrix
products, which is V / H times smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lf_lightning.types import OutputLayer

CPU_CHUNK_ROWS = 256
"""Rows per chunk on a CPU: 512 and 1,024 rows gained 5 % in time, and cost memory in proportion."""

ACCELERATOR_CHUNK_BYTES = 2**30
"""Float32 logits per chunk on an accelerator, in bytes."""

WEIGHT_BLOCK_ROWS = 8192
"""Words at a time where the weight gradient is made in half precision and summed in float32."""


class Call(NamedTuple):
    """What a pass over the chunks needs to know besides tensors."""

    scale: float
    softcap: float | None
    chunk_size: int
    dtype: torch.dtype  # of the matrix products
    with_grad: bool
    with_entropy: bool
    entropy_grad: bool = False

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        layer: OutputLayer,
        *,
        num_rows: int,
        chunk_size: int | None,
        with_entropy: bool = False,
        entropy_grad: bool = False,
    ) -> Call:
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
        with_grad = torch.is_grad_enabled()
        entropy_grad = entropy_grad and with_entropy and with_grad
        return cls(layer.scale, layer.softcap, chunk_size, dtype, with_grad, with_entropy, entropy_grad)


class RowStatistics(NamedTuple):
    """What a pass finds for each of N rows."""

    log_probs: Tensor  # (N,) float32 or float64: log-prob of the target, in nats
    is_correct: Tensor  # (N,) bool: the target is the first of the largest logits
    entropy: Tensor | None  # (N,) like log_probs: entropy over all words, in nats; None unless asked for


class Head:
    """The output layer in the type of the matrix products, with the buffers that every chunk uses again."""

    def __init__(self, weight: Tensor, bias: Tensor | None, call: Call) -> None:
        self.weight = weight.to(call.dtype)
        self.bias = bias
        self.call = call
        self.sum_dtype = torch.promote_types(call.dtype, torch.float32)
        is_half = call.dtype != self.sum_dtype
        # On a CPU the product (V, H) x (H, C) is 1.3 times as fast as (C, H) x (H, V): chunks lie word by word there.
        self.by_word = weight.device.type == "cpu" and not is_half
        self.logits = self._buffer(self.sum_dtype)
        self.projected = self._buffer(call.dtype) if is_half else self.logits
        self.shifted = self._buffer(self.sum_dtype) if call.with_entropy else None  # z - max

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


class Chunk(NamedTuple):
    """One chunk of C rows, after its logits became the gradient of its negative log-likelihoods."""

    span: slice  # where it lies in all rows
    rows: Tensor  # (C, H) hidden states
    residual: (
        Tensor  # (C, V) total * (softmax(z) - one_hot(target)), times the slope of the cap; or as `_entropy_residual`
    )
    total: Tensor  # (C,) sum of e^(z - max) over the words
    coefficient: Tensor  # (C,) weight of each row's nll


class Gradients:
    """Gradients of sum over n of coefficient_n * nll_n / scale, added up chunk by chunk; None for what is frozen."""

    def __init__(self, needs: tuple[bool, ...], rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))

        self.rows = zeros(rows) if needs[0] else None
        self.weight = zeros(weight) if needs[1] else None
        self.bias = zeros(bias) if needs[2] and bias is not None else None

    def add(self, head: Head, chunk: Chunk) -> None:
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

    def times(self, factor: Tensor) -> Gradients:
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


def _peaks(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logit of the target (C, 1), largest logit (C, 1), and whether the target is the first of the largest (C,)."""
    column = target.unsqueeze(1)
    picked = logits.gather(1, column)
    logits.scatter_(1, column, -torch.inf)
    rival = logits.amax(1, keepdim=True)  # the best of the other words: cheaper than argmax, and ties are rare
    logits.scatter_(1, column, picked)
    is_correct, is_tie = (picked > rival).squeeze(1), (picked == rival).squeeze(1)
    if bool(is_tie.any()):
        is_correct[is_tie] = logits[is_tie].argmax(1) == target[is_tie]
    return picked, torch.maximum(picked, rival), is_correct


def _exponentiate(
    logits: Tensor, target: Tensor, *, out: Tensor, shifted: Tensor | None
) -> tuple[Tensor, RowStatistics]:
    """Write e^(z - max) of a chunk of logits (C, V) to `out`, which may be the logits themselves.

    With a buffer `shifted` (C, V) for z - max, the entropy is made too: log Z - sum over v of p_v z_v, where the
    largest logit, taken from both terms, cancels.

    Returns:
        The sum of the exponentials over the words (C,), and what the chunk has to say.
    """
    picked, top, is_correct = _peaks(logits, target)
    entropy = None
    if shifted is None:
        total = torch.sub(logits, top, out=out).exp_().sum(1)
    else:
        torch.sub(logits, top, out=shifted)
        total = torch.exp(shifted, out=out).sum(1)
        # A word that a bias of -inf forbids has the term 0 log 0 = 0, not NaN.
        weighted = shifted.clamp_(min=torch.finfo(shifted.dtype).min).mul_(out).sum(1)
        entropy = total.log() - weighted / total  # neither term is below 0: total >= 1, and z - max <= 0
    return total, RowStatistics((picked - top).squeeze(1) - total.log(), is_correct, entropy)


def _entropy_residual(
    exponentials: Tensor,
    spare: Tensor,
    target: Tensor,
    weights: tuple[Tensor, Tensor],
    *,
    total: Tensor,
    entropy: Tensor,
) -> None:
    """Turn e^(z - max) of a chunk (C, V) into the gradient of coefficient * nll + entropy_coefficient * entropy.

    With p = softmax(z) and H its entropy, d nll / dz = p - one_hot(target) and dH / dz = -p log p - p H.

    Args:
        exponentials: Overwritten.
        spare: A buffer of the same shape.
        target: Word of each row; (C,) int64.
        weights: The two coefficients; (C,) each.
        total: Sum of the exponentials of each row; (C,).
        entropy: H of each row; (C,).
    """
    of_nll, of_entropy = weights
    torch.special.entr(exponentials.div_(total.unsqueeze(1)), out=spare)
    exponentials.mul_((of_nll - of_entropy * entropy).unsqueeze(1)).addcmul_(spare, of_entropy.unsqueeze(1))
    exponentials.scatter_add_(1, target.unsqueeze(1), -of_nll.unsqueeze(1))


def run_chunks(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    call: Call,
    gradients: Gradients | None = None,
    coefficient: Tensor | None = None,
    entropy_coefficient: Tensor | None = None,
) -> RowStatistics:
    """Pass over all chunks: the statistics of N rows, and their gradients where asked for.

    Args:
        rows: Hidden states; (N, H).
        weight: Of the output layer; (V, H).
        bias: The same; (V,).
        targets: Word of each row; (N,) int64.
        call: What else the pass needs to know.
        gradients: Where to add them up; None where none are wanted.
        coefficient: Weight of each row's nll in the gradients; (N,). None: one for each.
        entropy_coefficient: Weight of each row's entropy in the gradients; (N,). None: nothing.
    """
    head = Head(weight, bias, call)
    log_probs = rows.new_empty(len(rows), dtype=head.sum_dtype)
    is_correct = torch.empty(len(rows), dtype=torch.bool, device=rows.device)
    entropy = torch.empty_like(log_probs) if call.with_entropy else None
    coefficient = torch.ones_like(log_probs) if coefficient is None else coefficient
    # The slope of the cap needs the logits once more; elsewhere their own buffer takes the exponentials.
    spare = head.logits if gradients is None or call.softcap is None else torch.empty_like(head.logits)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), call.chunk_size):
            span = slice(start, start + call.chunk_size)
            logits, target = head.project(rows[span]), targets[span]
            residual = spare[: len(target)]
            shifted = None if head.shifted is None else head.shifted[: len(target)]
            total, found = _exponentiate(logits, target, out=residual, shifted=shifted)
            log_probs[span], is_correct[span] = found.log_probs, found.is_correct
            if entropy is not None and found.entropy is not None:
                entropy[span] = found.entropy
            if gradients is None:
                continue
            weight_of_row = coefficient[span]
            if entropy_coefficient is not None and shifted is not None and found.entropy is not None:
                both = (weight_of_row, entropy_coefficient[span])
                _entropy_residual(residual, shifted, target, both, total=total, entropy=found.entropy)
                total = weight_of_row = torch.ones_like(total)
            else:
                residual.scatter_add_(1, target.unsqueeze(1), -total.unsqueeze(1))
            if call.softcap is not None:  # the cap's slope is 1 - (z / softcap)^2
                residual.addcmul_(residual, logits.square_(), value=-1.0 / call.softcap**2)
            gradients.add(head, Chunk(span, rows[span], residual, total, weight_of_row))
    return RowStatistics(log_probs, is_correct, entropy)
