"""The only place that touches what Lightning and jsonargparse keep to themselves: one function each, a test each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments import SLURMEnvironment  # type: ignore[attr-defined]  # a re-export

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Trainer
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.strategies import ModelParallelStrategy


def global_seed() -> int:
    """The value of the last `seed_everything`, 0 before any; lightning 2.6 keeps it in PL_GLOBAL_SEED only."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def silence_lightnings_signals(trainer: Trainer) -> None:
    """Leave signals to others: no handlers of lightning 2.6 are set, no step asks all ranks, nothing is requeued.

    Its handler of SIGTERM broadcasts from wherever a rank happens to be, which hangs where all ranks get the signal; on
    several ranks it asks for the flag before every batch; under SLURM its handler of SIGUSR1 saves just as suddenly.
    Call it once the trainer has its strategy, before it runs.
    """
    trainer._signal_connector.register_signal_handlers = _nothing  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        environment.auto_requeue = False


def _nothing() -> None:
    """Stands where Lightning would act."""


def send_step_to_loggers(trainer: Trainer) -> None:
    """Give loggers what the step has logged; lightning 2.6 does it only after `on_train_batch_end`, if none raises."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


def validation_is_due(trainer: Trainer) -> bool:
    """Whether validation follows the step just made; lightning 2.6 decides it in a private method of its loop.

    Ask from on_train_batch_end on. That training is about to stop is no reason here: a run without a break has no such
    validation.
    """
    loop: Any = trainer.fit_loop
    if loop.epoch_loop.val_loop.skip:  # there is nothing to validate on
        return False
    stops, trainer.should_stop = trainer.should_stop, False
    try:
        return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))
    finally:
        trainer.should_stop = stops


def run_validation(trainer: Trainer) -> None:
    """Run the validation of `fit` now; lightning 2.6 does so between two steps only, with a private flag kept."""
    connector: Any = trainer._logger_connector
    first = connector._first_loop_iter
    trainer.fit_loop.epoch_loop.val_loop.restarting = False
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    connector._first_loop_iter = first


def align_counts(trainer: Trainer) -> None:
    """Set what lightning 2.6 counts of epochs, batches and loggers' steps to what a run without a break has counted.

    After a resume at the end of an epoch they lag by one, then the next resume takes its checkpoint for one of another
    moment of the loop. One batch is one optimizer step, so that all follow from step and epoch. Call it from
    on_train_batch_start, where only the batch that begins is counted as ready.
    """
    loop: Any = trainer.fit_loop
    step, epoch = trainer.global_step, trainer.current_epoch
    loop.epoch_loop._batches_that_stepped = step
    batches = loop.epoch_loop.batch_progress.total
    batches.ready, batches.started, batches.processed, batches.completed = step + 1, step, step, step
    for epochs in (loop.epoch_progress.total, loop.epoch_progress.current):
        epochs.ready, epochs.started, epochs.processed, epochs.completed = epoch + 1, epoch + 1, epoch, epoch


def count_step(optimizer: LightningOptimizer) -> None:
    """Count an optimizer step that is not made; lightning 2.6 counts only those that an optimizer makes.

    DeepSpeed cannot step without a gradient.
    """
    optimizer._on_before_step()
    optimizer._on_after_step()


def share_over_all_ranks(strategy: ModelParallelStrategy, tensor_parallel: int = 1) -> None:
    """Let all ranks share the model, so many of them each layer; lightning 2.6 takes numbers only before it has any."""
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes // tensor_parallel
    strategy._tensor_parallel_size = tensor_parallel


def parser_schema(parser: ArgumentParser) -> dict[str, Any]:
    """JSON schema of the files that a parser takes; jsonargparse 4.53 keeps its generator in a private module.

    It departs from that generator in three ways: classes of torch are not described (a megabyte of them), a class may
    be given by its short name, and classes that nobody has imported yet may be named by their path.
    """
    from jsonargparse._completions_jsonschema import ParserJsonschema

    class Schema(ParserJsonschema):
        def class_ref(self, class_type: Any, action: Any, subclass: bool) -> dict[str, Any]:
            """A type that is described once, under $defs."""
            if class_type.__module__.split(".")[0] in ("torch", "torchmetrics"):
                return {"type": ["object", "string"]}
            reference: dict[str, Any] = super().class_ref(class_type, action, subclass)
            return reference

        def class_path_schema(self, class_path: str, action: Any) -> dict[str, Any]:
            """A known class, by its path or by its name."""
            schema: dict[str, Any] = super().class_path_schema(class_path, action)
            schema["properties"]["class_path"] = {"enum": [class_path, class_path.rsplit(".", 1)[-1]]}
            return schema

        def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
            """Any known class, or one of the user's own."""
            definition: dict[str, Any] = super().subclass_def(class_type, action)
            other: dict[str, Any] = self.unknown_class_path_schema()
            other["properties"]["class_path"]["pattern"] = r"^(?!lf_lightning\.|lightning\.).+\."
            if "anyOf" in definition:
                definition["anyOf"].append(other)
            return definition

    schema: dict[str, Any] = Schema().generate(parser)  # type: ignore[no-untyped-call]  # jsonargparse's
    return schema
