"""The gate: LightningCLI with our schema. A verb builds trainer, stage and data, and runs one Trainer method."""

from __future__ import annotations

import io
import re
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lf_lightning.callbacks import Interrupted, PlainProgress, RunCheckpoint, RunFolder, last_checkpoint
from lf_lightning.callbacks.folder import check_whole, complete_checkpoints
from lf_lightning.callbacks.run_folder import make_writable, refuse_mixing
from lf_lightning.callbacks.secrets import check_no_login
from lf_lightning.callbacks.signals import end_started_ranks, one_end
from lf_lightning.console import quiet_libraries, say
from lf_lightning.data.datamodule import DataModule
from lf_lightning.data.stream_checks import check_stream_run
from lf_lightning.models import GenerationEngine, Tuning
from lf_lightning.models.rewards import Reward
from lf_lightning.optim import OptimizerSpec
from lf_lightning.refusal import check_top_keys, leaves, refusal
from lf_lightning.stages import STAGES as STAGE_CLASSES
from lf_lightning.stages import Stage
from lf_lightning.stages.deepspeed import NAMES, ZeroStrategy, check_installed, check_stage
from lf_lightning.stages.doors import check_run, check_sharing
from lf_lightning.stages.optimizer_doors import check_fused, check_in_run
from lf_lightning.types import InputError

STAGES = {stage.__name__: stage.task for stage in STAGE_CLASSES}

TRAINER_DEFAULTS: dict[str, Any] = {
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_model_summary": False,
    "default_root_dir": "runs/latest",
}


DESCRIPTION = "Options as flags, which beat the file. In the YAML those of a class lie below its init_args."

DEFAULT_EPOCHS = 3
"""Epochs of a run whose configuration says no end."""


class GateParser(LightningArgumentParser):
    """A parser whose errors are one line, and which completes no half-written options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("exit_on_error", True)
        kwargs.setdefault("usage", "lf-lightning COMMAND --config FILE [--config FILE ...] [--option value ...]")
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Refuse the configuration; parsers nest, so only the gate makes one line of it.

        Raises:
            ValueError: Always, with the parser's own message.
        """
        raise ValueError(message)


