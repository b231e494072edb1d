"""The only place that touches names which Lightning or jsonargparse keep to themselves: one function each, a test each."""

from __future__ import annotations

import os


def global_seed() -> int:
    """The value of the last `seed_everything`, 0 before any (lightning 2.6: kept in PL_GLOBAL_SEED and nowhere else)."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))
