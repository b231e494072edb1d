"""Optimizer steps on responses that do not exist yet: prompts in, the stage's responses back, minibatches out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from lf_lightning.data.batches import Batches
from lf_lightning.data.collate_rollouts import Exchange, exchanges_of, rollout_batch
from lf_lightning.data.layout import MicroBatchRule, micro_batch_plan
from lf_lightning.data.order import epoch_order, steps_per_epoch
from lf_lightning.data.prompts import Prompt
from lf_lightning.types import InputError, PromptBatch, Response, StepBatch, UnitId

PASSES = 0x2011
"""Keeps the order of responses apart from that of prompts."""


def prompt_rows_of(prompts: Sequence[Prompt]) -> tuple[UnitId, ...]:
    """The rows of prompts, each once, in their order."""
    return tuple(dict.fromkeys(UnitId(prompt.source, prompt.row) for prompt in prompts))


class RollsOut(Protocol):
    """What the loader of rollouts asks of the stage."""

    def rollout(self, number: int, prompts: Sequence[PromptBatch]) -> Sequence[Response]:
        """Answer and score this rank's prompts; gives the responses of all ranks, in the order of their rows."""

    def make_experience(self, steps: Sequence[StepBatch]) -> None:
        """Compute what the updates need of every token, on this rank's optimizer steps of the first epoch."""


class RolloutPlan(NamedTuple):
    """How prompts become rollouts, and rollouts optimizer steps."""

    rollout_size: int  # responses of a rollout, > 0; a multiple of group_size
    group_size: int  # responses to each prompt, side by side
    num_epochs: int  # passes over a rollout
    global_batch_size: int  # responses of an optimizer step
    seed: int
    shuffle: bool  # whether prompts are visited in a new order each epoch; responses always are

    @property
    def num_prompts(self) -> int:
        """Prompts of a rollout; the last one of an epoch may have fewer."""
        return self.rollout_size // self.group_size

    def check(self) -> RolloutPlan:
        """Refuse groups that a rollout would cut.

        Raises:
            InputError: As said.
        """
        if self.rollout_size % self.group_size:
            raise InputError(
                f"data.rollout_size: must be a multiple of model.init_args.constants.group_size, {self.group_size}, "
                f"got {self.rollout_size}. Set it, or data.global_batch_size where it is empty."
            )
        return self

    def steps(self, num_prompts: int) -> int:
        """Optimizer steps of a rollout."""
        return self.num_epochs * steps_per_epoch(num_prompts * self.group_size, self.global_batch_size)

    def line(self, num_prompts: int, num_steps: int) -> str:
        """What a person wants to know of an epoch."""
        used = min(self.num_prompts, num_prompts)
        size, steps = used * self.group_size, self.steps(used)
        return (
            f"train: {num_prompts:,} prompts, rollouts of {size:,} responses with {steps:,} steps each, "
            f"{num_steps:,} steps an epoch"
        )


