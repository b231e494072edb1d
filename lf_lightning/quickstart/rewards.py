"""Rules that score the quickstarts' responses, and an example of how to write one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lf_lightning.models.rewards import RewardBatch


def right_voice(prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch) -> list[float]:
    """How much of each response is in the voice that its prompt asks for: capitals for loudly, else small letters.

    Args:
        prompts: "Say it loudly" or "Say it softly", and a word; B of them.
        responses: What was answered; B of them.
        batch: Tokens and references, which this rule does not need.

    Returns:
        Share of the characters, in [0, 1]; 0 for an empty response. B of them.
    """
    pairs = zip(prompts, responses, strict=True)
    return [share(response, str.isupper if "loudly" in prompt else str.islower) for prompt, response in pairs]


def holds(prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch, *, text: str) -> list[float]:
    """Whether each response holds a text: 1 or 0; B of them.

    Args:
        prompts: Not needed.
        responses: What was answered; B of them.
        batch: Not needed.
        text: What to look for.
    """
    return [float(text in response) for response in responses]


def holds_reference(prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch) -> list[float]:
    """Whether each response holds the answer that the data gives: 1 or 0; B of them. Without an answer it is 0.

    Args:
        prompts: Not needed.
        responses: What was answered; B of them.
        batch: References.
    """
    pairs = zip(batch.references, responses, strict=True)
    return [float(bool(reference) and reference in response) for reference, response in pairs]


def share(text: str, rule: Callable[[str], bool]) -> float:
    """Share of the ASCII characters of a text that keep a rule, in [0, 1]; others never do, and 0 where it is empty."""
    return sum(letter.isascii() and rule(letter) for letter in text) / max(len(text), 1)
