"""Log-probs of target tokens straight from hidden states, without ever holding a (tokens x vocabulary) tensor.

Two forms. `cross_entropy_sums` is a sum, so its gradients are made in the forward pass, chunk by chunk, and nothing is
computed twice. `token_statistics` takes any upstream gradient and computes each chunk again in the backward pass; where
the output layer is frozen it makes the gradient of each row in the forward pass instead, and scales it later.

Below them: what a stage makes of log-probs per token where it needs one number per sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lf_lightning.losses.chunks import Call, Gradients, run_chunks
from lf_lightning.types import IGNORE, OutputLayer


class CrossEntropySums(NamedTuple):
    """Sums over the counted positions of a batch."""

    nll: Tensor  # scalar float32 (float64 for float64 inputs): sum of negative log-likelihoods, in nats
    num_correct: Tensor  # scalar int64, no gradient: positions whose target is the first of the largest logits


class TokenStatistics(NamedTuple):
    """What a batch says about each of its positions."""

    log_probs: Tensor  # (B, T) float32 (float64 for float64 inputs): of the target, in nats; 0 where nothing counts
    is_correct: Tensor  # (B, T) bool, no gradient: the target is the first of the largest logits; else False
    entropy: (
        Tensor | None
    )  # (B, T) like log_probs: entropy in nats, in [0, log V]; gradient and all only where asked for


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
    index, rows, counted = counted_rows(hidden, targets)
    call = Call.of(hidden, output_layer, num_rows=len(index), chunk_size=chunk_size)
    inputs = (rows, output_layer.weight, output_layer.bias, counted, call)
    return CrossEntropySums(*_CrossEntropy.apply(*inputs))  # type: ignore[no-untyped-call]


def token_log_probs(
    hidden: Tensor, output_layer: OutputLayer, targets: Tensor, *, chunk_size: int | None = None
) -> Tensor:
    """Log-prob of each target token: the field `log_probs` of `token_statistics`, and nothing else.

    Args:
        hidden: Last hidden states of the backbone; (B, T, H). Types as in `cross_entropy_sums`.
        output_layer: How hidden states become logits.
        targets: Token at each position, IGNORE where none counts; (B, T) int64.
        chunk_size: Rows whose logits are held at a time, as in `cross_entropy_sums`.

    Returns:
        Log-probs in nats, <= 0, and 0 where nothing counts; (B, T) float32 (float64 for float64 inputs).
    """
    return token_statistics(hidden, output_layer, targets, chunk_size=chunk_size).log_probs


def token_statistics(
    hidden: Tensor,
    output_layer: OutputLayer,
    targets: Tensor,
    *,
    chunk_size: int | None = None,
    with_entropy: bool = False,
    entropy_grad: bool = False,
) -> TokenStatistics:
    """Log-prob of each target token, whether it is the prediction, and how sure the prediction is.

    log p_n = z_n[target_n] - log Z_n,  entropy_n = log Z_n - sum over v of p_nv z_nv,  log Z_n = logsumexp(z_n),
    z = cap(scale * (hidden @ weight.T + bias))

    Any upstream gradient of the log-probs is right. Where weight or bias are trained, the backward pass computes each
    chunk of logits again; where both are frozen, it only scales the rows of a (counted positions, H) gradient kept from
    the forward pass. The entropy costs one more buffer of a chunk's size, and nothing where it is not asked for.

    Args:
        hidden: Last hidden states of the backbone; (B, T, H). Types as in `cross_entropy_sums`.
        output_layer: How hidden states become logits.
        targets: Token at each position, IGNORE where none counts; (B, T) int64.
        chunk_size: Rows whose logits are held at a time, as in `cross_entropy_sums`.
        with_entropy: Also make the entropy of the predicted distribution.
        entropy_grad: The entropy has a gradient too; the backward pass then computes each chunk of logits again,
            whether the output layer is frozen or not.

    Returns:
        The three, each (B, T). With nothing counted the log-probs are still connected to the inputs (zero gradients).

    Source: the log-softmax of the output layer at the target; recomputation as in Chen et al. 2016, arXiv:1604.06174.
    """
    index, rows, counted = counted_rows(hidden, targets)
    call = Call.of(
        hidden,
        output_layer,
        num_rows=len(index),
        chunk_size=chunk_size,
        with_entropy=with_entropy,
        entropy_grad=entropy_grad,
    )
    inputs = (rows, output_layer.weight, output_layer.bias, counted, call)
    found = _RowStatistics.apply(*inputs)  # type: ignore[no-untyped-call]

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(targets.numel()).index_copy(0, index, values).view_as(targets)

    log_probs, is_correct, entropy = found
    return TokenStatistics(spread(log_probs), spread(is_correct), None if entropy is None else spread(entropy))


def sequence_sums(values: Tensor, sequences: Tensor, num_sequences: int) -> Tensor:
    """Sum of `values` over the positions of each sequence.

    Args:
        values: Anything per position, such as log-probs; (B, T).
        sequences: Sequence that each position belongs to, S where it counts for none; (B, T) int64 in [0, S].
        num_sequences: S.

    Returns:
        Sums, 0 for a sequence without positions; (S,) of the type of `values`, added up in float64 so that neither
        length nor layout of a batch shows. With S = 0 it is empty and still connected to `values` (zero gradient).
    """
    assert values.shape == sequences.shape, f"values {tuple(values.shape)}, sequences {tuple(sequences.shape)}"
    sums = values.new_zeros(num_sequences + 1, dtype=torch.float64)
    return sums.index_add(0, sequences.flatten(), values.flatten().double())[:num_sequences].to(values.dtype)


def sequence_lengths(sequences: Tensor, num_sequences: int) -> Tensor:
    """Counted tokens of each sequence; (S,) int64. Arguments as in `sequence_sums`."""
    flat = sequences.flatten()
    return flat.new_zeros(num_sequences + 1).index_add(0, flat, torch.ones_like(flat))[:num_sequences]


def front_sums(values: Tensor, sequences: Tensor, front_lengths: Tensor) -> Tensor:
    """Sum of `values` over the first positions of each sequence, in the order in which they lie in the batch.

    Args:
        values: Anything per position; (B, T).
        sequences: As in `sequence_sums`. Sequences may lie anywhere, even mixed with each other.
        front_lengths: How many positions of each sequence to take, >= 0; all where it has fewer; (S,) int64.

    Returns:
        Sums; (S,) as `sequence_sums` gives them.
    """
    num_sequences, flat = len(front_lengths), sequences.flatten()
    order = flat.argsort(stable=True)  # sequence by sequence, each in its own order
    lengths = sequence_lengths(sequences, num_sequences + 1)  # with those that count nowhere
    starts = lengths.cumsum(0) - lengths
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
    is_front = rank < torch.cat([front_lengths, front_lengths.new_zeros(1)])[flat]
    return sequence_sums(values, flat.where(is_front, num_sequences).view_as(sequences), num_sequences)


def length_desensitized(whole: Tensor, front: Tensor, *, ld_alpha: float) -> Tensor:
    """Log-prob of a response in which the tokens beyond the length of the shorter of a pair weigh less.

    front + ld_alpha (whole - front)

    Args:
        whole: Sum of log-probs over the response, in nats; (S,).
        front: The same over its first min(chosen length, rejected length) tokens; (S,).
        ld_alpha: Weight of the tokens beyond, in [0, 1]; 1 changes nothing.

    Source: LD-DPO, Liu et al. 2024, arXiv:2409.06411.
    """
    return front + ld_alpha * (whole - front)


def counted_rows(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat positions (N,) of targets that count, with their hidden states (N, H) and targets (N,)."""
    assert hidden.shape[:-1] == targets.shape, f"hidden {tuple(hidden.shape)} does not fit {tuple(targets.shape)}"
    flat = targets.flatten()
    index = (flat != IGNORE).nonzero().squeeze(1)
    return index, hidden.flatten(0, -2).index_select(0, index), flat.index_select(0, index)


