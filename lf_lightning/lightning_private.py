"""The only place that touches what Lightning and jsonargparse keep to themselves: one function each, a test each."""

from __future__ import annotations

import os


def global_seed() -> int:
    """The value of the last `seed_everything`, 0 before any; lightning 2.6 keeps it in PL_GLOBAL_SEED only."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
