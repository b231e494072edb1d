"""The front door: which command is meant, said before anything heavy is imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pkgutil import resolve_name

from lf_lightning import __version__

COMMANDS = {
    "fit": ("lf_lightning.cli:fit", "train a model"),
    "prepare": ("lf_lightning.commands.prepare:main", "encode the data of a run beforehand, without its model"),
    "validate": ("lf_lightning.cli:validate", "loss and metrics on the validation sets"),
    "test": ("lf_lightning.cli:test", "loss and metrics on data.test_datasets, written to all_results.json"),
    "predict": ("lf_lightning.cli:predict", "generate answers into generated_predictions.jsonl"),
    "verify-resume": (
        "lf_lightning.commands.verify_resume:main",
        "prove on a configuration that a killed run continues bit for bit",
    ),
    "schedule": ("lf_lightning.commands.schedule:main", "print and draw the learning rate over the steps of a run"),
    "score": ("lf_lightning.commands.score:main", "exact-match score of a predictions file"),
    "schema": ("lf_lightning.commands.schema:main", "JSON schema of the configuration, for editors"),
}
"""Name of a command -> (`module:function`, what it does). The function takes the arguments after the name."""

STOPPED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count
ENDING = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that end a command at once with 128 + their number; training itself answers them after its step."""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The command and its arguments; those of the process where None.

    Returns:
        The exit code: 2 where the input was wrong, 1 where training could not go on (one line on stderr says why), 130
        after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1, else the command's.
    """
    arguments = sys.argv[1:] if argv is None else argv
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        print(help_text())
        return 0
    if first in ("-V", "--version"):
        print(f"lf-lightning {__version__}")
        return 0
    if first not in COMMANDS:
        return report(complaint(first))
    return run(COMMANDS[first][0], arguments[1:])


def run(entry: str, arguments: list[str]) -> int:
    """Import `module:function` and call it with the arguments; a mistake of the user becomes one line."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that a config may name classes of the user's own modules
    try:
        with ending_signals():
            command: Callable[[list[str]], int | None] = resolve_name(entry)
            return command(arguments) or 0
    except BrokenPipeError:  # the reader has gone, as in `lf-lightning fit --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Ended as ended:
        return told(f"ended by {signal.Signals(ended.code - 128).name}", code=ended.code)
    except KeyboardInterrupt:
        return told("interrupted", code=INTERRUPTED)
    except (ValueError, RuntimeError) as error:
        from lf_lightning.types import InputError, TrainingStopped  # here: it brings torch, which the front must not

        if not isinstance(error, InputError | TrainingStopped):
            raise
        notes: list[str] = getattr(error, "__notes__", [])  # Python makes the attribute with the first note
        return report(" ".join([str(error), *notes]), code=BAD_INPUT if isinstance(error, InputError) else STOPPED)


class Ended(SystemExit):
    """A signal ended the command; `code` is 128 + its number."""

    code: int


@contextmanager
def ending_signals() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise `Ended`, and leave handlers as they were, that of Ctrl-C too."""
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to no other
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Ended(128 + number)

    before = {number: signal.getsignal(number) for number in (*ENDING, signal.SIGINT)}
    try:
        for number in ENDING:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def told(message: str, *, code: int) -> int:
    """Print what ended the command, once and not on every rank, and return the exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the launcher says there which rank of this machine this is
        print("lf-lightning:", message, file=sys.stderr)
    return code


def report(message: str, *, code: int = BAD_INPUT) -> int:
    """Print a message as one line on stderr and return the exit code."""
    text = " ".join(line.strip() for line in message.splitlines())
    sys.stderr.write(f"lf-lightning: error: {text}\n")  # one write, since other ranks may be writing too
    return code


def complaint(first: str) -> str:
    """What is wrong with a first argument that is no command, and what to write instead."""
    if not first:
        return f"command: none given. Choose one of {', '.join(COMMANDS)}; `lf-lightning --help` explains them."
    if first.startswith("-"):
        return f"command: expected before the options, got {first!r}. Write for example `lf-lightning fit {first}`."
    near = get_close_matches(first.lower(), COMMANDS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(COMMANDS)}."
    return f"command: there is no {first!r}. {hint}"


def help_text() -> str:
    """The help of the front: one line for each command."""
    commands = [f"  {name:<15}{summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lf-lightning COMMAND [options]",
            "",
            "LLM post-training on PyTorch Lightning. A run is one YAML: lf-lightning fit --config run.yaml",
            "",
            "commands:",
            *commands,
            "",
            "options:",
            "  -h, --help      show this help; `lf-lightning COMMAND --help` shows the options of a command",
            "  -V, --version   show the version",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
