"""One rollout and what was made of it: the responses of all ranks, and a few numbers for each of their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lf_lightning.losses.log_probs import token_statistics
from lf_lightning.types import Kernel, OutputLayer, Response


class TokenValues(NamedTuple):
    """What a model says of tokens; all of one shape."""

    log_probs: Tensor  # of the tokens that were drawn, in nats, at the temperature of sampling
    values: Tensor | None = None  # value of the state before each token; None where there is no critic
    reference: Tensor | None = None  # log-probs under the reference; None where there is none
    entropy: Tensor | None = None  # in nats; None where it was not asked for


class Experience(NamedTuple):
    """Constants of the updates, for all N tokens of a rollout's responses, end to end in the order of their rows."""

    log_probs: Tensor  # (N,) of the policy that drew them
    advantages: Tensor  # (N,)
    reference: Tensor | None = None  # (N,) log-probs under the reference
    values: Tensor | None = None  # (N,) of the critic before the updates
    returns: Tensor | None = None  # (N,) what the critic learns

    def to(self, place: torch.device | torch.dtype) -> Experience:
        """The same on a device or of a type."""
        moved = {name: part.to(place) for name, part in self._asdict().items() if part is not None}
        return Experience(**moved)


@dataclass
class Rollout:
    """The responses of all ranks in the order of their rows: the same on every rank.

    Args:
        number: Of the rollout in its run, from 0.
        responses: R of them.
        prompt_length: Mean tokens of a prompt.
        experience: None until it is made.
        logged: What was found out about the rollout as a whole.
        is_over: No further step on it changes anything.
    """

    number: int
    responses: tuple[Response, ...]
    prompt_length: float
    experience: Experience | None = None
    logged: dict[str, float] = field(default_factory=dict)
    is_over: bool = False

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response; (R,) int64."""
        return torch.tensor([len(response.token_ids) for response in self.responses])

    @property
    def is_stopped(self) -> Tensor:
        """Whether a stop token ended each response; (R,) bool."""
        return torch.tensor([response.is_stopped for response in self.responses])

    @property
    def scores(self) -> Tensor:
        """What each reward gave each response; (R, rewards) float64."""
        return torch.tensor([response.scores for response in self.responses], dtype=torch.float64)

    def to(self, device: torch.device) -> Rollout:
        """Move the experience."""
        if self.experience is not None:
            self.experience = self.experience.to(device)
        return self

    def state(self) -> dict[str, Any]:
        """Tensors and plain Python, from which `from_state` makes the rollout again."""
        tokens = [torch.tensor(response.token_ids) for response in self.responses]
        experience = self.experience and {
            name: part.cpu() for name, part in self.experience._asdict().items() if part is not None
        }
        return {
            "number": self.number,
            "token_ids": torch.cat(tokens),
            "lengths": self.lengths,
            "is_stopped": self.is_stopped,
            "scores": self.scores,
            "prompt_length": self.prompt_length,
            "experience": experience,
            "logged": dict(self.logged),
            "is_over": self.is_over,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Rollout:
        """The rollout that `state` wrote."""
        tokens = state["token_ids"].split(state["lengths"].tolist())
        rows = zip(tokens, state["is_stopped"].tolist(), state["scores"].tolist(), strict=True)
        responses = tuple(
            Response(row, tuple(token_ids.tolist()), is_stopped, tuple(scores))
            for row, (token_ids, is_stopped, scores) in enumerate(rows)
        )
        experience = state["experience"] and Experience(**state["experience"])
        same = {name: state[name] for name in ("number", "prompt_length", "logged", "is_over")}
        return cls(responses=responses, experience=experience, **same)


def statistics_of(rollout: Rollout, found: TokenValues, weights: Tensor) -> dict[str, float]:
    """What is logged of any rollout.

    Args:
        rollout: The responses of all ranks; R of them.
        found: What was found of all N tokens; (N,) float64 each.
        weights: Part of each reward in the sum.
    """
    lengths, scores = rollout.lengths.double(), rollout.scores @ weights
    statistics = {
        "reward": float(scores.mean()),
        "reward_std": float(scores.std(unbiased=False)),
        "response_length": float(lengths.mean()),
        "response_length_std": float(lengths.std(unbiased=False)),
        "prompt_length": rollout.prompt_length,
        "stop_ratio": float(rollout.is_stopped.double().mean()),
        "objective/entropy": float(-response_sums(found.log_probs, rollout.lengths).mean()),
    }
    if found.reference is not None:
        statistics["objective/kl"] = float(response_sums(found.log_probs - found.reference, rollout.lengths).mean())
    return statistics


def response_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the tokens of each response; (R,) from (N,) and (R,)."""
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    return values.new_zeros(len(lengths)).index_add(0, rows, values)


def values_kernel(
    head: nn.Module | None, *, temperature: float, with_entropy: bool = False, entropy_grad: bool = False
) -> Kernel:
    """A kernel for `Backbone.forward` that gives TokenValues of every position; (B, T) each.

    Args:
        head: The critic, from hidden states (B, T, H) to values (B, T).
        temperature: Of the distribution that tokens are drawn from, > 0.
        with_entropy: Compute the entropy.
        entropy_grad: With a gradient.
    """

    def kernel(hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> TokenValues:
        layer = output_layer.at_temperature(temperature)
        found = token_statistics(hidden, layer, targets, with_entropy=with_entropy, entropy_grad=entropy_grad)
        return TokenValues(found.log_probs, None if head is None else head(hidden), entropy=found.entropy)

    return kernel
