"""Writes docs/options.md: every option of every class, from the signatures and docstrings that the command line reads.

python docs/make_options.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_origin

from docstring_parser import parse
from lightning.pytorch import Callback

from lf_lightning import callbacks
from lf_lightning.callbacks import RunCheckpoint
from lf_lightning.cli import CKPT_PATH_HELP, OVERWRITE_HELP, TRAINER_DEFAULTS
from lf_lightning.data.datamodule import DataModule
from lf_lightning.losses.grpo import GRPOConstants
from lf_lightning.losses.ppo import PPOConstants
from lf_lightning.losses.preference import PreferenceConstants
from lf_lightning.models import (
    GenerationEngine,
    GenerationSpec,
    ReferenceSpec,
    Reward,
    SamplingSpec,
    Tuning,
    ValueHeadSpec,
)
from lf_lightning.optim import OptimizerSpec, ScheduleSpec
from lf_lightning.stages import Stage
from lf_lightning.types import BackboneSpec

PAGE = Path(__file__).parent / "options.md"
BY_THE_RUN = (RunCheckpoint, callbacks.RunFolder)
"""Callbacks whose options stand at the top of a configuration, not in `trainer.callbacks`."""

HEAD = """# Every option

Made by `python docs/make_options.py` from the classes themselves: change a docstring there, not a line here.
`lf-lightning fit --help` says the same, `lf-lightning fit --model.help SFT` the options of a stage.
On the command line an option is its path in the YAML: `--data.max_length 512`, `--model.init_args.backbone.path DIR`.
"""

TOP = [
    ("seed_everything", "whole number", "42", "Seed of everything random: weights, order, split, dropout, sampling."),
    ("ckpt_path", "text or null", "null", CKPT_PATH_HELP),
    ("overwrite", "true or false", "false", OVERWRITE_HELP),
]

TRAINER = """Every argument of Lightning's `Trainer`: devices, strategy, precision, `max_steps`, `max_epochs` ...

- Steps are optimizer steps everywhere: `max_steps`, `log_every_n_steps`, and `val_check_interval` where it is a whole
  number.
- `precision` is `32-true`, `bf16-mixed` or `16-mixed`; the type of frozen weights is `model.init_args.backbone.dtype`.
- `accumulate_grad_batches` and `gradient_clip_val` are refused: set `data.global_batch_size` (and leave the
  micro-batches to `data.micro_batch_tokens`) and `model.init_args.max_grad_norm`.

Defaults that differ from Lightning's:
"""


def page() -> str:
    """The text of docs/options.md."""
    sections = [HEAD, section("Top of the configuration", TOP), "## trainer\n\n" + TRAINER + trainer_defaults()]
    sections.append(class_section("checkpoint", RunCheckpoint))
    stages = sorted(leaves(Stage), key=lambda kind: kind.__name__)
    lines = [f"- `{kind.__name__}`: {parse(inspect.getdoc(kind) or '').short_description}" for kind in stages]
    sections.append("## model.class_path\n\n" + "\n".join(lines) + "\n")
    sections.append(class_section("model.init_args", Stage, say=False))
    common = set(inspect.signature(Stage).parameters)
    sections += [
        class_section(f"model.init_args: {kind.__name__}", kind, leave_out=common, say=False)
        for kind in stages
        if options(kind, leave_out=common)
    ]
    sections.append(class_section("model.init_args.backbone", BackboneSpec))
    for group, base in (("tuning", Tuning), ("optimizer", OptimizerSpec)):
        place = f"model.init_args.{group}"
        sections += [class_section(f"{place}: {kind.__name__}", kind) for kind in leaves(base)]
    sections.append(class_section("model.init_args.schedule", ScheduleSpec))
    sections.append(class_section("model.init_args.generation", GenerationSpec))
    sections.append(class_section("model.init_args.generation of PPO and GRPO", SamplingSpec))
    sections += [class_section(f"model.init_args.engine: {kind.__name__}", kind) for kind in leaves(GenerationEngine)]
    sections.append(class_section("model.init_args.reference", ReferenceSpec))
    for stage, kind in (("DPO", PreferenceConstants), ("PPO", PPOConstants), ("GRPO", GRPOConstants)):
        sections.append(class_section(f"model.init_args.constants of {stage}", kind))
    sections += [class_section(f"model.init_args.rewards: {kind.__name__}", kind) for kind in leaves(Reward)]
    sections.append(class_section("model.init_args.value_head", ValueHeadSpec))
    sections.append(class_section("data", DataModule, leave_out=("backbone", "task")))
    sections += [class_section(f"trainer.callbacks: {kind.__name__}", kind) for kind in our_callbacks()]
    return "\n".join(sections)


def leaves(base: type) -> Iterator[type]:
    """The package's classes below a class that none of the package derives from, in the order of their definition."""
    ours = [kind for kind in base.__subclasses__() if kind.__module__.startswith("lf_lightning.")]
    for kind in ours:
        yield from list(leaves(kind)) or [kind]


