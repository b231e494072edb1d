"""One dataset, wherever its rows lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Source:
    """One dataset: a file with its format, as an entry of dataset_info.json says it or as written inline.

    Args:
        name: What messages and errors call it.
        path: File or folder with the rows; None where `records` gives them.
        formatting: `alpaca` (instruction, input, output), `sharegpt` (a list of turns), `openai` (role and content),
            or `text` (one text a row; what pt trains on).
        columns: Our name of a column -> the file's name.
        tags: sharegpt and openai: our name of a role or key -> the file's name.
        ranking: The rows hold a chosen and a rejected answer.
        records: The rows themselves.
    """

    name: str
    path: Path | None
    formatting: Literal["alpaca", "sharegpt", "openai", "text"] = "alpaca"
    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    ranking: bool = False
    records: tuple[dict[str, Any], ...] = ()
