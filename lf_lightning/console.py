"""What a run tells the person in front of it: single lines on stderr, from one process only."""

from __future__ import annotations

import sys

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(line: str) -> None:
    """Print a line on stderr, on the first rank."""
    print(line, file=sys.stderr, flush=True)
