"""Small runs of ppo and grpo from the command line, and an engine whose responses are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lf_lightning.models import Backbone, GenerationEngine, GenerationSpec
from lf_lightning.types import PromptBatch
from tests.cli.runs import INIT, config, lightning

REWARDS = Path(__file__).with_name("contract_rewards.py")
SPREAD = {"class_path": "RewardFunction", "init_args": {"function": f"{REWARDS}:spread"}}
"""Differs from response to response."""
LENGTH = {
    "class_path": "RewardFunction",
    "init_args": {"function": f"{REWARDS}:length", "arguments": {"per": 5.0}, "weight": -0.5},
}
EXACT = {"max_new_tokens": 5, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""Responses from the very distribution that is trained."""
CONSTANTS = {"PPO": {"num_epochs": 2}, "GRPO": {"group_size": 3, "num_epochs": 2}}


def rolled(stage: str, run: Path | str = "run", lora: Path | str | None = None, **changes: Any) -> dict[str, Any]:
    """A run of four steps on rollouts of six responses, which take four steps each; the 12 rows of `config`."""
    generation, constants = changes.pop("generation", {}), changes.pop("constants", {})
    base = {
        "model__class_path": stage,
        f"{INIT}.rewards": [SPREAD],
        f"{INIT}.generation": {**EXACT, **generation},
        f"{INIT}.constants": {**CONSTANTS[stage], **constants},
        "data__rollout_size": 6,
    }
    return config(run, lora, **{**base, **changes})


def fit(here: Path, stage: str, run: str = "run", **changes: Any) -> Path:
    """Run `fit` to its end; the run folder."""
    assert lightning("fit", here, rolled(stage, run, **changes)) == 0
    return here / run


@dataclass(frozen=True)
class FixedEngine(GenerationEngine):
    """Gives the same responses to any batch, one after the other.

    Args:
        responses: Token ids of each.
    """

    responses: list[list[int]]

    def generate(
        self,
        backbone: Backbone,
        batch: PromptBatch,
        spec: GenerationSpec,
        *,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The response of each row's number; `limits` cut it."""
        limits = batch.limits or (spec.max_new_tokens,) * len(batch.rows)
        rows = zip(batch.rows, limits, strict=True)
        return [self.responses[max(row, 0) % len(self.responses)][:limit] for row, limit in rows]
