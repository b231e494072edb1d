"""Runs `lf-lightning fit` again and again in the same folders, on other numbers of ranks each time.

    python chain_run.py <links.json>

reads a list of links: the number of ranks, and the arguments of `fit`. Ranks are forked from this process, which has
imported everything, so that a link costs no start-up. A link that fails ends it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

import tests.faults.preload  # noqa: F401  # imports what a run needs
from lf_lightning.__main__ import main
from lf_lightning.callbacks.folder import run_folder


class KeepUnits(Callback):
    """Write down which rows a rank has trained on in which step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A line for the step just made."""
        rows = [list(row) for row in batch.rows()]
        with (run_folder(trainer) / f"units.{trainer.global_rank}.jsonl").open("a") as handle:
            handle.write(json.dumps([trainer.global_step, rows]) + "\n")


def run(num_ranks: int, argv: list[str]) -> int:
    """Fork the ranks of a link and wait for all of them; the largest exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        process = os.fork()
        if process == 0:
            if num_ranks > 1:
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
            code = main(["fit", *argv])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        ranks.append(process)
    return max(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks)


if __name__ == "__main__":
    for number, arguments in json.loads(Path(sys.argv[1]).read_text()):
        print("link", number, arguments, flush=True)
        if run(number, arguments) != 0:
            sys.exit(1)
