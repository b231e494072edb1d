"""Rewards: what scores a response. One small interface, and a spec for each kind of source."""

from __future__ import annotations

import inspect
import math
import traceback
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lf_lightning.types import InputError, TrainingStopped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lf_lightning.models.backbone import Backbone


WHERE = "model.init_args.rewards"


class RewardBatch(NamedTuple):
    """What a reward may look at besides the texts of B prompts and responses."""

    prompt_ids: tuple[tuple[int, ...], ...]
    response_ids: tuple[tuple[int, ...], ...]  # a stop token included where one ended the response
    is_stopped: tuple[bool, ...]  # whether a stop token ended the response, and not a limit
    references: tuple[str, ...]  # the answer that the data gives, "" where it gives none
    tokenizer: PreTrainedTokenizerBase  # the policy's


class RewardSetting(NamedTuple):
    """What a reward is prepared with, before training."""

    policy: Backbone
    tokenizer: PreTrainedTokenizerBase  # the policy's
    device: torch.device


class Reward(ABC):
    """What scores responses: a dataclass of options, or a class of your own.

    `weight` is its part in the sum of several. Arguments that are kept as attributes of the same names are written to
    the run's configuration.
    """

    weight: float = 1.0
    needs_adapter = False
    """Whether the policy must be tuned with LoRA."""

    def prepare(self, setting: RewardSetting) -> None:
        """Load what scoring needs. A hook, called once on each rank, before the model is sharded or trained.

        Raises:
            InputError: What the options name cannot be loaded, or does not fit the policy.
        """
        return

    @abstractmethod
    def score(self, prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch) -> Any:
        """How good each response is, more being better.

        Args:
            prompts: Prompts as rendered, special tokens included; B of them.
            responses: Responses as text, without special tokens; B of them.
            batch: Tokens, references and the rest.

        Returns:
            Finite scores: a tensor, an array or a list, (B,).
        """

    @property
    def name(self) -> str:
        """What logs and messages call it."""
        return type(self).__name__

    def option_values(self) -> dict[str, Any]:
        """The options, from which the same reward can be made again."""
        return options_of(self)


def options_of(made: object) -> dict[str, Any]:
    """What an object was made with: its attributes that are called as the arguments of its class."""
    names = inspect.signature(type(made)).parameters
    return {name: value for name, value in vars(made).items() if name in names}


def check_weight(reward: Reward) -> None:
    """Refuse a weight that is no number.

    Raises:
        InputError: It is NaN or infinite.
    """
    if not math.isfinite(reward.weight):
        kind = type(reward).__name__
        raise InputError(f"{WHERE}: {kind}.weight: must be a finite number, got {reward.weight}. Use 1.0.")


@torch.no_grad()
def combined_scores(
    rewards: Sequence[Reward], prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch
) -> Tensor:
    """What each reward gives each response, before weights.

    Args:
        rewards: K of them.
        prompts: As `Reward.score` takes them; B of them.
        responses: The same.
        batch: The same.

    Returns:
        Scores, (B, K) float64, on the CPU.

    Raises:
        TrainingStopped: A reward raised an error, or gave another number of scores, or one that is not finite.
    """
    columns = [_checked(reward, prompts, responses, batch) for reward in rewards]
    return torch.stack(columns, dim=1)


def _checked(reward: Reward, prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch) -> Tensor:
    where, num_responses = f"{WHERE}: {reward.name}", len(responses)
    with TheirCode(where, advice="Correct it, and continue with --ckpt_path last.", becomes=TrainingStopped):
        found = reward.score(prompts, responses, batch)
        scores = torch.as_tensor(found, dtype=torch.float64, device="cpu").detach()
    if scores.shape != (num_responses,):
        raise TrainingStopped(
            f"{where}: must give one score to each response, ({num_responses},), got {tuple(scores.shape)}. Correct "
            "it, and continue with --ckpt_path last."
        )
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).nonzero()[0])
        raise TrainingStopped(
            f"{where}: must give finite scores, got {scores[bad].item()} for response {bad + 1} of {num_responses}, "
            f"{responses[bad][:60]!r}. Correct it, and continue with --ckpt_path last."
        )
    return scores


class TheirCode:
    """Around code that is not ours: whatever it raises becomes one line.

    Args:
        where: What runs.
        advice: What to do.
        becomes: The error that says it.
    """

    def __init__(self, where: str, *, advice: str, becomes: type[InputError] | type[TrainingStopped]) -> None:
        self._where, self._advice, self._becomes = where, advice, becomes

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Say in one line what was raised and where; interrupts and our own errors pass."""
        if not isinstance(error, Exception) or isinstance(error, (InputError, TrainingStopped)):
            return
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:200]
        raised = f"{type(error).__name__}: {said} ({last.filename}:{last.lineno})"
        raise self._becomes(f"{self._where}: must not fail, got {raised}. {self._advice}") from error
