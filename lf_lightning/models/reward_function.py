"""A reward that is a Python function or class of the user."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from lf_lightning.models.rewards import WHERE, Reward, RewardBatch, TheirCode, check_weight
from lf_lightning.types import InputError

_FUNCTION = f"{WHERE}: RewardFunction.function"
_POSITIONAL = ("prompts", "responses", "batch")


@dataclass(eq=False)
class RewardFunction(Reward):
    """A rule in Python: called as function(prompts, responses, batch, **arguments), it gives B numbers.

    Args:
        function: The function, or where it lies: `package.module:name`, `package.module.name` or `folder/file.py:name`.
            A class is built once as name(**arguments); its `score(prompts, responses, batch)` or `__call__` is used.
        arguments: Further arguments by name.
        weight: Its part in the sum of all rewards.
    """

    function: str | Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    _called: Callable[..., Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Find the function.

        Raises:
            InputError: It cannot be imported or called, does not take the arguments, or the weight is not finite.
        """
        check_weight(self)
        found = _imported(self.function) if isinstance(self.function, str) else self.function
        if not callable(found):
            raise InputError(f"{_FUNCTION}: must be a function or a class, got {self.function!r}. Name one.")
        if isinstance(found, type):
            _check_call(found, self.arguments)
            with TheirCode(_FUNCTION, advice="Correct it.", becomes=InputError):
                built: Any = found(**self.arguments)
            called: Any = getattr(built, "score", built)  # a class may be like a Reward, or like a function
            if not callable(called):
                raise InputError(f"{_FUNCTION}: a class must have score or __call__, got {self._text}. Add one.")
            _check_call(called, {}, *_POSITIONAL)
            self._called = called
        else:
            _check_call(found, self.arguments, *_POSITIONAL)
            self._called = partial(found, **self.arguments)

    @property
    def name(self) -> str:
        """The name of the function or class."""
        return self._text.replace(":", ".").rsplit(".", 1)[-1]

    @property
    def _text(self) -> str:
        """Where the function lies."""
        if isinstance(self.function, str):
            return self.function
        kind: Any = self.function if inspect.isroutine(self.function) else type(self.function)
        kind = self.function if isinstance(self.function, type) else kind
        return f"{kind.__module__}:{kind.__qualname__}"

    def option_values(self) -> dict[str, Any]:
        """The options, with the function as text."""
        return {"function": self._text, "arguments": self.arguments, "weight": self.weight}

    def score(self, prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch) -> Any:
        """What the function gives; (B,)."""
        return self._called(prompts, responses, batch)


def _check_call(called: Callable[..., Any], arguments: dict[str, Any], *positional: str) -> None:
    """Refuse arguments that a function or class does not take."""
    try:
        signature = inspect.signature(called)
    except ValueError:  # built in, without a signature
        return
    try:
        signature.bind(*positional, **arguments)
    except TypeError as error:
        takes = ", ".join((*positional, *(f"{name}=..." for name in arguments)))
        raise InputError(f"{_FUNCTION}: must take ({takes}), got {signature}: {error}. Correct arguments.") from error


def _imported(text: str) -> Any:
    """What lies at `module:name`, `module.name` or `file.py:name`."""
    place, _, name = text.rpartition(":") if ":" in text else text.rpartition(".")
    if not place or not name:
        raise InputError(f"{_FUNCTION}: must be package.module:name or path/to/file.py:name, got {text!r}. Correct it.")
    with TheirCode(f"{_FUNCTION}: {place}", advice="Correct it.", becomes=InputError):
        module = _module_of_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    found: Any = module
    for part in name.split("."):
        if part not in dir(found):
            near = get_close_matches(part, [each for each in dir(found) if not each.startswith("_")], n=1)
            hint = f"Did you mean {near[0]}?" if near else "Correct the name."
            raise InputError(f"{_FUNCTION}: {place} must define {name}, got none. {hint}")
        found = getattr(found, part)  # the path is the user's
    return found


def _module_of_file(path: Path) -> ModuleType:
    """A file as a module, which is run once."""
    path = path.expanduser().resolve()
    known = f"lf_lightning_rewards_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if known in sys.modules:
        return sys.modules[known]
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module  # dataclasses look their module up there
    with ExitStack() as undo:
        undo.callback(sys.modules.pop, known)
        spec.loader.exec_module(module)
        undo.pop_all()
    return module
