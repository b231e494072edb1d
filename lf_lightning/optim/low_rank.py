"""Gradients of matrices in a space of low rank, as GaLore and APOLLO project them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lf_lightning.optim.parameters import Trained, decay_groups

Side = Literal["std", "reverse_std", "left", "right", "full"]
"""Which side of a matrix (rows x columns) is projected: `std` the shorter one, `reverse_std` the longer one, `left` its
rows, `right` its columns, `full` both."""


def low_rank_rules(rank: int, interval: int, scale: float, target: str | list[str]) -> dict[str, tuple[bool, str]]:
    """The ranges of what optimizers in a space of low rank share, as `check_options` takes them."""
    return {
        "rank": (rank > 0, "positive"),
        "interval": (interval > 0, "positive"),
        "scale": (scale > 0, "positive"),
        "target": (bool(target), "all or names of linear layers"),
    }


def sides(shape: torch.Size, side: Side) -> tuple[bool, bool]:
    """Whether rows and whether columns are projected."""
    is_tall = shape[0] >= shape[1]
    by_columns = {"std": is_tall, "reverse_std": not is_tall, "left": False, "right": True}
    return (True, True) if side == "full" else (not by_columns[side], by_columns[side])


def low_rank_shape(shape: torch.Size, side: Side, rank: int) -> tuple[int, int]:
    """Rows and columns of a projected gradient."""
    by_rows, by_columns = sides(shape, side)
    rank = min(rank, *shape)
    return rank if by_rows else shape[0], rank if by_columns else shape[1]


def singular_bases(gradient: Tensor, side: Side, rank: int) -> dict[str, Tensor]:
    """The leading singular vectors of a gradient: `left` (rows x rank), `right` (rank x columns), where projected."""
    by_rows, by_columns = sides(gradient.shape, side)
    vectors, _, transposed = torch.linalg.svd(gradient.float(), full_matrices=False)
    found = {}
    if by_rows:
        found["left"] = vectors[:, :rank].to(gradient.dtype).contiguous()
    if by_columns:
        found["right"] = transposed[:rank].to(gradient.dtype).contiguous()
    return found


def random_bases(gradient: Tensor, side: Side, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The same with entries drawn from a normal distribution of variance 1 / rank."""
    rank = min(rank, *gradient.shape)
    options: dict[str, Any] = {"generator": generator, "device": gradient.device, "dtype": torch.float32}
    by_rows, by_columns = sides(gradient.shape, side)
    found = {}
    if by_rows:
        found["left"] = (torch.randn(gradient.shape[0], rank, **options) / rank**0.5).to(gradient.dtype)
    if by_columns:
        found["right"] = (torch.randn(rank, gradient.shape[1], **options) / rank**0.5).to(gradient.dtype)
    return found


def projected(gradient: Tensor, bases: dict[str, Tensor]) -> Tensor:
    """A gradient in the space of its bases."""
    if "left" in bases:
        gradient = bases["left"].T @ gradient
    return gradient @ bases["right"].T if "right" in bases else gradient


def projected_back(low: Tensor, bases: dict[str, Tensor]) -> Tensor:
    """What a matrix in the space of the bases is in the space of the gradient."""
    if "left" in bases:
        low = bases["left"] @ low
    return low @ bases["right"] if "right" in bases else low


def bases_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The bases that an optimizer keeps beside its moments."""
    return {name: state[name] for name in ("left", "right") if name in state}


def low_rank_groups(trained: Sequence[Trained], low: set[int], weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the parameters whose id is in `low`, marked as projected, and of the rest, decayed and not."""
    projects = [each for each in trained if id(each.parameter) in low]
    rest = [each for each in trained if id(each.parameter) not in low]
    return [*decay_groups(projects, weight_decay, is_projected=True), *decay_groups(rest, weight_decay)]
