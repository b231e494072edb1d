"""What a step costs beside its mathematics: `Trainer.fit` with the SFT stage against a bare PyTorch loop.

All train the same tiny model on the same micro-batches and must end at the same loss. The bare loop is written out once
over micro-batches that lie ready and once over our loader, so that what the data costs can be told apart. A round runs
every way back to back in one process, and the order changes from round to round, so that a slow minute of the machine
slows all of them.
"""

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from log_probs import spread

from lf_lightning import SFT, AdamW, BackboneSpec, DataModule, Full, ScheduleSpec
from lf_lightning.cli import quiet_libraries
from lf_lightning.losses.log_probs import cross_entropy_sums
from lf_lightning.models import Backbone, load_backbone
from lf_lightning.types import IGNORE, StepBatch

RESULTS = Path(__file__).parent / "results" / "overhead.md"
READY = "bare loop, micro-batches ready"
LOADED = "bare loop, our loader"
SCHEDULE = ScheduleSpec("constant")
COLUMNS = ["way", "rounds", "ms a step", "above the bare loop, ms", "of which data, ms"]
PAGE = """# What Lightning and the step contract cost

    {command}

Llama, hidden size {hidden}, {layers} layers, bytes; {micro_batches} micro-batches of {size} rows a step, padding-free, AdamW, clipping,
float32. Each way makes {steps} steps in every round, the first {warm_up} of them not timed; all end at the same loss.
Median (smallest-largest) over rounds, differences taken inside a round; the machine is shared, so read the
differences: they hardly depend on the model. Data: the bare loop over our loader less the one over micro-batches that
lie ready.
Python {python}, torch {torch} ({capability}), transformers {transformers}, lightning {lightning}, {threads} threads.

{table}
"""


class Timed(NamedTuple):
    """What one way reports of one round."""

    milliseconds: float  # a step
    loss: float  # of the last step


class Clock(Callback):
    """Time from the end of the last step that is not timed to the end of the run."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.start = self.end = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock where it starts; `on_train_end` comes too late, when the weights are saved."""
        if trainer.global_step == self.warm_up:
            self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the clock after the last step and all that callbacks did of it."""
        self.end = time.perf_counter()


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


def fitted(spec: BackboneSpec, data: DataModule, log_every: int, arguments: argparse.Namespace) -> Timed:
    """`Trainer.fit` with everything that a run has, in a folder of its own."""
    clock = Clock(arguments.warm_up)
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            log_every_n_steps=log_every,
            callbacks=[clock],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(SFT(spec, Full(), AdamW(), SCHEDULE), data)
    milliseconds = 1000 * (clock.end - clock.start) / (arguments.steps - arguments.warm_up)
    return Timed(milliseconds, float(trainer.callback_metrics["train/loss"]))


def bare(spec: BackboneSpec, steps: Iterable[StepBatch], vocab_size: int, arguments: argparse.Namespace) -> Timed:
    """The same mathematics and nothing else."""
    backbone = load_backbone(spec, Full(), vocab_size=vocab_size, seed=0)
    backbone.set_layout("padding_free")
    optimizer = AdamW().build(backbone.named_parameters())
    schedule = SCHEDULE.build(optimizer, arguments.steps)
    start, loss = 0.0, torch.zeros(())
    for number, step in enumerate(steps):
        if number == arguments.warm_up:
            start = time.perf_counter()
        loss = bare_step(backbone, step)
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    milliseconds = 1000 * (time.perf_counter() - start) / (arguments.steps - arguments.warm_up)
    return Timed(milliseconds, loss.item())


def bare_step(backbone: Backbone, step: StepBatch) -> torch.Tensor:
    """Forward and backward of every micro-batch; returns the loss of the step."""
    count = sum(int((micro_batch.targets != IGNORE).sum()) for micro_batch in step.micro_batches)
    total = torch.zeros(())
    for micro_batch in step.micro_batches:
        loss = backbone(micro_batch, kernel=cross_entropy_sums).nll / count
        loss.backward()
        total += loss.detach()
    return total


def measure(arguments: argparse.Namespace, path: Path) -> dict[str, list[Timed]]:
    """Rounds of all ways; none is begun that would outlast the time."""
    spec = make_spec(arguments)
    write_rows(path, arguments.steps * arguments.rows * arguments.micro_batches)
    data = make_data(spec, path, arguments)
    ready, vocab_size = list(data.train_dataloader()), len(data.tokenizer)
    ways: dict[str, Callable[[], Timed]] = {
        READY: lambda: bare(spec, ready, vocab_size, arguments),
        LOADED: lambda: bare(spec, data.train_dataloader(), vocab_size, arguments),
    }
    for every in arguments.log_every:
        ways[f"`Trainer.fit`, log_every_n_steps={every}"] = lambda every=every: fitted(spec, data, every, arguments)
    found: dict[str, list[Timed]] = {name: [] for name in ways}
    begin, longest = time.perf_counter(), 0.0
    for number in range(arguments.rounds):
        start = time.perf_counter()
        if start - begin + longest > 60 * arguments.minutes:
            break
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            found[name].append(ways[name]())
            assert abs(found[name][-1].loss - found[READY][0].loss) < 1e-5, f"{name}: {found}"
        longest = max(longest, time.perf_counter() - start)
        print({name: timed[-1] for name, timed in found.items()}, file=sys.stderr, flush=True)
    return found


def row(name: str, found: dict[str, list[Timed]]) -> str:
    """One row of the table."""

    def above(base: str) -> list[float]:
        pairs = zip(found[name], found[base], strict=True)
        return [timed.milliseconds - bare.milliseconds for timed, bare in pairs]

    data = [loaded.milliseconds - ready.milliseconds for loaded, ready in zip(found[LOADED], found[READY], strict=True)]
    text = "{:.2f}".format
    cells = [name, str(len(found[name])), spread([timed.milliseconds for timed in found[name]], text)]
    cells += ["-", "-"] if name == READY else [spread(above(READY), text), spread(data, text)]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Parse the command line, measure, write the page."""
    parser = argparse.ArgumentParser(description="Our Lightning step against a bare PyTorch loop.")
    parser.add_argument("--hidden", type=int, default=32, help="hidden size")
    parser.add_argument("--layers", type=int, default=2, help="blocks of the model")
    parser.add_argument("--rows", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--micro_batches", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--steps", type=int, default=350, help="optimizer steps of each way in a round")
    parser.add_argument("--warm_up", type=int, default=50, help="first steps that are not timed")
    parser.add_argument("--log_every", type=int, nargs="+", default=[50, 1], help="values of log_every_n_steps")
    parser.add_argument("--rounds", type=int, default=11, help="rounds, at most")
    parser.add_argument("--minutes", type=float, default=6.0, help="no round is begun that would end after this")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.captureWarnings(capture=True)
    quiet_libraries()
    seed_everything(0, verbose=False)
    with TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder) / "rows.json")
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *(row(name, found) for name in found)]
    text = PAGE.format(
        command=" ".join(["python bench/overhead.py", *sys.argv[1:]]),
        size=arguments.rows,
        python=platform.python_version(),
        capability=torch.backends.cpu.get_cpu_capability(),
        table="\n".join(table),
        **{name: version(name) for name in ("torch", "transformers", "lightning")},
        **{
            name: vars(arguments)[name] for name in ("hidden", "layers", "micro_batches", "steps", "warm_up", "threads")
        },
    )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
