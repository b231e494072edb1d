"""The batches of a run: units and prompts laid on ranks and micro-batches, and collated as the task wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lf_lightning.data.checks import ROLLING
from lf_lightning.data.collate import prompt_batch, token_batch
from lf_lightning.data.collate_judgements import feedback_batch, feedback_costs, preference_batch, preference_costs
from lf_lightning.data.layout import MicroBatchRule, micro_batch_plan
from lf_lightning.data.prompts import Prompt
from lf_lightning.data.store import TokenStore
from lf_lightning.types import InputError, Isolation, Layout, MicroBatch, PromptBatch, StepBatch, Task, Unit, UnitId

StoredReference = NDArray[np.float64] | None
"""Stored reference log-probs by document of the store, (D, 2, 2) of pairs or (D, 2) of feedback; None: none stored."""


@dataclass(frozen=True)
class Batches:
    """How units become batches on this rank.

    Args:
        task: Decides the kind of batch.
        layout: How micro-batches lie in memory.
        share_prompt: Both responses to a prompt run over it once.
        isolate: Documents of a pack do not see each other.
        max_length: Most tokens of prompt and response together.
        rank: This process among the data-parallel ones.
        num_ranks: Their number.
    """

    task: Task
    layout: Layout
    share_prompt: bool
    isolate: bool
    max_length: int
    rank: int = 0
    num_ranks: int = 1

    def costs(self, units: Sequence[Unit], store: TokenStore) -> list[int]:
        """Tokens that each unit takes in a micro-batch."""
        if self.task in ("pt", "sft"):
            return [unit.num_tokens for unit in units]
        if self.task == "kto":
            return feedback_costs(
                units, store, layout=self.layout, share_prompt=self.share_prompt, max_length=self.max_length
            )
        return preference_costs(units, store, layout=self.layout, share_prompt=self.share_prompt)

    def micro_batch(self, units: Sequence[Unit], store: TokenStore, reference: StoredReference = None) -> MicroBatch:
        """Collate the units of one micro-batch; none make a filler."""
        if self.task in ("pt", "sft"):
            return token_batch(units, store, layout=self.layout, isolate=self.isolate)
        if self.task == "kto":
            return feedback_batch(
                units,
                store,
                layout=self.layout,
                share_prompt=self.share_prompt,
                max_length=self.max_length,
                reference=reference,
            )
        return preference_batch(units, store, layout=self.layout, share_prompt=self.share_prompt, reference=reference)

    def step(
        self, units: Sequence[Unit], store: TokenStore, rule: MicroBatchRule, reference: StoredReference = None
    ) -> StepBatch:
        """This rank's share of an optimizer step."""
        shares = self.shares(units, store, rule)
        micro_batches = tuple(self.micro_batch(share, store, reference) for share in shares)
        return StepBatch(micro_batches, partial(rows_of, [unit for share in shares for unit in share], store))

    def shares(self, units: Sequence[Unit], store: TokenStore, rule: MicroBatchRule) -> list[list[Unit]]:
        """This rank's micro-batches of a step or a set, as their units; an empty one asks for a filler."""
        costs = self.costs(units, store)
        plan = micro_batch_plan(costs, num_ranks=self.num_ranks, rule=rule, layout=self.layout)
        return [[units[position] for position in positions] for positions in plan[self.rank]]

    def prompts(self, prompts: Sequence[Prompt], *, batch_size: int, pad_id: int) -> list[partial[PromptBatch]]:
        """This rank's share of the prompts, longest first; the same number of batches on every rank.

        Answers that train end with the longest sequence; others only where the generation spec says.
        """
        max_length = self.max_length if self.task in ROLLING else None
        longest_first = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].ids), row))
        batches: list[partial[PromptBatch]] = []
        for start in range(0, len(prompts), batch_size * self.num_ranks):
            rows = longest_first[start : start + batch_size * self.num_ranks][self.rank :: self.num_ranks]
            chosen = [prompts[row] for row in rows] or [prompts[0]]
            batches.append(partial(prompt_batch, chosen, rows or [-1], pad_id=pad_id, max_length=max_length))
        return batches


def rows_of(units: Sequence[Unit], store: TokenStore) -> tuple[UnitId, ...]:
    """The rows that units are made of, each once, in their order; a pack has several."""
    documents = (span.document for unit in units for span in unit.spans)
    return tuple(dict.fromkeys(store.row_of(document) for document in documents))


def settled_layout(asked: str, verdict: Isolation, *, packs_isolated: bool) -> Layout:
    """The layout that is asked for, or with `auto` padding_free where the model passed the probe.

    Args:
        asked: `auto`, `padded` or `padding_free`.
        verdict: In which layouts the model keeps documents of one row apart.
        packs_isolated: Whether units are packs whose documents must not see each other.

    Raises:
        InputError: The configuration needs what the model cannot do.
    """
    if asked == "padding_free" and not verdict.padding_free:
        raise InputError(
            "data.layout: padding_free needs a model whose documents do not see each other, "
            "got one that failed the probe. Set data.layout: padded."
        )
    layout: Layout = "padded" if asked == "padded" or not verdict.padding_free else "padding_free"
    if packs_isolated and layout == "padded" and not verdict.padded:
        raise InputError(
            "data.isolate_documents: needs a model whose documents do not see each other in one row, "
            "got one that failed the probe in the padded layout. Set it to false, or data.packing: none."
        )
    return layout


def settled_sharing(asked: bool | None, verdict: Isolation, layout: Layout) -> bool:
    """Whether two responses run over one prompt: as asked for, or wherever layout and model allow.

    Raises:
        InputError: It is asked for, and the model cannot.
    """
    allowed = layout == "padding_free" and verdict.branches
    if asked and not allowed:
        raise InputError(
            "data.share_prompt: true needs a model whose responses to one prompt do not see each other in one row, "
            "got one that failed the probe. Set data.share_prompt: false."
        )
    return allowed if asked is None else asked
