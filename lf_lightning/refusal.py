"""What a parser says about a configuration, as one line: what, where, got, do this."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import yaml
from lightning.pytorch import Callback, Trainer

from lf_lightning.callbacks import RunCheckpoint
from lf_lightning.data.datamodule import DataModule
from lf_lightning.losses.grpo import GRPOConstants
from lf_lightning.losses.ppo import PPOConstants
from lf_lightning.losses.preference import PreferenceConstants
from lf_lightning.models import (
    GenerationEngine,
    GenerationSpec,
    ReferenceSpec,
    SamplingSpec,
    Tuning,
    ValueHeadSpec,
)
from lf_lightning.models.rewards import Reward
from lf_lightning.optim import OptimizerSpec, ScheduleSpec
from lf_lightning.stages import STAGES
from lf_lightning.stages.deepspeed import ZeroStrategy
from lf_lightning.stages.fsdp2 import FSDP2Strategy
from lf_lightning.types import BackboneSpec, InputError


def leaves(base: type) -> Iterator[type]:
    """The classes below a class that none derives from."""
    kinds: list[type] = base.__subclasses__()
    for kind in kinds:
        yield from list(leaves(kind)) or [kind]


OWNERS: dict[str, tuple[type, ...]] = {
    "model": STAGES,
    "backbone": (BackboneSpec,),
    "schedule": (ScheduleSpec,),
    "generation": (GenerationSpec, SamplingSpec),
    "engine": tuple(GenerationEngine.__subclasses__()),
    "rewards": tuple(Reward.__subclasses__()),
    "reference": (ReferenceSpec,),
    "constants": (PreferenceConstants, PPOConstants, GRPOConstants),
    "value_head": (ValueHeadSpec,),
    "tuning": tuple(leaves(Tuning)),
    "optimizer": tuple(OptimizerSpec.__subclasses__()),
    "data": (DataModule,),
    "trainer": (Trainer,),
    "strategy": (FSDP2Strategy, ZeroStrategy),
    "checkpoint": (RunCheckpoint,),
    "callbacks": tuple(Callback.__subclasses__()),
}
"""Name of a group of options -> the classes whose arguments they are."""

CHOICES = ("model", "tuning", "optimizer", "callbacks", "rewards", "engine")
"""Groups that hold a class_path, with the options below init_args."""

GROUPED = ("constants", "generation", "reference", "schedule", "value_head", "backbone")
"""Groups of a stage whose options are often looked for in the stage itself."""

TOP = ("seed_everything", "trainer", "checkpoint", "model", "data", "ckpt_path", "overwrite", "config", "print_config")

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Sequence": "a list",
    "NoneType": "null",
    "dict": "a mapping",
}


def check_top_keys(argv: list[str]) -> None:
    """Refuse an unknown key at the top of a configuration file; a parser overlooks one that holds nothing.

    Raises:
        InputError: As said.
    """
    for option, path in pairwise(argv):
        if option not in ("-c", "--config") or not Path(path).is_file():
            continue
        with suppress(yaml.YAMLError, UnicodeDecodeError):  # the parser says what is wrong there
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            for key in content if isinstance(content, dict) else ():
                if key not in TOP and key != "$schema":
                    raise InputError(f"{key}: there is no such option. {_hint(str(key), TOP)}")
                if key in ("trainer", "checkpoint", "data") and not isinstance(content[key], dict | str | None):
                    raise InputError(f"{key}: must hold options, got {content[key]!r}. Write {key}: {{option: value}}.")
            data = content.get("data") if isinstance(content, dict) else None
            for name, owner in (("backbone", "model.init_args.backbone"), ("task", "model.class_path")):
                if isinstance(data, dict) and name in data:
                    raise InputError(f"data.{name}: is taken from {owner}, got a value of its own. Remove it.")


def refusal(message: str) -> str:
    """Turn a parser's message into one line.

    Args:
        message: Several lines of nested complaints, the innermost last.
    """
    ours = re.search(r"(?:^|- |\n\s+)((?:model|data|trainer|checkpoint)\.[\w.]+: \S.*)", message)
    if ours and "-->" not in message:
        return ours[1]
    keys = re.findall(r'Parser key "([^"]+)"', message)
    for pattern, explain in PATTERNS:
        found = re.search(pattern, message, re.DOTALL)
        if found:
            return explain(keys, found, message)
    kept = (line.strip() for line in message.splitlines() if not re.search(r"Subtypes:|NoneType|Given value", line))
    return " ".join(line for line in kept if line)


def _unknown_argument(keys: list[str], found: re.Match[str], message: str) -> str:
    if found[1].endswith((".yaml", ".yml", ".json")):
        return f"{found[1]}: must follow --config, got it alone. Write --config {found[1]}."
    if not found[1].startswith("-"):
        return f"{found[1]}: must begin with two dashes, as an option does. Write --{found[1].replace('=', ' ')}."
    option = found[1].split("=")[0].lstrip("-")
    return _unknown(_path(keys, inside=True), option)


def _unknown_option(keys: list[str], found: re.Match[str], message: str) -> str:
    if found[1] == "class_path":
        return (
            f"{_path(keys)}: must hold class_path and init_args alone, got options beside them. "
            "Indent the options below init_args."
        )
    return _unknown(_path(keys, inside=True), found[1])


def _unknown_in_group(keys: list[str], found: re.Match[str], message: str) -> str:
    return _unknown(".".join(filter(None, (_path(keys, inside=True), found[1]))), found[2])


def _unknown(path: str, option: str) -> str:
    where = ".".join(filter(None, (path, option)))
    *above, leaf = [part for part in where.split(".") if part != "init_args"]
    first_wrong = next((part for part in where.split(".")[:1] if part not in TOP), None)
    if first_wrong is not None:
        return f"{where}: there is no such option. {_hint(first_wrong, TOP)}"
    if len(above) == 2 and above[-1] in OWNERS and above[-1] not in CHOICES and leaf in _options(above[-1]):
        return _unknown(where.rsplit(".", 2)[0], above[-1])  # the class above has no such group at all
    names = list(_options(above[-1])) if above and above[-1] in OWNERS else [n for o in OWNERS for n in _options(o)]
    if leaf in names:
        owners = [kind.__name__ for kind in OWNERS[above[-1]] if leaf in inspect.signature(kind).parameters]
        return f"{where}: the class chosen has no such option. Remove it, or choose {' or '.join(owners)}."
    groups = [group for group in GROUPED if above[-1:] == ["model"] and leaf in _options(group)]
    if groups:
        right = f"{where.rsplit('.', 1)[0]}.{groups[0]}.{leaf}"
        return f"{where}: there is no such option. It is one of {groups[0]}: set {right}."
    return f"{where}: there is no such option. {_hint(leaf, names)}"


def _wrong_class(keys: list[str], found: re.Match[str], message: str) -> str:
    path = _path(keys)
    group = path.rsplit(".", 1)[-1]
    names = sorted(kind.__name__ for kind in OWNERS.get(group, ()))
    return f"{path}.class_path: must name a class, got {found[1]}. {_hint(found[1], names)}"


def _wrong_choice(keys: list[str], found: re.Match[str], message: str) -> str:
    names = [name.strip(" '") for name in found[1].split(",")]
    return f"{_path(keys)}: must be one of {', '.join(names)}, got {_value(message)}. {_hint(_value(message), names)}"


def _wrong_type(keys: list[str], found: re.Match[str], message: str) -> str:
    innermost = message[max(message.rfind("Parser key"), 0) :]
    alone = re.search(r"Expected a <class '([^']+)'>\. Got value", innermost)
    kinds = [alone[1]] if alone else re.findall(r"Expected a <class '([^']+)'>", innermost)
    if keys and keys[-1].rsplit(".", 1)[-1] in CHOICES:
        return _wrong_shape(_path(keys), _value(message))
    texts = dict.fromkeys(TYPES.get(kind, kind) for kind in (kind.rsplit(".", 1)[-1] for kind in kinds))
    return f"{_path(keys)}: must be {' or '.join(texts)}, got {_value(message)}. Correct the value."


def _wrong_shape(path: str, value: str) -> str:
    """A class is chosen with class_path and init_args, and with nothing beside them."""
    group = path.rsplit(".", 1)[-1]
    given: object = None
    with suppress(ValueError, SyntaxError):
        given = ast.literal_eval(value)
    if isinstance(given, dict) and "class_path" in given:
        beside = [key for key in given if key not in ("class_path", "init_args", "dict_kwargs")]
        if beside:
            return f"{path}.{beside[0]}: must lie below init_args, got it beside class_path. Indent it below init_args."
        names = ", ".join(sorted(kind.__name__ for kind in OWNERS[group]))
        return (
            f"{path}.class_path: must be one of {names}, or a subclass of your own that can be imported, "
            f"got {given['class_path']}. Correct it."
        )
    short = value if len(value) <= 40 else value[:37] + "..."
    return f"{path}: must be {{class_path: NAME, init_args: {{...}}}}, got {short}. Write it so."


def _wrong_tuple(keys: list[str], found: re.Match[str], message: str) -> str:
    return f"{_path(keys)}: must be a list of {found[1]}, got {_value(message)}. Correct the value."


def _missing_file(keys: list[str], found: re.Match[str], message: str) -> str:
    return f"--config: must be a file, got {found[1]}, which does not exist. Correct the path."


def _broken_yaml(keys: list[str], found: re.Match[str], message: str) -> str:
    problem = " ".join(found[1].replace('in "<unicode string>",', "at").split())
    return f"--config: must be YAML, got a file that cannot be read {problem}. Correct it there."


def _no_mapping(keys: list[str], found: re.Match[str], message: str) -> str:
    return "--config: must hold options, got an empty file or a list. Write for example `model: {class_path: SFT}`."


def _missing(keys: list[str], found: re.Match[str], message: str) -> str:
    if "model" in found[1]:
        return "model: must say which stage runs, got nothing. Give --config FILE with model.class_path: SFT."
    return f"{'.'.join(filter(None, (_path(keys, inside=True), found[1].strip())))}: is required, got nothing. Give it."


def _linked(keys: list[str], found: re.Match[str], message: str) -> str:
    return f"{found[2]}: is taken from {found[1]}, got a value of its own. Remove it."


PATTERNS = (
    (r"Unexpected config", _no_mapping),
    (r"argument (?:\w+\()?([\w.]+)\)? --> ([\w.]+):", _linked),
    (r"File does not exist: '([^']*)'", _missing_file),
    (r"Problems parsing config:\s*(.*)", _broken_yaml),
    (r"following arguments are required: ([^\n]+)", _missing),
    (r"unrecognized arguments: (\S+)", _unknown_argument),
    (r"Group '([^']+)' does not accept option '([^']+)'", _unknown_in_group),
    (r"Option '([^']+)' is not accepted", _unknown_option),
    (r"Expected a typing.Literal\[([^\]]*)\]", _wrong_choice),
    (r"Expected a tuple with (\d+) elements", _wrong_tuple),
    (r"Expected a dot import path string: (\S+)", _wrong_class),
    (r"Expected a <class '[^']+'>", _wrong_type),
)
"""What a parser says -> how we say it; the first that fits."""


def _path(keys: list[str], *, inside: bool = False) -> str:
    """The place in the YAML of nested parser keys; `inside` the class that the last key chooses."""
    parts: list[str] = []
    for index, key in enumerate(keys):
        parts.append(key)
        if key.rsplit(".", 1)[-1] in CHOICES and (inside or index < len(keys) - 1):
            parts.append("init_args")
    return ".".join(parts)


def _options(owner: str) -> Iterator[str]:
    """Names of the arguments of the classes behind a group."""
    for kind in OWNERS[owner]:
        yield from (name for name in inspect.signature(kind).parameters if name not in ("self", "args", "kwargs"))


def _value(message: str) -> str:
    """What the user gave."""
    nested = re.search(r"Got value: ([^\n]*)", message) or re.search(r"val='?(.*?)'?\)\s*$", message)
    given = nested or re.search(r"Given value: ([^\n]*)", message)
    return given[1].strip() if given else "something else"


def _hint(word: str, names: Iterable[str]) -> str:
    """The nearest right name, one that begins with the word before others; or all of them where few."""
    known = sorted(set(names))
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.65)
    near.sort(key=lambda name: not name.startswith(word))
    if near:
        return f"Did you mean {near[0]}?"
    return f"Choose among {', '.join(known)}." if len(known) <= 12 else "docs/options.md lists them all."