class RolloutLoader:
    """The optimizer steps of an epoch over prompts, as this rank's share of each.

    An epoch visits every prompt once. Its state is the number of prompts of finished rollouts, and of steps handed out
    of the rollout in progress; the responses of that one are the stage's to keep.

    Args:
        prompts: What is answered.
        plan: How.
        rule: What fits into a micro-batch.
        batches: This rank's layout, asked for when it is settled.
        stage: Who answers, asked for when training begins.
        batch_size: Prompts that are answered together.
        pad_id: Token that pads them.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        plan: RolloutPlan,
        *,
        rule: MicroBatchRule,
        batches: Callable[[], Batches],
        stage: Callable[[], RollsOut],
        batch_size: int,
        pad_id: int,
    ) -> None:
        self._prompts, self._plan, self._rule = prompts, plan, rule
        self._batches, self._stage, self._batch_size, self._pad_id = batches, stage, batch_size, pad_id
        self.num_units = len(prompts)
        self.asked: Sequence[Prompt] = ()
        """The prompts of the last rollout, on all ranks."""
        self._epoch, self._consumed_units, self._rollout_step = 0, 0, 0

    @property
    def sampler(self) -> RolloutLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Move to an epoch; to its first prompt unless the epoch is the one already begun."""
        if epoch != self._epoch:
            self._epoch, self._consumed_units, self._rollout_step = epoch, 0, 0

    @property
    def in_rollout(self) -> bool:
        """Whether steps of a begun rollout are left."""
        return self._rollout_step > 0

    def __len__(self) -> int:
        """Optimizer steps of a whole epoch."""
        starts = range(0, self.num_units, self._plan.num_prompts)
        return sum(self._plan.steps(min(self._plan.num_prompts, self.num_units - start)) for start in starts)

    def __iter__(self) -> Iterator[StepBatch]:
        """The steps from the cursor to the end of the epoch. The cursor moves when a step is handed out."""
        plan = self._plan
        order = epoch_order(self.num_units, seed=plan.seed, epoch=self._epoch, shuffle=plan.shuffle)
        num_rollouts = steps_per_epoch(self.num_units, plan.num_prompts)
        while self._consumed_units < self.num_units:
            chosen = order[self._consumed_units : self._consumed_units + plan.num_prompts]
            number = self._epoch * num_rollouts + self._consumed_units // plan.num_prompts
            steps = self._steps(number, [self._prompts[unit] for unit in chosen for _ in range(plan.group_size)])
            num_steps = plan.steps(len(chosen))
            for step in range(self._rollout_step, num_steps):
                self._rollout_step = step + 1
                if step + 1 == num_steps:
                    self._rollout_step, self._consumed_units = 0, self._consumed_units + len(chosen)
                yield steps(step)
        self._consumed_units = 0

    def _steps(self, number: int, prompts: Sequence[Prompt]) -> Callable[[int], StepBatch]:
        """Have a rollout made, unless the stage holds it; gives what lays out its steps."""
        batches, stage = self._batches(), self._stage()
        self.asked = prompts
        asked = batches.prompts(prompts, batch_size=self._batch_size, pad_id=self._pad_id)
        responses = stage.rollout(number, [make() for make in asked])
        assert [response.row for response in responses] == list(range(len(prompts))), "responses in the order of rows"
        exchanges = exchanges_of([prompt.ids for prompt in prompts], [response.token_ids for response in responses])
        size = self._plan.global_batch_size
        num_minibatches = steps_per_epoch(len(exchanges), size)

        def laid_out(step: int) -> StepBatch:
            turn, minibatch = divmod(step, num_minibatches)
            order = np.random.default_rng([self._plan.seed, PASSES, number, turn]).permutation(len(exchanges))
            chosen = [exchanges[row] for row in order[minibatch * size : (minibatch + 1) * size]]
            return self._share(chosen, batches, prompts)

        first = [laid_out(step) for step in range(num_minibatches)]
        stage.make_experience(first)
        # the very tensors of the first pass, so that what is computed on them again is the same bit by bit
        return lambda step: first[step] if step < len(first) else laid_out(step)

    def _share(self, exchanges: Sequence[Exchange], batches: Batches, prompts: Sequence[Prompt]) -> StepBatch:
        """This rank's micro-batches of a minibatch."""
        costs = [exchange.num_tokens for exchange in exchanges]
        plan = micro_batch_plan(costs, num_ranks=batches.num_ranks, rule=self._rule, layout=batches.layout)
        shares = [[exchanges[position] for position in positions] for positions in plan[batches.rank]]
        micro_batches = tuple(rollout_batch(share, layout=batches.layout) for share in shares)
        own = [prompts[exchange.row] for share in shares for exchange in share]
        return StepBatch(micro_batches, partial(prompt_rows_of, own))

    def state_dict(self) -> dict[str, Any]:
        """The cursor: epoch, prompts of its finished rollouts, and steps handed out of the one in progress."""
        return {
            "epoch": self._epoch,
            "consumed_units": self._consumed_units,
            "rollout_step": self._rollout_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._epoch, self._consumed_units = int(state["epoch"]), int(state["consumed_units"])
        self._rollout_step = int(state["rollout_step"])
