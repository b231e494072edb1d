"""How the units of a step lie on ranks and micro-batches: memory and speed, never the result."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple

from lf_lightning.types import Layout

Plan = list[list[list[int]]]
"""plan[rank][micro-batch] is a list of positions in the step; an empty list asks for a filler."""


class MicroBatchRule(NamedTuple):
    """How much fits into one micro-batch: a number of units, or a token budget."""

    size: int | None  # units, > 0; None where `tokens` decides
    tokens: int | None  # tokens including padding, > 0; None where `size` decides


def micro_batch_rules(options: dict[str, Any]) -> tuple[MicroBatchRule, MicroBatchRule]:
    """The rules of training and evaluation that the data's options say: 8192 tokens unless given, evaluation alike."""
    rules = [
        MicroBatchRule(options[f"{of}micro_batch_size"], options[f"{of}micro_batch_tokens"]) for of in ("", "eval_")
    ]
    train = rules[0] if any(rules[0]) else MicroBatchRule(None, 8192)
    return train, rules[1] if any(rules[1]) else train


def plan_lines(lengths: Sequence[int], global_batch_size: int, rule: MicroBatchRule) -> list[str]:
    """What a person wants to know of an epoch: its units and steps, and units that are longer than the budget."""
    steps = -(-len(lengths) // global_batch_size)
    lines = [f"train: {len(lengths):,} units of {sum(lengths):,} tokens, {steps:,} steps an epoch"]
    long = [length for length in lengths if rule.tokens is not None and length > rule.tokens]
    if long:
        lines.append(
            f"data.micro_batch_tokens: {len(long):,} units are longer than {rule.tokens:,} tokens "
            f"(longest {max(long):,}); each of them is a micro-batch of its own"
        )
    return lines


def micro_batch_plan(lengths: Sequence[int], *, num_ranks: int, rule: MicroBatchRule, layout: Layout) -> Plan:
    """Lay the units of one step on ranks and micro-batches, the same number of micro-batches on every rank.

    Units are spread so that ranks carry about the same number of tokens (longest first, to the least loaded rank),
    then cut into micro-batches of similar lengths.

    Args:
        lengths: Tokens of each unit of the step.
        num_ranks: Data-parallel size.
        rule: What fits into a micro-batch. A unit above the token budget is a micro-batch of its own.
        layout: `padded` counts a micro-batch as units x longest unit, `padding_free` as the sum of its units.

    Returns:
        For each rank its micro-batches, at least one, filled up with empty ones.
    """
    shares = _rank_shares(lengths, num_ranks, even_counts=rule.size is not None)
    plan = [_micro_batches(share, lengths, rule, layout) for share in shares]
    num_micro_batches = max(1, *(len(micro_batches) for micro_batches in plan))
    return [micro_batches + [[]] * (num_micro_batches - len(micro_batches)) for micro_batches in plan]


def _rank_shares(lengths: Sequence[int], num_ranks: int, *, even_counts: bool) -> list[list[int]]:
    """Longest first, each unit to the rank with the fewest tokens; with `even_counts` no rank exceeds its share."""
    longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    capacity = -(-len(lengths) // num_ranks) if even_counts else len(lengths)
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    heapify(loads)
    for position in longest_first:
        load, rank = heappop(loads)
        shares[rank].append(position)
        if len(shares[rank]) < capacity:
            heappush(loads, (load + lengths[position], rank))
    return shares


def _micro_batches(share: list[int], lengths: Sequence[int], rule: MicroBatchRule, layout: Layout) -> list[list[int]]:
    """Cut a rank's units, longest first, into micro-batches."""
    if rule.size is not None:
        return [share[start : start + rule.size] for start in range(0, len(share), rule.size)]
    assert rule.tokens is not None
    micro_batches: list[list[int]] = []
    costs: list[int] = []
    for position in share:
        length = lengths[position]
        # in the padded layout a unit takes the room of the longest one, which came first
        home = next(
            (
                index
                for index, cost in enumerate(costs)
                if cost + (length if layout == "padding_free" else lengths[micro_batches[index][0]]) <= rule.tokens
            ),
            None,
        )
        if home is None:
            micro_batches.append([position])
            costs.append(length)
        else:
            costs[home] += length if layout == "padding_free" else lengths[micro_batches[home][0]]
            micro_batches[home].append(position)
    return micro_batches
