"""What every optimizer says of itself before it is built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from lf_lightning.optim.parameters import Trained
from lf_lightning.types import InputError

WHERE = "model.init_args.optimizer"


@dataclass(frozen=True)
class OptimizerSpec(ABC):
    """Which optimizer, with which constants."""

    strategies: ClassVar[tuple[str, ...]] = ("auto", "ddp")
    """Strategies under which it computes what it computes on one device."""

    tunings: ClassVar[tuple[str, ...]] = ()
    """Names of the tunings that it makes sense for; empty means all."""

    @abstractmethod
    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            trained: The parameters that train.
            seed: Of whatever it draws.

        Raises:
            InputError: It cannot train these parameters.
        """

    @property
    def peak_rates(self) -> dict[str, float]:
        """Name of an option or a part of the model -> its largest learning rate."""
        return {"lr": float(vars(self)["lr"])}

    @property
    def is_layerwise(self) -> bool:
        """Whether each parameter is stepped as its gradient arrives."""
        return False

    @property
    def keeps_bfloat16(self) -> bool:
        """Whether weights that are loaded in bfloat16 stay so with Full tuning; otherwise they become float32."""
        return False


def check_options(spec: OptimizerSpec, **rules: tuple[bool, str]) -> None:
    """Refuse values outside their range.

    Args:
        spec: The spec.
        rules: Option -> whether its value is right, and what it must be.

    Raises:
        InputError: As said.
    """
    for name, (holds, want) in rules.items():
        if not holds:
            raise InputError(f"{WHERE}.init_args.{name}: must be {want}, got {vars(spec)[name]}. Correct it.")


def adam_rules(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, tuple[bool, str]]:
    """The ranges of what optimizers of Adam's family share."""
    return {
        "lr": (lr > 0, "positive"),
        "betas": (all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
        "eps": (eps > 0, "positive"),
        "weight_decay": (weight_decay >= 0, "0 or more"),
    }


def check_package(spec: OptimizerSpec, package: str) -> None:
    """Refuse an optimizer whose package is not there.

    Raises:
        InputError: As said, with the command that installs it.
    """
    if find_spec(package) is None:
        raise InputError(
            f"{WHERE}.class_path: {type(spec).__name__} needs the package {package}, got none. "
            f"Run: pip install {package}"
        )


def targeted(trained: Sequence[Trained], target: str | Sequence[str]) -> list[Trained]:
    """The weights of linear layers that a target names.

    Args:
        trained: The parameters that train.
        target: `all` for every linear layer but the heads, or names of layers such as [q_proj, mlp.up_proj]; whole
            parts of a dotted name, never pieces of a word.

    Raises:
        InputError: A name fits no layer, or there are none.
    """
    linear = [each for each in trained if each.role == "linear"]
    names = [] if target == "all" else [target] if isinstance(target, str) else list(target)
    for name in names:
        if not any(_is_named(each, name) for each in linear):
            leaves = ", ".join(sorted({each.module.rpartition(".")[2] for each in linear})) or "none that train"
            raise InputError(
                f"{WHERE}.init_args.target: must name linear layers that train, got {name}. Choose among {leaves}."
            )
    found = [each for each in linear if target == "all" or any(_is_named(each, name) for name in names)]
    if not found:
        raise InputError(f"{WHERE}.init_args.target: must name linear layers that train, got none. Use all.")
    return found


def _is_named(each: Trained, name: str) -> bool:
    return f".{each.module}".endswith(f".{name}")


State = dict[str, Any]
"""What an optimizer remembers of one parameter: tensors and plain numbers."""
