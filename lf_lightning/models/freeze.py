"""Freeze: a part of the model's own weights trains, the rest stays."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lf_lightning.models.adapters import WHERE, Tuning, decoder_blocks
from lf_lightning.models.casts import cast_around
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Freeze(Tuning):
    """Some blocks train; embeddings, the other blocks, the last norm and the output layer stay.

    Args:
        num_layers: Blocks that train: the last ones, or the first ones where it is negative; not 0.
        spread: Let the last block of each of `num_layers` equal parts train, as in LLaMA-Pro (Wu et al. 2024,
            arXiv:2401.02415), which adds such blocks first; their number must divide that of all blocks.
        modules: What trains in these blocks: `all`, or modules by their whole names there, such as [self_attn] or
            [mlp.down_proj].
        extra_modules: Modules outside of all blocks that train too, by whole names, such as [embed_tokens, norm].
    """

    num_layers: int = 2
    spread: bool = False
    modules: str | Sequence[str] = "all"
    extra_modules: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        if self.num_layers == 0:
            raise InputError(f"{WHERE}.num_layers: must not be 0, got it. Use 2 for the last two blocks.")
        if self.spread and self.num_layers < 0:
            raise InputError(
                f"{WHERE}.num_layers: must be positive with spread: true, got {self.num_layers}. Raise it."
            )
        if not self.modules:
            raise InputError(f"{WHERE}.modules: must name modules of a block, got none. Use all.")

    def apply(self, model: PreTrainedModel, *, vocabulary: Sequence[str] = ()) -> PreTrainedModel | PeftModel:
        """Let the parameters of the chosen modules train."""
        blocks = decoder_blocks(model)
        chosen = self._blocks(len(blocks))
        model.requires_grad_(False)
        runs = _runs(chosen) if self.modules == "all" else []
        parts = [] if self.modules == "all" else _parts_of_blocks([blocks[index] for index in chosen], self.modules)
        parts += _parts_outside(model, blocks, self.extra_modules)
        parts += [model.get_submodule(name) for name in vocabulary]
        for module in (*(blocks[index] for index in chosen if runs), *parts):
            module.requires_grad_(True)
        half = next(model.parameters()).dtype
        if half in (torch.bfloat16, torch.float16):  # what trains will be float32: cast where it meets the others
            for first, last in [(blocks[start], blocks[end]) for start, end in runs] + [(part, part) for part in parts]:
                cast_around(first, last, half)
        return model

    def _blocks(self, num_blocks: int) -> list[int]:
        """Indices of the blocks that train."""
        count = abs(self.num_layers)
        if count > num_blocks:
            raise InputError(
                f"{WHERE}.num_layers: must be 1 to {num_blocks} for this model, or its negative, got "
                f"{self.num_layers}. Choose a number in that range."
            )
        if not self.spread:
            return list(range(count)) if self.num_layers < 0 else list(range(num_blocks - count, num_blocks))
        if num_blocks % count:
            raise InputError(
                f"{WHERE}.num_layers: must divide the {num_blocks} blocks of this model with spread: true, got "
                f"{count}. Choose a divisor."
            )
        stride = num_blocks // count
        return list(range(stride - 1, num_blocks, stride))


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of indices without a gap."""
    starts = [index for index in indices if index - 1 not in indices]
    ends = [index for index in indices if index + 1 not in indices]
    return list(zip(starts, ends, strict=True))


def _parts_of_blocks(blocks: list[nn.Module], wanted: str | Sequence[str]) -> list[nn.Module]:
    """The modules of some blocks that are named; each name must mean one in every block that has it, and in one."""
    found: list[nn.Module] = []
    for want in [wanted] if isinstance(wanted, str) else wanted:
        matched = [part for block in blocks for part in _named(dict(block.named_modules()), want)]
        if not matched:
            _refuse("modules", want, [name for block in blocks for name, part in block.named_modules() if name])
        found += matched
    return _outermost(found)


def _parts_outside(model: nn.Module, blocks: nn.ModuleList, wanted: Sequence[str]) -> list[nn.Module]:
    """The modules that are named and neither hold blocks nor lie in one."""
    inside = {id(module) for module in blocks.modules()}
    outside = {
        name: module
        for name, module in model.named_modules()
        if id(module) not in inside and not any(id(part) in inside for part in module.modules())
    }
    outside = {name: module for name, module in outside.items() if next(module.parameters(), None) is not None}
    found: list[nn.Module] = []
    for want in wanted:
        matched = _named(outside, want)
        if not matched:
            _refuse("extra_modules", want, list(outside))
        found += matched
    return _outermost(found)


def _named(modules: dict[str, nn.Module], want: str) -> list[nn.Module]:
    return [
        module
        for name, module in modules.items()
        if (name == want or name.endswith(f".{want}")) and next(module.parameters(), None) is not None
    ]


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    """Each module once, without those that lie in another: casts stand around what trains as a whole."""
    inner = {id(part) for module in modules for part in module.modules() if part is not module}
    return list({id(module): module for module in modules if id(module) not in inner}.values())


def _refuse(option: str, want: str, names: list[str]) -> None:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(want, leaves, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose among {', '.join(leaves)}."
    place = "of a block" if option == "modules" else "outside of all blocks"
    raise InputError(f"{WHERE}.{option}: must name modules {place}, got {want}. {hint}")
