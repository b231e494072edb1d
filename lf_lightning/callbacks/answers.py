"""Held-out prompts answered before and after training, side by side."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lf_lightning.callbacks.folder import run_folder
from lf_lightning.callbacks.predictions import gather_predictions
from lf_lightning.console import say
from lf_lightning.data.templates import prompt_segments
from lf_lightning.types import Answer, Conversation, Message


class AnswersTable(Callback):
    """Answer the validation prompts before and after training, and print a table and the share of exact matches.

    Args:
        num_rows: Rows of the table, > 0; the score counts all prompts.
        next_command: Printed below the table: what to try next; FOLDER stands for the run folder.
    """

    def __init__(self, num_rows: int = 8, next_command: str | None = None) -> None:
        self.num_rows, self.next_command = num_rows, next_command
        self._before: list[Answer] = []
        self._after: list[Answer] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer with the model as it was given."""
        say("answering the held-out prompts before training")
        self._before = _answers(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer again, while the model is still where it trained."""
        say("answering the held-out prompts after training")
        self._after = _answers(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print both as the last words of the run; nothing where nothing was left to train."""
        if self._after and trainer.is_global_zero:
            self._print(trainer, pl_module)

    def _print(self, trainer: Trainer, stage: Any) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console()
        table = Table(title="held-out prompts, before and after training")
        for name in ("prompt", "before", "after", "right answer"):
            table.add_column(name, overflow="fold")
        start, end = _frame(stage)
        for old, new in list(zip(self._before, self._after, strict=True))[: self.num_rows]:
            prompt = new.prompt.removeprefix(start).removesuffix(end)
            table.add_row(*(_shown(text) for text in (prompt, old.predict, new.predict, new.label)))
        console.print(table)
        for name, answers in (("before", self._before), ("after", self._after)):
            hits = sum(answer.predict.strip() == answer.label.strip() for answer in answers)
            console.print(f"exact match {name} training: {hits / len(answers):.3f} ({hits} of {len(answers)})")
        console.print(f"the model is in {run_folder(trainer) / 'final'}", soft_wrap=True)
        if self.next_command:
            command = self.next_command.replace("FOLDER", str(run_folder(trainer)))
            console.print(f"next, try: {command}", soft_wrap=True, markup=False)


def _answers(stage: Any) -> list[Answer]:
    """Answers of all ranks to the validation prompts."""
    loader = stage.data.prompt_loader("val", batch_size=stage.generation.batch_size)
    found: list[Answer] = []
    for batch in loader:
        found.extend(stage.answers(stage.transfer_batch_to_device(batch, stage.device, 0)))
    return gather_predictions(found)


def _frame(stage: Any) -> tuple[str, str]:
    """What the template writes before and after the words of a user: the same around every prompt, so not shown."""
    words = "words of the user"
    asked = Conversation((Message("user", words),))
    text = "".join(segment.text for segment in prompt_segments(asked, stage.data.template, stage.data.tokenizer))
    start, _, end = text.partition(words)
    return start, end


def _shown(text: str, limit: int = 60) -> str:
    from rich.markup import escape

    line = text.strip().replace("\n", "\\n")
    return escape(line if len(line) <= limit else "…" + line[1 - limit :])
