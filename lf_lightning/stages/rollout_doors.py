"""What a stage with rollouts refuses before anything is loaded, and what it warns of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lf_lightning.models import Adapter, LoRA, ReferenceSpec, SamplingSpec, Tuning
from lf_lightning.models.rewards import Reward
from lf_lightning.types import InputError

WHERE = "model.init_args"


def check_rollouts(
    rewards: Sequence[Reward], reference: ReferenceSpec | None, generation: SamplingSpec, tuning: Tuning
) -> None:
    """Refuse options that contradict each other.

    Raises:
        InputError: As said.
    """
    if not rewards:
        raise InputError(
            f"{WHERE}.rewards: must name at least one reward, got none. "
            "Add {class_path: RewardModel, init_args: {path: FOLDER}}, or RewardFunction, RewardAdapter, RewardService."
        )
    wrong: list[Any] = [reward for reward in rewards if not isinstance(reward, Reward)]
    if wrong:
        raise InputError(f"{WHERE}.rewards: must hold rewards, got {wrong[0]!r}. Wrap a function in RewardFunction.")
    if not isinstance(generation, SamplingSpec):
        raise InputError(
            f"{WHERE}.generation: must be a SamplingSpec for rollouts, got {type(generation).__name__}. "
            "Pass SamplingSpec(...)."
        )
    if reference is not None and reference.precompute:
        raise InputError(
            f"{WHERE}.reference.precompute: must be false for rollouts, whose responses do not exist before training, "
            "got true. Remove it."
        )
    if isinstance(tuning, Adapter) and tuning.dropout:
        raise InputError(
            f"{WHERE}.tuning.init_args.dropout: must be 0 for rollouts, whose log-probs are computed without dropout, "
            f"got {tuning.dropout}. Remove it."
        )
    if isinstance(tuning, LoRA) and tuning.shifts_base and any(reward.needs_adapter for reward in rewards):
        raise InputError(
            f"{WHERE}.rewards: RewardAdapter runs on the original weights, which a policy tuned with init: "
            f"{tuning.init} has not, got both. Use RewardModel, or init: zero."
        )
    if not isinstance(tuning, LoRA) and any(reward.needs_adapter for reward in rewards):
        raise InputError(
            f"{WHERE}.rewards: RewardAdapter needs a policy tuned with LoRA, on whose base it runs, got "
            f"{type(tuning).__name__}. Set tuning: {{class_path: LoRA}}, or use RewardModel."
        )


def sampling_line(generation: SamplingSpec) -> str:
    """What to say where responses are not drawn from the distribution whose log-probs are trained; "" elsewhere."""
    where = f"{WHERE}.generation"
    if not generation.do_sample:
        return f"{where}.do_sample: false draws the likeliest token each time: nothing new is ever tried"
    if generation.is_exact:
        return ""
    cuts = [
        f"{name} {vars(generation)[name]}"
        for name, off in (("top_p", 1), ("top_k", 0))
        if vars(generation)[name] != off
    ]
    return (
        f"{where}: {' and '.join(cuts)} cut off unlikely tokens when responses are drawn, but the log-probs that are "
        f"trained are those of all tokens at temperature {generation.temperature:g}, so ratio and KL are biased. "
        "Set top_p: 1.0 and top_k: 0 for the exact distribution"
    )