def our_callbacks() -> list[type]:
    """Callbacks that a configuration may name."""
    found = [vars(callbacks)[name] for name in sorted(callbacks.__all__)]
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, Callback) and kind not in BY_THE_RUN]


def trainer_defaults() -> str:
    """Our defaults of the trainer, one line each."""
    return "\n" + "\n".join(f"- `{name}: {shown(value)}`" for name, value in TRAINER_DEFAULTS.items()) + "\n"


def summary(kind: type) -> str:
    """What a class is, in the first lines of its docstring."""
    text = parse(inspect.getdoc(kind) or "")
    return " ".join(filter(None, (text.short_description, text.long_description))).replace("\n", " ")


def class_section(place: str, kind: type, *, leave_out: Iterable[str] = (), say: bool = True) -> str:
    """A class under the place in the configuration where its options stand."""
    rows = options(kind, leave_out=leave_out)
    return section(place, rows, text=summary(kind) if say else "")


def section(place: str, rows: list[tuple[str, str, str, str]], *, text: str = "") -> str:
    """A heading, and a table of options where there are any."""
    lines = [f"## {place}", ""] + ([text, ""] if text else [])
    if rows:
        lines += ["| option | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {default} | {meaning} |" for name, kind, default, meaning in rows]
    return "\n".join(lines).rstrip() + "\n"


def options(kind: type, *, leave_out: Iterable[str] = ()) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of the arguments of a class."""
    meanings = {item.arg_name: item.description or "" for item in parse(inspect.getdoc(kind) or "").params}
    signature = inspect.signature(kind).parameters
    parameters = [
        each for name, each in signature.items() if each.kind is not each.VAR_KEYWORD and name not in leave_out
    ]
    missing = [each.name for each in parameters if each.name not in meanings]
    assert not missing, f"{kind.__name__} does not explain {', '.join(missing)}"
    return [
        (each.name, readable(annotation_of(each, kind)), default_of(each), " ".join(meanings[each.name].split()))
        for each in parameters
    ]


def annotation_of(parameter: inspect.Parameter, kind: type) -> str:
    """The type of an argument, as written; the words of a Literal where it is the name of one."""
    written = str(parameter.annotation)
    named = vars(inspect.getmodule(kind)).get(written)
    return str(named).removeprefix("typing.") if get_origin(named) is Literal else written


def readable(annotation: str) -> str:
    """A type in words."""
    text = re.sub(r"Literal\[([^]]*)\]", lambda found: re.sub("[\"']", "`", found[1]).replace(", ", " or "), annotation)
    text = re.sub(r"Sequence\[str \| dict\[str, Any\]\]", "list of names or entries", text)
    words = {
        r"Sequence\[str\]": "list of texts",
        r"list\[str\]": "list of texts",
        r"tuple\[float, float\]": "two numbers",
        r"Sequence\[Reward\]": "list of rewards",
        r"Callable\[\.\.\., Any\]": "function",
        r"dict\[str, Any\]": "mapping",
        r"\bstr\b": "text",
        r"\bint\b": "whole number",
        r"\bfloat\b": "number",
        r"\bbool\b": "true or false",
        r"\bNone\b": "null",
    }
    for pattern, word in words.items():
        text = re.sub(pattern, word, text)
    return text.replace(" | ", " or ")


def default_of(parameter: inspect.Parameter) -> str:
    """The default, as YAML would write it; the class where it is a spec."""
    if parameter.default is parameter.empty:
        return "required"
    value = "{}" if type(parameter.default).__name__ == "_HAS_DEFAULT_FACTORY_CLASS" else shown(parameter.default)
    return f"`{value}`"  # the only default that a factory makes is an empty mapping


def shown(value: Any) -> str:
    """A value as YAML would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    return str(value) if isinstance(value, str | int | float) else type(value).__name__


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
