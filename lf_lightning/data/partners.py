"""Which other row's response stands against each prompt, from which kto estimates the KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lf_lightning.types import Unit

KLPairs = Literal["step", "dataset"]

GROUP = 1000
"""Documents among which the fixed pairing rotates: LlamaFactory's preprocessing_batch_size."""


def with_partners(units: Sequence[Unit], documents: Sequence[int], *, kl_pairs: KLPairs, step_size: int) -> list[Unit]:
    """Give each unit of an epoch its partner; decided before ranks are split, so that no layout changes it.

    Args:
        units: One document each, in the order of the epoch.
        documents: All documents of the set in the order of its files.
        kl_pairs: `step` takes the next unit of the same optimizer step, `dataset` a fixed neighbour in the files.
        step_size: Units of an optimizer step; of a set that only validates, all of them.
    """
    order = [unit.spans[0].document for unit in units]
    if kl_pairs == "dataset":
        fixed = fixed_partners(documents)
        return [unit._replace(partner=fixed[document]) for unit, document in zip(units, order, strict=True)]
    partners = step_partners(order, step_size)
    return [unit._replace(partner=partner) for unit, partner in zip(units, partners, strict=True)]


def step_partners(documents: Sequence[int], step_size: int) -> list[int | None]:
    """The next document of the same step, for its last one the first; None where a step has one document.

    Args:
        documents: In the order of the epoch.
        step_size: Documents of a step; the last one may be short.
    """
    partners: list[int | None] = []
    for start in range(0, len(documents), step_size):
        step = documents[start : start + step_size]
        partners += [*step[1:], step[0]] if len(step) > 1 else [None]
    return partners


def fixed_partners(documents: Sequence[int]) -> dict[int, int | None]:
    """Document -> the one before it; for the first of each group of 1000, the last of that group.

    A single document at the end joins the group before it, so that none is its own partner; alone it has none.

    Source: LlamaFactory's feedback processor, where a dataset's rows are mapped in batches of 1000.
    """
    starts = list(range(0, len(documents), GROUP))
    if len(starts) > 1 and len(documents) - starts[-1] == 1:
        starts.pop()
    if len(documents) == 1:
        return {documents[0]: None}
    partners: dict[int, int | None] = {}
    for start, end in zip(starts, [*starts[1:], len(documents)], strict=True):
        group = documents[start:end]
        partners |= zip(group, [group[-1], *group[:-1]], strict=True)
    return partners
