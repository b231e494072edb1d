"""Signals end a run between two steps, with a checkpoint of the last one: nothing that was computed is lost."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.checkpoint import RunCheckpoint
from lf_lightning.console import say
from lf_lightning.lightning_private import send_step_to_loggers, silence_lightnings_signals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What ends a run: a scheduler's, the terminal's, and the one that SLURM is asked to send before the time is up."""
STDERR = 2
STARTER = "LF_LIGHTNING_STARTER"
"""Environment variable with the number of the process that starts further ranks; those inherit it."""


class Interrupted(SystemExit):
    """A signal ended the run; `code` is 128 + its number, as shells count. A script that lets it pass exits with it."""

    code: int


class GracefulStop(Callback):
    """Answer SIGTERM, SIGINT and SIGUSR1: finish the step on all ranks, save it, and end with 128 + the number.

    The handler sets a flag and does nothing else. After each optimizer step, and after each batch of a validation, the
    ranks agree on the flag, save a checkpoint of the step unless there is one, and raise `Interrupted`; final/ is not
    written. A second SIGINT raises at once and saves nothing. Handlers of before come back when the run is over. A
    validation that was cut off is run first when the run goes on.
    """

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}
        self._loops: dict[str, Any] | None = None
        self._trainer: Trainer | None = None

    # ------------------------------------------------------------------ from set-up to the end

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep Lightning from answering: its handler talks to other ranks from inside, where they do not listen."""
        silence_lightnings_signals(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen, from the first step on. Before it a signal ends the process, as there is nothing to save."""
        self._received, self._loops, self._trainer = 0, None, trainer
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            heard = (
                number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
            )  # `... &` of a shell
            self._before = {number: signal.signal(number, self._note) for number in heard}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back; ranks that this process started do not outlive a sudden end."""
        self._restore()
        if isinstance(exception, SystemExit) and not self._is_agreed:
            end_started_ranks(trainer)

    _is_agreed = False

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._trainer = {}, None

    def _note(self, number: int, frame: object) -> None:
        """Remember a signal; a second Ctrl-C ends the run at once."""
        assert self._trainer is not None, "the handler is ours between on_train_start and the end"
        if self._received and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one ends it wherever it hangs
            raise Interrupted(_code(self._trainer, number))
        if not self._received and self._trainer.is_global_zero:
            line = f"{signal.Signals(number).name}: finishing the step, then saving; Ctrl-C stops at once\n"
            os.write(STDERR, line.encode())  # not print: the signal may have come in the middle of one
        self._received = self._received or number

    # ------------------------------------------------------------------ where ranks agree

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after this step where any rank was told to."""
        if trainer.enable_validation:  # a checkpoint made while validating is that of the step, where a resume goes on
            self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
        number = self._agreed(trainer, pl_module)
        if number:
            send_step_to_loggers(trainer)
            self._stop(trainer, pl_module, number)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop in the middle of a validation, which may be longer than the grace that a scheduler gives."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (number := self._agreed(trainer, pl_module)):
            self._stop(trainer, pl_module, number)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the loops as they stood when the step ended, where a validation has begun since."""
        if trainer.validating and self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def _agreed(self, trainer: Trainer, pl_module: LightningModule) -> int:
        """The signal that any rank has received, the same on all of them; 0 for none."""
        if trainer.world_size == 1:
            return self._received
        flag = torch.tensor(self._received, device=pl_module.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    def _stop(self, trainer: Trainer, pl_module: LightningModule, number: int) -> None:
        """Save the step and leave.

        Raises:
            Interrupted: Always.
        """
        self._received, self._is_agreed = number, True
        ours: list[Callback] = vars(trainer)["callbacks"]
        saving = next((callback for callback in ours if isinstance(callback, RunCheckpoint)), None)
        if saving is None:
            say(f"interrupted after step {trainer.global_step}: nothing saved, the trainer has no RunCheckpoint")
        else:
            folder = saving.saved.get(trainer.global_step) or saving.save(trainer, pl_module)
            say(f"interrupted after step {trainer.global_step}: saved {folder}, continue with --ckpt_path last")
        raise Interrupted(_code(trainer, number))


@contextmanager
def one_end() -> Iterator[None]:
    """Leave no rank behind: one that is started inside by this process ends within a second of it.

    However this process ends, kill -9 included: such a rank would wait for half an hour for a meeting to which nobody
    comes. Ranks that a launcher such as torchrun has started are that launcher's to end.
    """
    variables = os.environ  # started ranks get them, and nothing else, from the process that starts them
    starter = variables.get(STARTER)
    if starter is not None and variables.get("LOCAL_RANK", "0") != "0":
        threading.Thread(target=_end_after, args=(int(starter),), daemon=True).start()
    variables[STARTER] = str(os.getpid())
    try:
        yield
    finally:
        del variables[STARTER]


def _end_after(starter: int) -> None:
    while os.getppid() == starter:
        time.sleep(0.5)
    os._exit(1)  # the process and not this thread; nobody is left to hear more


def end_started_ranks(trainer: Trainer) -> None:
    """End the ranks that this process has started, where it ends without asking them."""
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.kill(signal.SIGKILL)


def _code(trainer: Trainer, number: int) -> int:
    """The exit code of this rank: 128 + number, but 0 for one that the first rank has started and watches.

    Lightning kills the first rank when such a rank ends with anything else, however near it is to its own end.
    """
    strategy: Any = trainer.strategy
    is_watched = trainer.local_rank > 0 and not strategy.cluster_environment.creates_processes_externally
    return 0 if is_watched else 128 + number
