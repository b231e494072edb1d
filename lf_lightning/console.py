"""What a run tells the person in front of it: single lines on stderr, from one process of all."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def say(line: str) -> None:
    """Print a line on stderr, on the first rank."""
    say_from_any(line)


def say_on_node(line: str) -> None:
    """Print a line on stderr, on the first process of each node: what differs from node to node."""
    # torchrun, Lightning's own launcher and SLURM number the processes of a node so; a single process has no number
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        say_from_any(line)


def say_from_any(line: str) -> None:
    """Print a line on stderr, on whichever process calls: what only one of them does."""
    print(line, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """Silence the bars, hints and advertisements of the libraries below us, which would bury our lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("lightning.pytorch", "lightning.fabric", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
