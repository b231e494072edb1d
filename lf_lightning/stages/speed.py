"""How many tokens a run has trained on, and how quickly since it last said so."""

from __future__ import annotations

import time


class TokenCount:
    """Tokens over all ranks, padding not counted."""

    def __init__(self) -> None:
        self.total = 0
        """Tokens trained on so far; a resume goes on counting."""
        self.restart()

    def restart(self) -> None:
        """Measure the speed from now on."""
        self._since, self._time = 0, time.perf_counter()

    def add(self, num_tokens: int) -> None:
        """Count the tokens of a step."""
        self.total += num_tokens
        self._since += num_tokens

    def per_second(self) -> float:
        """Tokens per second since this was last asked."""
        speed = self._since / max(time.perf_counter() - self._time, 1e-9)
        self.restart()
        return speed
