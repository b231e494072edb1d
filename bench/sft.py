"""A step of supervised fine-tuning against the plain padded step, paired and interleaved: tokens per second and memory.

Ours is `Trainer.fit` with the SFT stage and the DataModule, padding-free. The plain step is what one writes first:
rows padded on the right to the longest of the micro-batch, all logits, transformers' own loss. Both train the same
model on the same rows, and must report the same loss and the same norm of the gradient.

Every measurement is a process of its own: it makes one small step, and measures the second. A round runs every way back
to back on rows of its own, and the order changes from round to round, so that a slow minute of the machine slows all of
them. Linux only (/proc).
"""

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from log_probs import memory_mib, spread
from torch import Tensor

from lf_lightning import SFT, AdamW, BackboneSpec, DataModule, Full, ScheduleSpec
from lf_lightning.cli import quiet_libraries
from lf_lightning.models import load_backbone
from lf_lightning.types import IGNORE

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "sft.md"
OURS = 0
"""Stands for our step where others give the rows of a plain micro-batch."""
COLUMNS = ["words", "plain rows", "pairs", "tokens/s, ours / plain", "the same in CPU time"]
COLUMNS += ["plain MiB", "our MiB", "our / plain memory"]
PAGE = """# A training step against the plain padded step

    {command}

{model}. {rows} rows a step, {tokens} tokens, of which {masked} are
masked; lengths log-normal, so that {padding} of what the plain step computes in micro-batches of {first} is padding. Ours:
`Trainer.fit`, SFT, `layout: padding_free`, `micro_batch_size: {size}`. Plain: right padding, all logits, transformers' loss,
micro-batches of so many rows in the order of the data. Both: AdamW, clipping, float32; loss and norm of the gradient
agree to 1e-4.

Ratios of non-padding tokens per second; above 1 ours is faster. MiB: peak above weights, gradients and state of the
optimizer. Median (smallest-largest) over pairs; each run is a fresh process, the machine is shared.
Python {python}, torch {torch} ({capability}), transformers {transformers}, lightning {lightning}, {threads} threads.

{table}
"""


class Work(NamedTuple):
    """What one process measures."""

    words: int  # vocabulary
    rows: int  # of a micro-batch of the plain step, or OURS
    number: int  # of the round: the seed of the rows


class Measured(NamedTuple):
    """What one process reports of the second step."""

    seconds: float  # on the clock
    cpu_seconds: float  # of all threads: a busy machine disturbs it less
    extra_mib: float  # peak above weights, gradients and state of the optimizer
    loss: float  # the ways must agree
    grad_norm: float
    num_parameters: int
    num_tokens: int
    num_masked: int  # tokens that are not learned
    num_computed: int  # tokens and padding


class Meter:
    """Time and peak memory between `start` and `stop`."""

    def start(self, gradient_mib: float) -> None:
        """Begin; `gradient_mib` is what the gradients will take, which are not there at this moment."""
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins at what is held now
        self._before = memory_mib("VmRSS") + gradient_mib
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def stop(self) -> tuple[float, float, float]:
        """Seconds, CPU seconds, and the peak in MiB above what was held at the start."""
        seconds, cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu_start
        return seconds, cpu_seconds, memory_mib("VmHWM") - self._before


