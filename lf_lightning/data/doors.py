"""What stages, callbacks and notebooks ask of the data, whatever trainer runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ParallelStrategy
from numpy.typing import NDArray

from lf_lightning.data.batches import Batches, rows_of
from lf_lightning.data.collate_rollouts import exchanges_of, rollout_batch
from lf_lightning.data.encode import EncodeOptions
from lf_lightning.data.layout import MicroBatchRule
from lf_lightning.data.loader import EvalLoader
from lf_lightning.data.prompts import Prompt
from lf_lightning.data.reader import Reader
from lf_lightning.data.rollouts import RolloutPlan, RollsOut
from lf_lightning.data.sets import EncodedSets, Split
from lf_lightning.data.templates import Template, stop_token_ids
from lf_lightning.types import Layout, PromptBatch, Response, RolloutBatch, StepBatch, Task, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DataDoors(LightningDataModule):
    """The half of the DataModule that is asked; the other half holds the options and Lightning's hooks."""

    task: Task
    arguments: dict[str, Any]
    """The options as they were given, without the two that the stage decides."""
    stored_reference: dict[tuple[Split, int], NDArray[np.float64]]
    """`reference_key` -> reference log-probs by document, which the batches then carry: (D, 2, 2) of pairs, chosen and
    rejected x whole and front; (D, 2) of feedback, response and partner's."""
    global_batch_size: int
    rule: MicroBatchRule
    eval_rule: MicroBatchRule
    seed: int
    options: EncodeOptions
    reader: Reader
    sets: EncodedSets
    _layout: Layout
    _share_prompt: bool

    wants_partners = True  # kto: whether the loss estimates a kl; the stage sets it
    predict_batch_size = 8  # prompts of a batch; the stage sets it from its generation spec
    group_size, rollout_epochs = 1, 1  # ppo, grpo: responses to each prompt, passes over a rollout; the stage sets them

    # ------------------------------------------------------------------ what stages and callbacks ask

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the template that the data is rendered with."""
        return self.reader.tokenizer

    @property
    def new_rows(self) -> dict[int, tuple[int, ...]]:
        """Id of each token that the backbone's own tokenizer does not know -> ids of its description."""
        return self.reader.new_rows

    @property
    def template(self) -> Template:
        """The chat template."""
        return self.reader.template

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_token_ids(self.template, self.tokenizer)

    @property
    def layout(self) -> Layout:
        """How micro-batches lie in memory: as asked for, or as the stage's probe decided."""
        return self._layout

    @property
    def share_prompt(self) -> bool:
        """Whether two responses run over their prompt once: as asked for, or as the stage's probe decided."""
        return self._share_prompt and self._layout == "padding_free"

    @property
    def isolate_documents(self) -> bool:
        """Whether documents of a pack are hidden from each other."""
        asked: bool | None = self.arguments["isolate_documents"]
        return self.options.packing == "knapsack" if asked is None else asked

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence or of a pack."""
        return self.options.max_length

    # ------------------------------------------------------------------ doors for notebooks and callbacks

    def units(self, split: Split, epoch: int = 0) -> list[Unit]:
        """The units of an epoch in their order, with kto each beside its partner: a function of (data, seed, epoch)."""
        chosen, trains = self.sets[split], split == "train"
        units = chosen.units(
            packing=self.options.packing,
            max_length=self.max_length,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.arguments["shuffle"] and trains,
        )
        if self.task != "kto" or not self.wants_partners:
            return units
        step_size = self.global_batch_size if trains else None
        return chosen.paired(units, kl_pairs=self.arguments["kl_pairs"], step_size=step_size)

    def reference_key(self, split: Split, epoch: int = 0) -> tuple[Split, int]:
        """Where `stored_reference` keeps what an epoch needs: the epoch counts only where it changes the partners."""
        changes = self.task == "kto" and self.wants_partners and self.arguments["kl_pairs"] == "step"
        changes = changes and split == "train"
        return split, epoch if changes else 0

    def reference_batches(self, split: Split, epoch: int = 0) -> EvalLoader:
        """All units of an epoch on this rank, one micro-batch a StepBatch, without stored reference log-probs."""
        return EvalLoader(partial(self._one_by_one, split, epoch, stored=False))

    def num_desirable(self, split: Split) -> tuple[int, int] | None:
        """Rows of a set of kto that were liked, and rows that were not; None of a stream, where nobody knows."""
        streams = split == "train" and self.arguments["streaming"]
        return None if streams else self.sets[split].num_desirable()

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a set with the answers that the data gives; validation rows of a split training set too.

        Raises:
            InputError: There is no such set.
        """
        return self.sets.prompts(split)

    def prompt_loader(self, split: Split, *, batch_size: int) -> EvalLoader:
        """The prompts of a set in batches of this rank; the same number of batches on every rank."""
        return EvalLoader(partial(self._prompt_batches, split, batch_size))

    def answered(self, batch: PromptBatch, responses: Sequence[Response]) -> RolloutBatch:
        """A batch of prompts with their responses as one micro-batch, in their order; fillers are among them.

        Args:
            batch: Prompts, on whichever device.
            responses: One to each.
        """
        rows = zip(batch.input_ids.cpu(), batch.mask.cpu().bool(), strict=True)
        prompts = [tuple(ids[mask].tolist()) for ids, mask in rows]
        return rollout_batch(exchanges_of(prompts, [each.token_ids for each in responses]), layout=self.layout)

    @property
    def _rollout_plan(self) -> RolloutPlan:
        size, shuffle = self.arguments["rollout_size"] or self.global_batch_size, self.arguments["shuffle"]
        return RolloutPlan(size, self.group_size, self.rollout_epochs, self.global_batch_size, self.seed, shuffle)

    def _rolling_stage(self) -> RollsOut:
        assert self.trainer is not None, "rollouts need a trainer, whose stage answers"
        stage: Any = self.trainer.lightning_module
        rolling: RollsOut = stage
        return rolling

    @property
    def _batches(self) -> Batches:
        """How units become batches now: the strategy knows this process, also where ranks share a model."""
        strategy = self.trainer.strategy if self.trainer is not None else None
        place = strategy.distributed_sampler_kwargs if isinstance(strategy, ParallelStrategy) else {}
        rank, num_ranks = int(place.get("rank", 0)), int(place.get("num_replicas", 1))
        return Batches(
            self.task, self.layout, self.share_prompt, self.isolate_documents, self.max_length, rank, num_ranks
        )

    def _arrange(self, units: Sequence[Unit], epoch: int) -> StepBatch:
        reference = self.stored_reference.get(self.reference_key("train", epoch))
        return self._batches.step(units, self.sets["train"].store, self.rule, reference)

    def _one_by_one(self, split: Split, epoch: int = 0, *, stored: bool = True) -> list[partial[StepBatch]]:
        shares = self._batches.shares(self.units(split, epoch), self.sets[split].store, self.eval_rule)
        return [partial(self._single, split, epoch, share, stored=stored) for share in shares]

    def _single(self, split: Split, epoch: int, units: Sequence[Unit], *, stored: bool) -> StepBatch:
        """Collated as things stand when it is asked for: Lightning asks for lengths before the layout is settled."""
        reference = self.stored_reference.get(self.reference_key(split, epoch)) if stored else None
        store = self.sets[split].store
        return StepBatch((self._batches.micro_batch(units, store, reference),), partial(rows_of, units, store))

    def _prompt_batches(self, split: Split, batch_size: int) -> list[partial[PromptBatch]]:
        chosen, pad_id = self.prompts(split), int(self.tokenizer.pad_token_id)
        return self._batches.prompts(chosen, batch_size=batch_size, pad_id=pad_id)
