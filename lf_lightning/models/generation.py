"""Answers to prompts: how tokens are chosen, and the engine that chooses them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lf_lightning.models.backbone import Backbone
from lf_lightning.models.sampling import RowLimits, RowSampler
from lf_lightning.models.sharding import whole
from lf_lightning.types import InputError, PromptBatch


@dataclass(frozen=True)
class GenerationSpec:
    """How answers are generated.

    Args:
        max_new_tokens: Most tokens of an answer, > 0.
        do_sample: Sample from the distribution; otherwise the likeliest token is taken each time (greedy).
        temperature: Divides the logits before sampling, > 0.
        top_p: Sample among the likeliest tokens that together have this probability, in (0, 1].
        top_k: Sample among this many likeliest tokens; 0 means all.
        num_beams: Beams of beam search; 1 means none.
        repetition_penalty: Divides the logits of tokens already present, >= 1; 1 changes nothing.
        batch_size: Prompts that are answered together, on each device.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        for name, holds, want in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "positive; use do_sample: false for the likeliest token"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("repetition_penalty", self.repetition_penalty >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
        ):
            if not holds:
                where = f"model.init_args.generation.{name}"
                raise InputError(f"{where}: must be {want}, got {vars(self)[name]}. Correct it.")


@dataclass(frozen=True)
class SamplingSpec(GenerationSpec):
    """How the responses of a rollout are drawn, and how `validate` and `predict` answer.

    The defaults are LlamaFactory's.

    Args:
        max_new_tokens: Most tokens of a response, > 0.
        do_sample: Sample the responses of a rollout; otherwise the likeliest token is taken each time (greedy).
        temperature: Divides the logits before sampling, > 0. The log-probs that are trained are at this temperature.
        top_p: Sample among the likeliest tokens that together have this probability, in (0, 1].
        top_k: Sample among this many likeliest tokens; 0 means all.
        num_beams: Must be 1: log-probs are those of a sampled token.
        repetition_penalty: Must be 1, for the same reason.
        batch_size: Prompts that are answered together, on each device.
        eval_do_sample: Sample in validation and `predict` too; otherwise they are greedy.
    """

    max_new_tokens: int = 1024
    do_sample: bool = True
    temperature: float = 0.95
    top_p: float = 0.7
    top_k: int = 50
    eval_do_sample: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range, and ways to choose a token that its log-prob does not describe.

        Raises:
            InputError: As said.
        """
        super().__post_init__()
        for name in ("num_beams", "repetition_penalty"):
            if vars(self)[name] != 1:
                raise InputError(
                    f"model.init_args.generation.{name}: must be 1 for rollouts, whose log-probs are those of a "
                    f"sampled token, got {vars(self)[name]}. Remove it."
                )

    @property
    def train_temperature(self) -> float:
        """Temperature of the distribution whose log-probs are trained: 1 where rollouts are greedy."""
        return self.temperature if self.do_sample else 1.0

    @property
    def is_exact(self) -> bool:
        """Whether rollouts are drawn from the very distribution whose log-probs are trained."""
        return self.do_sample and self.top_p == 1 and self.top_k == 0


class GenerationEngine(ABC):
    """What answers prompts. Another engine is another subclass; no stage knows which one runs."""

    @contextmanager
    def ready(self, backbone: Backbone) -> Iterator[None]:
        """Surrounds all `generate` calls of one rollout or set: the place to gather or send weights, once.

        Args:
            backbone: The policy as it is now. Every rank enters.
        """
        yield

    @abstractmethod
    def generate(
        self,
        backbone: Backbone,
        batch: PromptBatch,
        spec: GenerationSpec,
        *,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt up to a stop token or a limit.

        Args:
            backbone: The model; its mode is put back afterwards.
            batch: Prompts, padded on the left; (B, T). `batch.limits` bounds each answer, where it is given.
            spec: How to choose tokens.
            stop_token_ids: Tokens that end an answer.
            seeds: With sampling: what the answer to each prompt is drawn from, >= 0, so that neither its neighbours nor
                the batch change it; B of them. None draws from the global random state.

        Returns:
            New tokens of each prompt, at least one, the stop token included where one ended it.
        """


@dataclass(frozen=True)
class TransformersEngine(GenerationEngine):
    """Transformers' `generate` with its cache, on the policy itself."""

    @contextmanager
    def ready(self, backbone: Backbone) -> Iterator[None]:
        """As `GenerationEngine.ready`: weights that are cut over ranks are gathered once."""
        with whole(backbone):
            yield

    @torch.no_grad()
    def generate(
        self,
        backbone: Backbone,
        batch: PromptBatch,
        spec: GenerationSpec,
        *,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """As `GenerationEngine.generate`."""
        from transformers import GenerationConfig

        limits = [min(spec.max_new_tokens, limit) for limit in batch.limits] or [spec.max_new_tokens] * len(batch.rows)
        config = GenerationConfig(
            max_new_tokens=max(limits),
            do_sample=spec.do_sample and seeds is None,
            temperature=spec.temperature if spec.do_sample and seeds is None else None,
            top_p=spec.top_p if spec.do_sample and seeds is None else None,
            top_k=spec.top_k if spec.do_sample and seeds is None else None,
            num_beams=spec.num_beams,
            repetition_penalty=spec.repetition_penalty,
            eos_token_id=list(stop_token_ids),
            pad_token_id=stop_token_ids[0],
            use_cache=True,
        )
        drawing: dict[str, Any] = {}
        if spec.do_sample and seeds is not None:
            drawing["logits_processor"] = [RowSampler(spec.temperature, spec.top_p, spec.top_k, seeds)]
        if len(set(limits)) > 1 and spec.num_beams == 1:
            drawing["stopping_criteria"] = [RowLimits(batch.input_ids.shape[1], limits)]
        with _generating(backbone) as causal_lm:
            tokens: Tensor = causal_lm.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.mask,
                generation_config=config,
                synced_gpus=False,  # weights are whole here; else ranks would wait for each other at every token
                **drawing,
            )
        answers = tokens[:, batch.input_ids.shape[1] :].tolist()
        stops = set(stop_token_ids)
        return [_until_stop(answer[:limit], stops) for answer, limit in zip(answers, limits, strict=True)]


def _until_stop(token_ids: list[int], stops: set[int]) -> list[int]:
    """The tokens up to the first one that stops, which is kept."""
    end = next((place for place, token in enumerate(token_ids) if token in stops), len(token_ids))
    return token_ids[: end + 1]


@contextmanager
def _generating(backbone: Backbone) -> Iterator[Any]:
    """The model without dropout, with its ordinary attention, and without the options that lie in its folder."""
    from transformers import GenerationConfig

    causal_lm: Any = backbone.causal_lm  # transformers leaves generate untyped
    was_training, stored = backbone.training, causal_lm.generation_config
    backbone.eval()
    causal_lm.generation_config = GenerationConfig()  # else its own penalties and bans would join the spec's
    try:
        with backbone.padded_attention():
            yield causal_lm
    finally:
        causal_lm.generation_config = stored
        backbone.train(was_training)
