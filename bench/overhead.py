"""What a step costs beside its mathematics: `Trainer.fit` with the SFT stage against a bare PyTorch loop.

After each step of ours a callback makes the bare step with a twin of the model on the same micro-batches, so that a
slow minute of the machine slows both; both must report the same loss. It also collates the micro-batches of the step
once more by itself, so that what the data costs can be told apart.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from log_probs import spread

from lf_lightning import SFT, AdamW, BackboneSpec, DataModule, Full, ScheduleSpec
from lf_lightning.console import quiet_libraries
from lf_lightning.losses.log_probs import cross_entropy_sums
from lf_lightning.models import Backbone, load_backbone
from lf_lightning.optim import describe
from lf_lightning.types import IGNORE, StepBatch

RESULTS = Path(__file__).parent / "results" / "overhead.md"
COLUMNS = [
    "log_every_n_steps",
    "blocks",
    "time",
    "`Trainer.fit`, ms",
    "bare loop, ms",
    "difference, ms",
    "of it data, ms",
]
PAGE = """# What Lightning and the step contract cost

    {command}

Milliseconds per optimizer step. Llama, hidden size {hidden}, {layers} layers, over bytes;
{micro_batches} micro-batches of {rows} rows a step, padding-free, AdamW, clipping, float32; the same loss at every
logged step. A block is {block} steps of each, one after the other in turn, logging included; median (smallest-largest)
over blocks, differences taken inside a block. The machine is shared: CPU time is disturbed less than the clock, and the
difference hardly depends on the model. Data: layout and collation of a step.
Python {python}, torch {torch} ({capability}), transformers {transformers}, lightning {lightning}, {threads} threads.

{table}
"""


class Block(NamedTuple):
    """Milliseconds per step of a number of steps."""

    ours: float
    bare: float
    data: float


def now() -> tuple[float, float]:
    """The clock, and the CPU time of this process."""
    return time.perf_counter(), time.process_time()


class BareBeside(Callback):
    """After each step make the bare step on the same micro-batches, and time both."""

    def __init__(self, model: Backbone, data: DataModule, arguments: argparse.Namespace, *, deadline: float) -> None:
        self.model, self.data, self.arguments, self.deadline = model, data, arguments, deadline
        self.optimizer = AdamW().build(describe(model))
        self.schedule = ScheduleSpec("constant").build(self.optimizer, arguments.steps)
        self.blocks: list[tuple[Block, Block]] = []  # on the clock, in CPU time
        self.sums = np.zeros((2, 3))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the first step of ours; our own loader goes along."""
        self.loader: Iterator[StepBatch] = iter(self.data.train_dataloader())
        self.start = now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ours has lasted since this callback was left."""
        times = [self.start, now()]
        loss = bare_step(self.model, self.optimizer, batch)
        self.schedule.step()
        times.append(now())
        next(self.loader)
        times.append(now())
        self.sums += 1000 * np.diff(np.array(times), axis=0).T
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]  # a plain attribute of Trainer
            ours = float(trainer.callback_metrics["train/loss"])
            assert abs(ours - loss.item()) < 1e-4, f"step {step}: loss of ours {ours}, bare {loss.item()}"
        if step % self.arguments.block == 0:
            clock, cpu = self.sums / self.arguments.block
            self.blocks.append((Block(*clock), Block(*cpu)))
            print(*self.blocks[-1], file=sys.stderr, flush=True)
            self.sums = np.zeros((2, 3))
            trainer.should_stop = time.perf_counter() > self.deadline
        self.start = now()


def bare_step(backbone: Backbone, optimizer: torch.optim.Optimizer, step: StepBatch) -> torch.Tensor:
    """The mathematics of a step and nothing else; returns the loss."""
    count = sum(int((micro_batch.targets != IGNORE).sum()) for micro_batch in step.micro_batches)
    total = torch.zeros(())
    for micro_batch in step.micro_batches:
        loss = backbone(micro_batch, kernel=cross_entropy_sums).nll / count
        loss.backward()
        total += loss.detach()
    torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def write_rows(path: Path, num_rows: int) -> None:
    """Write rows of mixed lengths, 20 to 60 tokens."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    rows = []
    for length in random.integers(10, 30, num_rows):
        text = "".join(random.choice(letters, 2 * length))
        rows.append({"instruction": text[:length], "output": text[length:]})
    path.write_text(json.dumps(rows), encoding="utf-8")


