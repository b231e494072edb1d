"""From prompts to scored responses, on every rank at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from lf_lightning.callbacks.predictions import Sample, from_all_ranks
from lf_lightning.models import SamplingSpec
from lf_lightning.models.rewards import Reward, RewardBatch, combined_scores
from lf_lightning.models.sharding import whole
from lf_lightning.types import InputError, PromptBatch, Response, TrainingStopped

if TYPE_CHECKING:
    from lf_lightning.stages.rollout import RolloutStage

Found = TypeVar("Found")


def respond(
    stage: RolloutStage, batches: Sequence[PromptBatch], spec: SamplingSpec, *, seeds: Sequence[int]
) -> list[list[Response]]:
    """Answer and score this rank's prompts.

    Args:
        stage: Whose policy, engine and rewards are asked; in evaluation mode.
        batches: Prompts; the same number of batches on every rank.
        spec: How to choose tokens.
        seeds: What the draws follow from, beside the row of a prompt.

    Returns:
        The responses of each batch, in its order; those to fillers have the row -1, and no scores.

    Raises:
        TrainingStopped: Generation or a reward failed, on whichever rank.
    """
    drawn = _on_all_ranks(lambda: _drawn(stage, batches, spec, seeds))
    # scoring by an adapter runs the policy as often as this rank has responses: its weights must be whole
    gathers = any(reward.needs_adapter for reward in stage.rewards)
    with whole(stage.backbone) if gathers else nullcontext():
        return _on_all_ranks(lambda: [_scored(stage, batch, responses) for batch, responses in drawn])


def _on_all_ranks(work: Callable[[], Found]) -> Found:
    """Do what needs no other rank; where it fails on one, all stop."""
    trouble = ""
    try:
        found = work()
    except (InputError, TrainingStopped) as error:
        trouble = str(error)
    told = [line for line in from_all_ranks(trouble) if line]
    if told:
        raise TrainingStopped(told[0])
    return found


def _drawn(
    stage: RolloutStage, batches: Sequence[PromptBatch], spec: SamplingSpec, seeds: Sequence[int]
) -> list[tuple[PromptBatch, list[Response]]]:
    """Responses without scores, each batch beside its own; all are drawn before any is scored."""
    stops, found = list(stage.data.stop_token_ids), []
    with stage.engine.ready(stage.backbone):
        for batch in batches:
            moved = stage.transfer_batch_to_device(batch, stage.device, 0)
            draws = row_seeds(batch, seeds)
            tokens = stage.engine.generate(stage.backbone, moved, spec, stop_token_ids=stops, seeds=draws)
            rows = zip(batch.rows, tokens, strict=True)
            found.append((batch, [Response(row, tuple(ids), ids[-1] in stops) for row, ids in rows]))
    return found


def row_seeds(batch: PromptBatch, seeds: Sequence[int]) -> list[int]:
    """What the answer to each prompt of a batch is drawn from: some numbers and its row, never its neighbours."""
    states = (np.random.SeedSequence([*seeds, max(row, 0)]).generate_state(1, np.uint64)[0] for row in batch.rows)
    return [int(state >> np.uint64(1)) for state in states]


def _scored(stage: RolloutStage, batch: PromptBatch, responses: Sequence[Response]) -> list[Response]:
    """The responses with their scores."""
    tokenizer = stage.data.tokenizer
    chosen = [place for place, response in enumerate(responses) if response.row >= 0]
    if not chosen:
        return list(responses)
    prompt_ids = [tuple(row[mask].tolist()) for row, mask in zip(batch.input_ids, batch.mask.bool(), strict=True)]
    known = RewardBatch(
        prompt_ids=tuple(prompt_ids[place] for place in chosen),
        response_ids=tuple(responses[place].token_ids for place in chosen),
        is_stopped=tuple(responses[place].is_stopped for place in chosen),
        references=tuple(batch.references[place] for place in chosen),
        tokenizer=tokenizer,
    )
    texts = tokenizer.batch_decode([list(ids) for ids in known.response_ids], skip_special_tokens=True)
    prompts = [batch.prompts[place] for place in chosen]
    rows = combined_scores(stage.rewards, prompts, texts, known).tolist()
    scores: dict[int, tuple[float, ...]] = {place: tuple(row) for place, row in zip(chosen, rows, strict=True)}
    return [response._replace(scores=scores.get(place, ())) for place, response in enumerate(responses)]


def samples_of(
    stage: RolloutStage, batch: PromptBatch, responses: Sequence[Response], kl: Sequence[float | None]
) -> list[Sample]:
    """What is written of each response; fillers are left out.

    Args:
        stage: Whose tokenizer and rewards they are.
        batch: The prompts.
        responses: Their responses, in the order of the batch.
        kl: Of each response.
    """
    texts = stage.data.tokenizer.batch_decode([list(each.token_ids) for each in responses], skip_special_tokens=True)
    weights = stage.weights.tolist()
    return [
        Sample(
            row=response.row,
            prompt=batch.prompts[place],
            response=texts[place],
            reference=batch.references[place],
            reward=sum(weight * score for weight, score in zip(weights, response.scores, strict=True)),
            kl=kl[place],
            length=len(response.token_ids),
            is_stopped=response.is_stopped,
        )
        for place, response in enumerate(responses)
        if response.row >= 0
    ]


def by_name(rewards: Sequence[Reward], scores: Tensor) -> dict[str, float]:
    """A number of each reward under `rewards/` and its name; nothing where there is only one reward.

    Args:
        rewards: K of them.
        scores: (K,)
    """
    names = [reward.name for reward in rewards]
    known = [f"rewards/{name}-{i}" if names.count(name) > 1 else f"rewards/{name}" for i, name in enumerate(names)]
    return dict(zip(known, scores.tolist(), strict=True)) if len(known) > 1 else {}


def sums_of(samples: Sequence[Sample], rewards: Sequence[Reward], responses: Sequence[Response]) -> dict[str, float]:
    """What is measured of samples, summed over them.

    Args:
        samples: S of them.
        rewards: What scored them.
        responses: The responses that they were made of.
    """
    scores = torch.tensor([response.scores for response in responses], dtype=torch.float64)
    return {
        "reward": sum(sample.reward for sample in samples),
        **(by_name(rewards, scores.sum(0)) if samples else {}),
        "kl": sum(sample.kl or 0.0 for sample in samples),
        "response_length": float(sum(sample.length for sample in samples)),
        "stop_ratio": float(sum(sample.is_stopped for sample in samples)),
    }