class MeterSecondStep(Callback):
    """Measure from the end of the first step to the end of the second."""

    def __init__(self) -> None:
        self.meter = Meter()
        self.found = (0.0, 0.0, 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start or stop the meter."""
        if trainer.global_step == 1:
            self.meter.start(gradient_mib(pl_module))
        else:
            self.found = self.meter.stop()


def gradient_mib(model: torch.nn.Module) -> float:
    """What the gradients of a model take."""
    return sum(parameter.nbytes for parameter in model.parameters()) / MIB


def write_rows(path: Path, arguments: argparse.Namespace, number: int) -> None:
    """Write the rows of two steps: short ones, then the ones that are measured."""
    random = np.random.default_rng(number)
    deviation = arguments.deviation
    lengths = random.lognormal(np.log(arguments.mean_length) - deviation**2 / 2, deviation, arguments.rows)
    lengths = np.concatenate([np.full(arguments.rows, 24), np.clip(lengths, 24, arguments.max_length)])
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))

    def text(length: float) -> str:
        return "".join(random.choice(letters, max(1, round(length))))

    share = arguments.masked_share
    rows = [{"instruction": text(share * length), "output": text((1 - share) * length)} for length in lengths]
    path.write_text(json.dumps(rows), encoding="utf-8")


def make_spec(words: int, arguments: argparse.Namespace) -> BackboneSpec:
    """The model: a Llama with random weights, its embedding tied to its output layer."""
    architecture = {
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 11 // 4,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "tie_word_embeddings": True,
    }
    return BackboneSpec(architecture=architecture, tokenizer="bytes", dtype="float32")


def make_data(spec: BackboneSpec, path: Path, arguments: argparse.Namespace) -> DataModule:
    """The rows in the order of the file, in micro-batches of as many rows as the first plain step has."""
    return DataModule(
        spec,
        "sft",
        datasets=[{"path": str(path)}],
        template="empty",
        max_length=2 * arguments.max_length,
        global_batch_size=arguments.rows,
        micro_batch_size=arguments.plain_rows[0],
        layout="padding_free",
        shuffle=False,
        cache_dir=None,
    )


def measure_ours(spec: BackboneSpec, data: DataModule, folder: Path) -> tuple[tuple[float, float, float], float, float]:
    """Run two steps of `Trainer.fit`: what the meter found, loss, norm of the gradient."""
    meter = MeterSecondStep()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        logger=False,
        log_every_n_steps=1,
        callbacks=[meter],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(SFT(spec, Full(), AdamW(), ScheduleSpec("constant")), data)
    values = trainer.callback_metrics
    return meter.found, float(values["train/loss"]), float(values["train/grad_norm"])


def padded(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Input ids, labels and mask of rows, padded on the right."""
    ids, labels = zip(*rows, strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=IGNORE),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
    }


def plain_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[tuple[Tensor, Tensor]], size: int
) -> tuple[float, float]:
    """One optimizer step as one writes it first: loss and norm of the gradient."""
    num_targets = sum(int((labels[1:] != IGNORE).sum()) for _, labels in rows)
    total = 0.0
    for start in range(0, len(rows), size):
        loss = model(**padded(rows[start : start + size]), num_items_in_batch=num_targets, use_cache=False).loss
        loss.backward()
        total += loss.item()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, float(grad_norm)


def measure_plain(
    spec: BackboneSpec, rows: Sequence[tuple[Tensor, Tensor]], size: int
) -> tuple[tuple[float, float, float], float, float]:
    """Run two plain steps, the first of them on the first half of the rows; returns as `measure_ours`."""
    backbone = load_backbone(spec, Full(), vocab_size=1, seed=0)
    model, meter = backbone.causal_lm, Meter()
    optimizer = AdamW().build(backbone.named_parameters())
    half = len(rows) // 2
    plain_step(model, optimizer, rows[:half], size)
    meter.start(gradient_mib(model))
    loss, grad_norm = plain_step(model, optimizer, rows[half:], size)
    return meter.stop(), loss, grad_norm