def make_spec(arguments: argparse.Namespace) -> BackboneSpec:
    """A Llama with random weights over bytes."""
    architecture = {
        "model_type": "llama",
        "hidden_size": arguments.hidden,
        "intermediate_size": 2 * arguments.hidden,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    return BackboneSpec(architecture=architecture, tokenizer="bytes", dtype="float32")


def make_data(spec: BackboneSpec, path: Path, arguments: argparse.Namespace) -> DataModule:
    """The rows in the order of the file: one epoch is the run."""
    return DataModule(
        spec,
        "sft",
        datasets=[{"path": str(path)}],
        template="empty",
        max_length=128,
        global_batch_size=arguments.rows * arguments.micro_batches,
        micro_batch_size=arguments.rows,
        layout="padding_free",
        shuffle=False,
        cache_dir=None,
    )


def measure(arguments: argparse.Namespace, log_every: int, folder: Path) -> list[tuple[Block, Block]]:
    """One `Trainer.fit` with everything that a run has; the first block warms up."""
    spec = make_spec(arguments)
    write_rows(folder / "rows.json", arguments.steps * arguments.rows * arguments.micro_batches)
    data = make_data(spec, folder / "rows.json", arguments)
    twin = load_backbone(spec, Full(), vocab_size=len(data.tokenizer), seed=0)
    twin.set_layout("padding_free")
    deadline = time.perf_counter() + 60 * arguments.minutes / len(arguments.log_every)
    beside = BareBeside(twin, data, arguments, deadline=deadline)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        log_every_n_steps=log_every,
        callbacks=[beside],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder / "run",
    )
    trainer.fit(SFT(spec, Full(), AdamW(), ScheduleSpec("constant")), data)
    return beside.blocks[1:]


def rows_of_table(log_every: int, blocks: list[tuple[Block, Block]]) -> list[str]:
    """Two rows of the table: on the clock and in CPU time."""
    rows = []
    for index, title in enumerate(("clock", "CPU")):
        taken = [block[index] for block in blocks]
        columns = [[block.ours for block in taken], [block.bare for block in taken]]
        columns += [[block.ours - block.bare for block in taken], [block.data for block in taken]]
        cells = [str(log_every), str(len(taken)), title, *(spread(column, "{:.2f}".format) for column in columns)]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """Parse the command line, measure, write the page."""
    parser = argparse.ArgumentParser(description="Our Lightning step against a bare PyTorch loop.")
    parser.add_argument("--hidden", type=int, default=32, help="hidden size")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model")
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=1050, help="optimizer steps of each way, at most")
    parser.add_argument("--block", type=int, default=50, help="steps of a block; the first block warms up")
    parser.add_argument("--log_every", type=int, nargs="+", default=[50, 1], help="values of log_every_n_steps")
    parser.add_argument("--minutes", type=float, default=5.0, help="no block is begun after this")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    seed_everything(0, verbose=False)
    rows = []
    for log_every in arguments.log_every:
        with TemporaryDirectory() as folder:
            rows += rows_of_table(log_every, measure(arguments, log_every, Path(folder)))
    text = PAGE.format(
        **vars(arguments),
        command=" ".join(["python bench/overhead.py", *sys.argv[1:]]),
        python=platform.python_version(),
        capability=torch.backends.cpu.get_cpu_capability(),
        table="\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *rows]),
        **{name: version(name) for name in ("torch", "transformers", "lightning")},
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