class Gate(LightningCLI):
    """Parse a configuration and build trainer, stage and data from it; running them is the verbs' part."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint options and the two links: the stage's backbone and its task are the data's too."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=CKPT_PATH_HELP)
        parser.add_argument("--overwrite", type=bool, default=False, help=OVERWRITE_HELP)
        parser.link_arguments("model.init_args.backbone", "data.backbone")
        parser.link_arguments("model.class_path", "data.task", compute_fn=task_of)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and refuse what Lightning would accept and the step contract cannot keep."""
        super().parse_arguments(parser, args)
        check_config(self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer; an integer val_check_interval counts optimizer steps across epochs."""
        trainer = self.config.trainer
        if isinstance(trainer.val_check_interval, int):
            kwargs["check_val_every_n_epoch"] = None
        if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
            kwargs["max_epochs"] = DEFAULT_EPOCHS
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
        try:
            built = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise InputError(
                f"trainer: {reason}. Look at accelerator, devices and strategy: auto suits most."
            ) from error
        if trainer.precision == "16-mixed" and built.precision != "16-mixed":
            raise InputError("trainer.precision: 16-mixed needs a GPU, got none. Use bf16-mixed.")
        check_sharing(built.strategy, self.model, verb=self.parser.prog.rpartition(" ")[2])
        return built

    def finish(self) -> None:
        """Refuse what stage, optimizer and strategy cannot do together; give the trainer the run folder."""
        verb = self.parser.prog.rpartition(" ")[2]
        check_stage(self.model, self.trainer.strategy, verb=verb)
        if verb == "fit":
            check_in_run(self.model.optimizer_spec, self.trainer, self.datamodule)
        recipe = self.config.clone()
        recipe.ckpt_path, recipe.overwrite = None, False  # how this run began is no part of what it is
        text = self.parser.dump(recipe, skip_unset=False)
        trainer: Any = self.trainer  # Lightning leaves its callbacks untyped
        trainer.callbacks.insert(0, RunFolder(overwrite=self.config.overwrite, config=text))


CKPT_PATH_HELP = (
    "Continue from a checkpoint: `last` for the newest complete one of the run folder, or the folder of one. "
    "`validate`, `test` and `predict` take its weights, or those of a final/ folder."
)
OVERWRITE_HELP = "Start afresh in a run folder that holds complete checkpoints; they are removed."


def task_of(class_path: str) -> str:
    """The data's task of a stage's class path, short or full."""
    if class_path in STAGES or "." not in class_path:
        return STAGES.get(class_path, "sft")  # an unknown name is the parser's to refuse
    with suppress(ImportError, AttributeError):
        return str(resolve_name(class_path).task)
    return "sft"


def fit(argv: list[str]) -> int:
    """Train a model."""
    cli = build(argv, "fit")
    folder = Path(cli.trainer.default_root_dir)
    asked = cli.config.ckpt_path
    ckpt_path = last_checkpoint(folder) if asked == "last" else _state_file(asked)
    if asked == "last" and ckpt_path is None:
        say(f"no complete checkpoint in {folder}: starting afresh")
    if ckpt_path is not None:
        check_whole(ckpt_path.parent.parent)
    elif not cli.config.overwrite:
        refuse_mixing(folder)
    make_writable(folder)
    cli.datamodule.open_sets("fit")  # here: no other process has been started yet, and no port chosen to meet on
    try:
        with one_end():
            cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt_path, weights_only=True)
    except Interrupted as interrupted:
        return interrupted.code
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C before the first step
            raise KeyboardInterrupt from None
        end_started_ranks(cli.trainer)
        raise
    return 0


def validate(argv: list[str]) -> int:
    """Measure the loss on the validation rows."""
    cli = build(argv, "validate")
    cli.model.weights_folder = _weights_folder(cli)
    cli.datamodule.open_sets("validate")
    with one_end():
        cli.trainer.validate(cli.model, cli.datamodule, verbose=False)
    return 0


def test(argv: list[str]) -> int:
    """Measure the loss on data.test_datasets."""
    cli = build(argv, "test")
    cli.model.weights_folder = _weights_folder(cli)
    cli.datamodule.open_sets("test")
    with one_end():
        cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    return 0


def predict(argv: list[str]) -> int:
    """Generate an answer to each prompt of data.predict_datasets."""
    cli = build(argv, "predict")
    cli.model.weights_folder = _weights_folder(cli)
    cli.datamodule.open_sets("predict")
    with one_end():
        cli.trainer.predict(cli.model, cli.datamodule, return_predictions=False)
    return 0


def build(argv: list[str], verb: str, kind: type[Gate] = Gate) -> Gate:
    """Parse the arguments of a verb and build trainer, stage and data.

    Args:
        argv: The arguments.
        verb: Name of the command.
        kind: What builds: a command that does not train may leave the trainer out.

    Raises:
        InputError: The configuration is wrong; one line says what.
    """
    quiet_libraries()
    set_parsing_settings(subclasses_enabled=[Tuning, OptimizerSpec, Reward, GenerationEngine])
    if "--help" in argv or "-h" in argv:
        print_help(argv, verb)
        raise SystemExit(0)
    try:
        check_top_keys(argv)
        return make_gate(argv, verb, kind)
    except InputError:
        raise
    except (ValueError, MisconfigurationException) as error:
        raise InputError(refusal(str(error))) from error


def make_gate(argv: list[str], verb: str, kind: type[Gate] = Gate, **options: Any) -> Gate:
    """The gate of a verb."""
    callbacks: list[Callback] = [] if sys.stderr.isatty() else [PlainProgress()]
    gate = kind(
        Stage,
        DataModule,
        subclass_mode_model=True,
        parser_class=GateParser,
        parser_kwargs={"prog": f"lf-lightning {verb}", "description": DESCRIPTION},
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        save_config_callback=None,
        seed_everything_default=42,
        trainer_defaults={**TRAINER_DEFAULTS, "callbacks": callbacks},
        args=argv,
        run=False,
        **options,
    )
    gate.finish()
    return gate


def print_help(argv: list[str], verb: str) -> None:
    """Print every option of a verb: the common ones, then those of the stage, of each tuning and each optimizer."""
    stage = next((name for name in STAGES if name in argv), "SFT")
    pages = [["--help"], ["--model.help", stage]]
    for group, base in (("tuning", Tuning), ("optimizer", OptimizerSpec)):
        pages += [["--model", stage, f"--model.{group}.help", kind.__name__] for kind in leaves(base)]
    text = io.StringIO()
    for page in pages:
        with suppress(SystemExit), redirect_stdout(text):
            make_gate(page, verb)
    usage, *lines = text.getvalue().splitlines()
    print(usage.replace("COMMAND", verb))
    for line in lines:
        if not line.startswith(("usage:", "  --data.backbone")):  # a nested parser's own; taken from the stage
            print(re.sub(r"--(tuning|optimizer)\.", r"--model.\1.", line))


def check_config(config: Namespace) -> None:
    """Refuse a stage without a backbone, and trainer options that belong to another owner.

    Raises:
        InputError: Names the option to use instead.
    """
    trainer = config.trainer
    check_no_login(config.as_dict())
    if config.model.init_args.backbone is None:
        raise InputError("model.init_args.backbone: must name a model, got null. Set model.init_args.backbone.path.")
    if trainer.accumulate_grad_batches != 1:
        raise InputError(
            f"trainer.accumulate_grad_batches: must be 1, got {trainer.accumulate_grad_batches}. "
            "Set data.global_batch_size and data.micro_batch_size: accumulation follows from them."
        )
    if trainer.gradient_clip_val is not None:
        raise InputError(
            f"trainer.gradient_clip_val: must be null, got {trainer.gradient_clip_val}. "
            "Set model.init_args.max_grad_norm."
        )
    if trainer.val_check_interval is not None and trainer.val_check_interval <= 0:
        raise InputError(
            f"trainer.val_check_interval: must be positive, got {trainer.val_check_interval}. "
            "Give optimizer steps as a whole number, or a share of an epoch."
        )
    if not isinstance(config.seed_everything, bool) and not 0 <= config.seed_everything < 2**32:
        raise InputError(f"seed_everything: must be in [0, 2^32), got {config.seed_everything}. Try 42.")
    optimizer = config.model.init_args.optimizer.get("init_args", {})
    check_fused(trainer.precision, fused=bool(optimizer.get("fused")))
    if config.data.streaming:
        reference = config.model.init_args.get("reference")
        check_stream_run(
            max_steps=trainer.max_steps,
            max_epochs=trainer.max_epochs,
            every_n_epochs=config.checkpoint.every_n_epochs,
            precompute=bool(reference is not None and reference.precompute),
        )
    check_combination(config)


def check_combination(config: Namespace) -> None:
    """Refuse a strategy or precision that the stage cannot train with, before anything is loaded.

    Raises:
        InputError: As said.
    """
    strategy: Any = config.trainer.strategy
    if isinstance(strategy, Namespace):
        kind = resolve_name(strategy.class_path)
        strategy = NAMES[strategy.init_args.stage - 1] if issubclass(kind, ZeroStrategy) else kind
    accelerator = config.trainer.accelerator
    check_run(
        strategy=strategy if isinstance(strategy, str | type) else type(strategy),
        precision=config.trainer.precision,
        accelerator=accelerator if isinstance(accelerator, str) else "auto",
        task=task_of(config.model.class_path),
    )
    if strategy in NAMES:
        check_installed()


def _state_file(asked: str | None) -> Path | None:
    """The file that Lightning continues from, of a checkpoint folder."""
    if asked is None:
        return None
    folder = Path(asked)
    path = folder / "trainer_state" / "state.ckpt"
    if not path.is_file():
        raise InputError(
            f"--ckpt_path: must be last or a checkpoint folder, got {asked}. "
            "Give one that holds manifest.json and trainer_state/state.ckpt."
        )
    return path


def _weights_folder(cli: Gate) -> Path | None:
    """The folder whose weights `validate`, `test` and `predict` use."""
    asked = cli.config.ckpt_path
    if asked is None:
        say("no --ckpt_path: taking the model as backbone and tuning give it, before any training")
        return None
    if asked == "last":
        found = complete_checkpoints(Path(cli.trainer.default_root_dir))
        if not found:
            raise InputError(
                f"--ckpt_path: last needs a complete checkpoint in {cli.trainer.default_root_dir}, got none. "
                "Give a folder, or leave it out."
            )
        return found[-1]
    if not Path(asked).is_dir():
        raise InputError(f"--ckpt_path: must be last or a folder, got {asked}. Correct the path.")
    return Path(asked)