class _CrossEntropy(torch.autograd.Function):
    """Sum of negative log-likelihoods; gradients made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad[:3]
        gradients = Gradients(needs, rows, weight, bias) if call.with_grad and any(needs) else None
        log_probs, is_correct, _ = run_chunks(rows, weight, bias, targets, call=call, gradients=gradients)
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
            gradients = Gradients(ctx.needs_input_grad[:3], rows, weight, bias)
            run_chunks(rows, weight, bias, targets, call=ctx.call, gradients=gradients)
        return *gradients.times(grad_nll * ctx.call.scale).give((rows, weight, bias)), None, None


class _RowStatistics(torch.autograd.Function):
    """Log-prob of each row's target (N,), for any upstream gradient; prediction and entropy beside it."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        needs = ctx.needs_input_grad[:3]
        ctx.dtype, ctx.is_frozen = rows.dtype, not (needs[1] or needs[2] or call.entropy_grad)
        ctx.call = call._replace(with_entropy=call.entropy_grad)  # the backward pass wants gradients only
        unit = Gradients(needs, rows, weight, bias) if call.with_grad and needs[0] and ctx.is_frozen else None
        log_probs, is_correct, entropy = run_chunks(rows, weight, bias, targets, call=call, gradients=unit)
        if unit is not None:
            ctx.save_for_backward(unit.rows)
        else:
            ctx.save_for_backward(rows, weight, bias, targets)
        ctx.mark_non_differentiable(is_correct, *(() if entropy is None or call.entropy_grad else (entropy,)))
        return log_probs, is_correct, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor, _: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        coefficient = -ctx.call.scale * grad_log_probs
        if ctx.is_frozen:
            (unit,) = ctx.saved_tensors
            return (unit * coefficient.unsqueeze(1)).to(ctx.dtype), None, None, None, None
        rows, weight, bias, targets = ctx.saved_tensors
        gradients = Gradients(ctx.needs_input_grad[:3], rows, weight, bias)
        of_entropy = ctx.call.scale * grad_entropy if ctx.call.entropy_grad and grad_entropy is not None else None
        run_chunks(
            rows,
            weight,
            bias,
            targets,
            call=ctx.call,
            gradients=gradients,
            coefficient=coefficient,
            entropy_coefficient=of_entropy,
        )
        return *gradients.give((rows, weight, bias)), None, None
