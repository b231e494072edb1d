"""Where reading goes on: a place between two rows of a file or of any other source."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Row = dict[str, Any]


class Place(NamedTuple):
    """A place between two rows of a file."""

    row: int = 0  # rows before it
    at: Any = None  # what leads there without reading them, in plain Python: (byte, line) or (group, rows of it)


START = Place()
Rows = Iterator[tuple[Row, Place]]
"""Rows, each with the place behind it."""
