"""Draws that depend on their own row alone, so that neither neighbours nor ranks change a response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lf_lightning.types import TrainingStopped


class RowSampler:
    """A logits processor after which the argmax is a draw from softmax(logits / temperature), cut by top-k and top-p.

    The Gumbel-max trick: with independent e_v ~ Exp(1), argmax over v of log p_v - log e_v is distributed as p. Each
    row draws its e from a generator of its own.

    Args:
        temperature: Divides the logits, > 0.
        top_p: Keep the likeliest words that together have this probability, in (0, 1].
        top_k: Keep this many likeliest words; 0 keeps all.
        seeds: Of each row's generator, >= 0; B of them.
    """

    def __init__(self, temperature: float, top_p: float, top_k: int, seeds: Sequence[int]) -> None:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        self._warpers += [TopKLogitsWarper(top_k)] if top_k > 0 else []
        self._warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        self._seeds = list(seeds)
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probs less log e, (B, V) float32; impossible words stay at -inf.

        Args:
            input_ids: Tokens so far, (B, T).
            scores: Logits, (B, V).

        Raises:
            TrainingStopped: A logit is NaN, or a row holds no finite one.
        """
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        scores = scores.float()
        if not scores.amax(dim=-1).isfinite().all():
            raise TrainingStopped(
                "generation: the policy's logits must be finite, got NaN or infinity while a response was drawn. Lower "
                "the learning rate, and continue from an earlier checkpoint."
            )
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


class RowLimits:
    """A stopping criterion that ends each row at a limit of its own.

    Args:
        length: Tokens of the padded prompts.
        limits: Most new tokens of each row; B of them.
    """

    def __init__(self, length: int, limits: Sequence[int]) -> None:
        self._ends = torch.tensor(limits) + length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row is at its limit; (B,) bool."""
        self._ends = self._ends.to(input_ids.device)
        return input_ids.shape[1] >= self._ends
