"""Callbacks that look for what goes wrong in silence, and say it; none of them changes a number."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.callbacks.run_log import QUARANTINE, log_is_due
from lf_lightning.console import say
from lf_lightning.optim import PartialOptimizer
from lf_lightning.shards import own_part
from lf_lightning.types import InputError, StepBatch

NAMES_IN_A_LINE = 5


class Quarantine(Callback):
    """Name the rows of a step whose loss or gradient was not finite, whether it ended the run or was skipped.

    Each rank writes a line of quarantine.jsonl: step, rank, what was found, rows. What a GradScaler skips is not there.

    Args:
        enabled: Whether it is kept.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._batch: StepBatch | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember what the step is made of."""
        self._batch = batch if self.enabled and isinstance(batch, StepBatch) else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at a step that was skipped."""
        self._look(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look at a step that stopped the run."""
        if self._batch is not None:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, stage: Any) -> None:
        batch, self._batch = self._batch, None
        found, stage.guard.found = stage.guard.found, None
        if found is None or batch is None:
            return
        rows = [row._asdict() for row in batch.rows()]
        line = {"step": found[0], "rank": trainer.global_rank, "found": found[1], "rows": rows}
        path = run_folder(trainer) / QUARANTINE
        try:
            with path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as problem:  # a line less must not become the reason why the run ends
            say(f"{path}: cannot be written ({problem.strerror})")


class GradientReach(Callback):
    """Name the trained parameters that no gradient has reached in the first steps: they do not learn.

    Args:
        num_steps: Steps to wait, > 0; empty does not look. A LoRA needs two: the first leaves one of its two matrices
            without gradient.
    """

    def __init__(self, num_steps: int | None = 10) -> None:
        if num_steps is not None and num_steps < 1:
            raise InputError(f"GradientReach.num_steps: must be at least 1, got {num_steps}. Try 10.")
        self.num_steps = num_steps
        self._waiting: dict[str, nn.Parameter] = {}
        self._witness: nn.Parameter | None = None
        self._seen = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with all of them; not under DeepSpeed, which keeps gradients to itself, nor where parts take turns."""
        trained = {name: each for name, each in pl_module.named_parameters() if each.requires_grad}
        takes_turns = any(isinstance(each, PartialOptimizer) for each in trainer.optimizers)
        looks = self.num_steps is not None and not isinstance(trainer.strategy, DeepSpeedStrategy) and not takes_turns
        self._waiting = trained if looks else {}
        self._witness, self._seen = None, 0

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Look at those that are left; a step without any gradient does not count."""
        known = [self._witness] if self._witness is not None else self._waiting.values()
        if not self._waiting or all(each.grad is None for each in known):
            return
        self._seen += 1
        found = zip(self._waiting.items(), _reached(self._waiting.values(), trainer.world_size), strict=True)
        left = {}
        for (name, parameter), is_reached in found:
            if is_reached:
                self._witness = parameter
            else:
                left[name] = parameter
        self._waiting = left
        if self._waiting and self._seen == self.num_steps:
            say(f"{_named(self._waiting)} got no gradient in {self._seen} steps and learn nothing")
            self._waiting = {}


def _reached(parameters: Iterable[nn.Parameter], world_size: int) -> list[bool]:
    """Whether each parameter has a gradient that is not zero everywhere, on any rank; asked of the device once."""
    flags = [
        torch.zeros(()) if each.grad is None else own_part(each.grad).count_nonzero().float() for each in parameters
    ]
    device = next((flag.device for flag in flags if flag.device.type != "cpu"), torch.device("cpu"))
    whole = torch.stack([flag.to(device) for flag in flags])
    if world_size > 1:
        torch.distributed.all_reduce(whole)
    return [bool(count > 0) for count in whole.tolist()]


def _named(parameters: dict[str, Any]) -> str:
    names = list(parameters)
    more = f" and {len(names) - NAMES_IN_A_LINE} more" if len(names) > NAMES_IN_A_LINE else ""
    return f"{len(names)} trained parameters ({', '.join(names[:NAMES_IN_A_LINE])}{more})"


class ChangedWeights(Callback):
    """Log the share of weights that a step changes: under bfloat16 a small step rounds to none.

    It is logged as train/changed_weights with the other values of a step, from a sample of each parameter that holds
    one; the first time that it is too small a line says so.

    Args:
        at_least: Share below which a line is printed, in [0, 1].
        sample: Entries of each parameter that are looked at, > 0; the first ones.
    """

    def __init__(self, at_least: float = 0.01, sample: int = 4096) -> None:
        if not 0 <= at_least <= 1:
            raise InputError(f"ChangedWeights.at_least: must be in [0, 1], got {at_least}. Try 0.01.")
        if sample < 1:
            raise InputError(f"ChangedWeights.sample: must be at least 1, got {sample}. Try 4096.")
        self.at_least, self.sample = at_least, sample
        self._before: list[Tensor] = []
        self._has_told = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the sample before a step that is logged."""
        self._before = [each.clone() for each in self._sampled(pl_module)] if log_is_due(trainer, ahead=1) else []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare."""
        if not self._before:
            return
        pairs = zip(self._before, self._sampled(pl_module), strict=True)
        changed = torch.stack([(before != after).sum() for before, after in pairs]).sum().double()
        counts = torch.stack([changed, changed.new_tensor(sum(each.numel() for each in self._before))])
        if trainer.world_size > 1:
            torch.distributed.all_reduce(counts)
        share = float(counts[0] / counts[1])
        pl_module.log("train/changed_weights", share)
        if share < self.at_least and not self._has_told:
            self._has_told = True
            say(
                f"step {trainer.global_step}: only {share:.2%} of the weights have changed; "
                "raise the learning rate, or train in float32"
            )

    @torch.no_grad()
    def _sampled(self, stage: LightningModule) -> list[Tensor]:
        trained = [own_part(each) for each in stage.parameters() if each.requires_grad]
        return [each.reshape(-1)[: self.sample] for each in trained if each.numel()]


class LaggingRank(Callback):
    """Name a rank that is slower than the others, step after step: all wait for it.

    Once in a logging interval each rank times its own part of a step, which is fetching its batch and computing until
    the last backward; from there on they wait for each other.

    Args:
        ratio: How much slower than the median of the ranks is too slow, > 1; empty does not look.
        intervals: Logging intervals in a row before a line is printed, > 0.
    """

    def __init__(self, ratio: float | None = 1.5, intervals: int = 3) -> None:
        if ratio is not None and not ratio > 1:
            raise InputError(f"LaggingRank.ratio: must be above 1, got {ratio}. Try 1.5.")
        if intervals < 1:
            raise InputError(f"LaggingRank.intervals: must be at least 1, got {intervals}. Try 3.")
        self.ratio, self.intervals = ratio, intervals
        self._end_of_last = self._start = self._computed = 0.0
        self._late: dict[int, int] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._end_of_last, self._late = time.perf_counter(), {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is here."""
        self._start = time.perf_counter()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward is done; on a step that is timed, wait until the device has done it too."""
        if self.ratio is not None and trainer.world_size > 1 and log_is_due(trainer, ahead=1):
            if loss.device.type == "cuda":
                torch.cuda.synchronize(loss.device)
            self._computed = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the ranks."""
        if trainer.world_size > 1 and log_is_due(trainer) and self._computed > self._start:
            own = [self._start - self._end_of_last, self._computed - self._start]
            whole: Any = pl_module.all_gather(torch.tensor(own, dtype=torch.float32))
            self.compare(whole.tolist(), trainer.global_step)
        self._end_of_last = time.perf_counter()

    def compare(self, times: list[list[float]], step: int) -> None:
        """Count how often each rank was too slow.

        Args:
            times: Seconds of each rank: until its batch was there, and from then until its last backward. The second
                holds a wait for the rank whose batch came last, which is taken out.
            step: Where training is.
        """
        assert self.ratio is not None, "nothing is timed without"
        latest = max(fetching for fetching, _ in times)
        own = [fetching + max(computing - (latest - fetching), 0.0) for fetching, computing in times]
        middle = median(own)
        for rank, seconds in enumerate(own):
            self._late[rank] = self._late.get(rank, 0) + 1 if seconds > self.ratio * middle else 0
            if self._late[rank] == self.intervals:
                say(
                    f"step {step}: rank {rank} takes {seconds:.3g} s for its part of a step, the median is "
                    f"{middle:.3g} s; all wait for it"
                )