def measure(work: Work, arguments: argparse.Namespace) -> Measured:
    """Measure one way, in this process."""
    quiet_libraries()
    seed_everything(0, verbose=False)
    spec = make_spec(work.words, arguments)
    with TemporaryDirectory() as name:
        path = Path(name) / "rows.json"
        write_rows(path, arguments, work.number)
        data = make_data(spec, path, arguments)
        store = data.sets["train"].store
        rows = [tuple(torch.from_numpy(part).long() for part in store.document(index)) for index in range(len(store))]
        pairs = [(ids, labels) for ids, labels in rows]
        if work.rows == OURS:
            found, loss, grad_norm = measure_ours(spec, data, Path(name) / "run")
        else:
            found, loss, grad_norm = measure_plain(spec, pairs, work.rows)
    measured = pairs[len(pairs) // 2 :]
    lengths = [len(ids) for ids, _ in measured]
    size = work.rows or 1
    return Measured(
        *found,
        loss,
        grad_norm,
        num_parameters=load_backbone(spec, Full(), vocab_size=1, seed=0, device=torch.device("meta")).num_parameters()[1],
        num_tokens=sum(lengths),
        num_masked=sum(int((labels == IGNORE).sum()) for _, labels in measured),
        num_computed=sum(size * max(lengths[start : start + size]) for start in range(0, len(lengths), size)),
    )


def in_a_process(work: Work) -> Measured:
    """Measure in a fresh process, with the options of this one."""
    options = [*sys.argv[1:], "--child", json.dumps([*work])]
    printed = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
    return Measured(*json.loads(printed.splitlines()[-1]))


def agree(left: Measured, right: Measured) -> bool:
    """Whether two ways made the same step."""
    return all(
        abs(one - other) <= 1e-4 * abs(other)
        for one, other in ((left.loss, right.loss), (left.grad_norm, right.grad_norm))
    )


Round = dict[int, Measured]
"""Rows of a plain micro-batch, or OURS -> what was measured."""


def measure_all(arguments: argparse.Namespace) -> dict[int, list[Round]]:
    """Rounds of each vocabulary; a round that would outlast the time is left out."""
    rounds: dict[int, list[Round]] = {words: [] for words in arguments.words}
    seconds = dict.fromkeys(rounds, 0.0)
    begin = time.perf_counter()
    for number in range(arguments.rounds):
        for words, found in rounds.items():
            start = time.perf_counter()
            if start - begin + seconds[words] > 60 * arguments.minutes:
                continue
            ways = [OURS, *arguments.plain_rows]
            order = ways if number % 2 == 0 else ways[::-1]
            taken = {rows: in_a_process(Work(words, rows, number)) for rows in order}
            for rows in arguments.plain_rows:
                assert agree(taken[rows], taken[OURS]), f"plain {taken[rows]}, ours {taken[OURS]}"
            found.append(taken)
            seconds[words] = time.perf_counter() - start
            print(f"{words}: {taken}", file=sys.stderr, flush=True)
    return rounds


def row(words: int, rows: int, rounds: list[Round]) -> str:
    """One row of the table."""
    pairs = [(taken[rows], taken[OURS]) for taken in rounds]
    cells = [
        *(f"{words:,}", str(rows), str(len(pairs))),
        spread([plain.seconds / ours.seconds for plain, ours in pairs], "{:.2f}".format),
        spread([plain.cpu_seconds / ours.cpu_seconds for plain, ours in pairs], "{:.2f}".format),
        spread([plain.extra_mib for plain, _ in pairs], "{:,.0f}".format),
        spread([ours.extra_mib for _, ours in pairs], "{:,.0f}".format),
        spread([ours.extra_mib / plain.extra_mib for plain, ours in pairs], "{:.2f}".format),
    ]
    return "| " + " | ".join(cells) + " |"


def page(arguments: argparse.Namespace, rounds: dict[int, list[Round]]) -> str:
    """The whole page of results."""
    first = [taken[arguments.plain_rows[0]] for found in rounds.values() for taken in found]
    sizes = {words: found[0][OURS].num_parameters / 1e6 for words, found in rounds.items() if found}
    millions = " and ".join(f"{size:.0f}M parameters at {words:,} words" for words, size in sizes.items())
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    table += [row(words, rows, found) for words, found in rounds.items() for rows in arguments.plain_rows if found]
    return PAGE.format(
        command=" ".join(["python bench/sft.py", *sys.argv[1:]]),
        model=f"Llama, hidden size {arguments.hidden}, {arguments.layers} layers, tied embedding: {millions}",
        rows=arguments.rows,
        tokens=spread([float(found.num_tokens) for found in first], "{:,.0f}".format),
        masked=f"{100 * statistics.median(found.num_masked / found.num_tokens for found in first):.0f} %",
        padding=f"{100 * statistics.median(1 - found.num_tokens / found.num_computed for found in first):.0f} %",
        first=arguments.plain_rows[0],
        size=arguments.plain_rows[0],
        python=platform.python_version(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=arguments.threads,
        table="\n".join(table),
        **{name: version(name) for name in ("torch", "transformers", "lightning")},
    )


def main() -> None:
    """Parse the command line; a child measures once, the parent starts children."""
    parser = argparse.ArgumentParser(description="A training step of ours against the plain padded step.")
    parser.add_argument("--words", type=int, nargs="+", default=[32768, 131072], help="sizes of the vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model")
    parser.add_argument("--rows", type=int, default=16, help="rows of an optimizer step")
    parser.add_argument("--plain_rows", type=int, nargs="+", default=[4], help="rows of a plain micro-batch")
    parser.add_argument("--mean_length", type=float, default=270.0, help="tokens of a row, on average")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a row, at most")
    parser.add_argument("--deviation", type=float, default=0.75, help="standard deviation of the log of the lengths")
    parser.add_argument("--masked_share", type=float, default=0.7, help="share of the tokens that are not learned")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of each row of the table, at most")
    parser.add_argument("--minutes", type=float, default=7.0, help="no pair is begun that would end after this")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(Work(*json.loads(arguments.child)), arguments)))
        return
    text = page(arguments, measure_all(arguments))
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
