"""Which layers of a model an adapter goes to: all, by name, or by a regular expression."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from lf_lightning.models.adapters import WHERE
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIGNS = set("*+?()[]{}|^$\\")
"""A text with one of these is a regular expression, since no name of a module has any."""


class Targets(NamedTuple):
    """Where adapters go, by full names."""

    modules: list[str]  # linear layers
    parameters: list[str]  # weights of many experts in one tensor

    @property
    def names(self) -> list[str]:
        """Both."""
        return [*self.modules, *self.parameters]


def check_target(target: str | Sequence[str]) -> None:
    """Refuse a target that names nothing, or a broken regular expression.

    Raises:
        InputError: As said.
    """
    if not target or (not isinstance(target, str) and not all(target)):
        raise InputError(f"{WHERE}.target: must name linear layers, got none. Use all.")
    for text in [target] if isinstance(target, str) else target:
        if SIGNS & set(text):
            try:
                re.compile(text)
            except re.error as error:
                raise InputError(
                    f"{WHERE}.target: must be a regular expression, got {text} ({error}). Correct it."
                ) from error


def find_targets(model: PreTrainedModel, target: str | Sequence[str]) -> Targets:
    """The layers that a target means: every linear layer but the output layer, and every tensor of experts, for `all`.

    Raises:
        InputError: A name or an expression means none.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    experts = fused_experts(model)
    if target == "all":
        head = model.get_output_embeddings()
        inner = [name for name in linears if model.get_submodule(name) is not head]
        if not inner and not experts:
            raise InputError(f"{WHERE}.target: all finds no linear layer in {type(model).__name__}. Name layers.")
        return Targets(inner, experts)
    found: set[str] = set()
    for want in [target] if isinstance(target, str) else target:
        matched = [name for name in (*linears, *experts) if matches(want, name)]
        if not matched:
            _refuse(want, (*linears, *experts))
        found.update(matched)
    return Targets([name for name in linears if name in found], [name for name in experts if name in found])


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that an adapter can go to."""
    from transformers.pytorch_utils import Conv1D

    is_packed = "qweight" in dict(module.named_buffers(recurse=False))  # GPTQ's and AWQ's layers are no nn.Linear
    return isinstance(module, nn.Linear | Conv1D) or is_packed


def fused_experts(model: nn.Module) -> list[str]:
    """Names of tensors (experts, inputs, outputs) that hold a linear map of every expert of a layer."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if not isinstance(module, convolutions)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def matches(want: str, name: str) -> bool:
    """Whether a wish means a full name: by its last parts, or by an expression for all of it. Never by a part."""
    if SIGNS & set(want):
        return re.fullmatch(want, name) is not None
    return name == want or name.endswith(f".{want}")


def modules_named(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Full names of the modules that are named.

    Raises:
        InputError: The model has none of a name.
    """
    names = [name for name, _ in model.named_modules() if name]
    found = []
    for want in wanted:
        matched = [name for name in names if name == want or name.endswith(f".{want}")]
        if not matched:
            raise InputError(f"{WHERE}.modules_to_save: must name modules of the model, got {want}. Correct it.")
        found += matched
    return found


def check_all_adapted(adapted: Any, targets: Targets) -> None:
    """Make sure that peft has put an adapter on every target, and on nothing else.

    Raises:
        InputError: It has not: in some families it takes names of layers for those of older checkpoints.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = set()
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            plain = name.replace(".base_layer", "")
            parameter = vars(module).get("parameter_name")
            found.add(plain if parameter is None else f"{plain}.{parameter}")
    wrong = sorted(found ^ set(targets.names))
    if wrong:
        raise InputError(
            f"{WHERE}.target: peft must put adapters on the layers that are named and on no others, got it wrong at "
            f"{wrong[0]} of this family. Name other layers in target."
        )


def _refuse(want: str, names: Iterable[str]) -> None:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    near = difflib.get_close_matches(want, leaves, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose among {', '.join(leaves)}."
    raise InputError(f"{WHERE}.target: must name linear layers of the model, got {want}. {hint}")
