"""A step of supervised fine-tuning against the plain padded step: tokens per second and memory.

Ours is `Trainer.fit` with the SFT stage and the DataModule, padding-free. The plain step is what one writes first:
rows padded on the right to the longest of the micro-batch, all logits, transformers' own loss. Both train the same
model on the same rows, and must report the same loss and the same norm of the gradient.

Speed is taken in one process: after each step of ours a twin of the model makes the plain step on the same rows, so
that a slow minute of the machine slows both. Memory is taken in a process for each way, which makes one small step and
measures the second. Linux only (/proc).
"""

import argparse
import ctypes
import json
import platform
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
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lf_lightning import SFT, AdamW, BackboneSpec, DataModule, Full, ScheduleSpec
from lf_lightning.console import quiet_libraries
from lf_lightning.models import Backbone, load_backbone
from lf_lightning.optim import describe
from lf_lightning.types import IGNORE

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "sft.md"
COLUMNS = ["words", "parameters", "steps", "tokens/s, ours / plain", "the same in CPU time"]
COLUMNS += ["runs", "plain MiB", "our MiB", "our / plain memory"]
PAGE = """# A training step against the plain padded step

    {command}

Llama, hidden size {hidden}, {layers} layers, tied embedding. {rows} rows a step; lengths log-normal,
{mean_length:.0f} tokens on average, deviation of the logarithm {deviation}, at most {max_length};
{masked_share:.0%} masked. Ours: `Trainer.fit`, SFT, `layout: padding_free`, `micro_batch_size: {our_rows}`.
Plain: micro-batches of {plain_rows} rows in the order of the data, padded on the right
({padding} of what it computes is padding), all logits, transformers' loss.
Both: AdamW, clipping, float32; loss and norm of the gradient agree to 1e-3 at every step.

Tokens per second: of tokens that are not padding; above 1 ours is faster. MiB: peak above weights, gradients and state
of the optimizer. Median (smallest-largest) over steps and over runs; the machine is shared.
Python {python}, torch {torch} ({capability}), transformers {transformers}, lightning {lightning}, {threads} threads.

{table}
"""
Row = tuple[Tensor, Tensor]
"""Input ids and labels of a row, both (length,)."""


class Pair(NamedTuple):
    """A step of ours and the plain step on the same rows."""

    our_seconds: float
    our_cpu_seconds: float  # of all threads: a busy machine disturbs it less
    plain_seconds: float
    plain_cpu_seconds: float


def now() -> tuple[float, float]:
    """The clock, and the CPU time of this process."""
    return time.perf_counter(), time.process_time()


class PlainBeside(Callback):
    """After each step make the plain step on the same rows, with a twin of the model; the first pair is not kept."""

    def __init__(self, model: Backbone, rows: Sequence[Row], arguments: argparse.Namespace, *, seconds: float) -> None:
        self.model, self.rows, self.arguments = model, rows, arguments
        self.optimizer = AdamW().build(describe(model))
        self.deadline = time.perf_counter() + seconds
        self.pairs: list[Pair] = []
        self.start = now()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ours has lasted since the end of the last plain step."""
        middle = now()
        rows = self.rows[batch_idx * self.arguments.rows :][: self.arguments.rows]
        plain = plain_step(self.model.causal_lm, self.optimizer, rows, self.arguments.plain_rows)
        end = now()
        values = trainer.callback_metrics
        ours = float(values["train/loss"]), float(values["train/grad_norm"])
        assert np.allclose(ours, plain, rtol=1e-3), f"loss and norm: ours {ours}, plain {plain}"
        if batch_idx > 0:
            seconds, cpu_seconds = (middle[index] - self.start[index] for index in (0, 1))
            self.pairs.append(Pair(seconds, cpu_seconds, end[0] - middle[0], end[1] - middle[1]))
            print(self.pairs[-1], file=sys.stderr, flush=True)
            trainer.should_stop = end[0] + (end[0] - self.start[0]) > self.deadline
        self.start = now()


class PeakOfSecondStep(Callback):
    """Measure memory from the end of the first step to the end of the second."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin or end."""
        if batch_idx == 0:
            self.before = held_mib(pl_module)
        else:
            self.extra_mib = memory_mib("VmHWM") - self.before


def held_mib(model: torch.nn.Module) -> float:
    """What is held between two steps, and the gradients, which are not there then; the peak begins anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory_mib("VmRSS") + sum(parameter.nbytes for parameter in model.parameters()) / MIB


def lengths_of(arguments: argparse.Namespace, number: int) -> NDArray[np.float64]:
    """Lengths of the rows of the first step, which are short, and of the steps that are measured."""
    deviation, count = arguments.deviation, arguments.rows * arguments.steps
    centre = np.log(arguments.mean_length) - deviation**2 / 2
    lengths = np.random.default_rng(number).lognormal(centre, deviation, count)
    return np.concatenate([np.full(arguments.rows, 24.0), np.clip(lengths, 24, arguments.max_length)])


def write_rows(path: Path, arguments: argparse.Namespace, number: int) -> None:
    """Write rows of random letters; a letter is a token."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))

    def text(length: float) -> str:
        return "".join(random.choice(letters, max(1, round(length))))

    share = arguments.masked_share
    lengths = lengths_of(arguments, number)
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
    """The rows in the order of the file."""
    return DataModule(
        spec,
        "sft",
        datasets=[{"path": str(path)}],
        template="empty",
        max_length=2 * arguments.max_length,
        global_batch_size=arguments.rows,
        micro_batch_size=arguments.our_rows,
        layout="padding_free",
        shuffle=False,
        cache_dir=None,
    )


def rows_of(data: DataModule) -> list[Row]:
    """The encoded rows, in the order of the data."""
    store = data.sets["train"].store
    documents = [store.document(index) for index in range(len(store))]
    return [(torch.from_numpy(ids).long(), torch.from_numpy(labels).long()) for ids, labels in documents]


def fit(spec: BackboneSpec, data: DataModule, folder: Path, callback: Callback) -> None:
    """One epoch of ours."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        log_every_n_steps=1,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(SFT(spec, Full(), AdamW(), ScheduleSpec("constant")), data)


def padded(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Input ids, labels and mask of rows, padded on the right."""
    return {
        "input_ids": pad_sequence([ids for ids, _ in rows], batch_first=True),
        "labels": pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORE),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True),
    }


def plain_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[Row], size: int
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


def measure_time(arguments: argparse.Namespace, words: int, seconds: float) -> list[Any]:
    """Steps of ours, each beside the plain one, in this process; the number of parameters comes first."""
    spec = make_spec(words, arguments)
    with TemporaryDirectory() as name:
        write_rows(Path(name) / "rows.json", arguments, 0)
        data = make_data(spec, Path(name) / "rows.json", arguments)
        twin = load_backbone(spec, Full(), vocab_size=1, seed=0)
        beside = PlainBeside(twin, rows_of(data), arguments, seconds=seconds)
        fit(spec, data, Path(name) / "run", beside)
    return [twin.num_parameters()[1], *beside.pairs]


def measure_memory(arguments: argparse.Namespace, words: int, number: int, way: str) -> float:
    """Peak of the second of two steps of one way, in MiB above weights, gradients and state of the optimizer."""
    spec = make_spec(words, arguments)
    arguments.steps = 1
    with TemporaryDirectory() as name:
        write_rows(Path(name) / "rows.json", arguments, number)
        data = make_data(spec, Path(name) / "rows.json", arguments)
        if way == "ours":
            peak = PeakOfSecondStep()
            fit(spec, data, Path(name) / "run", peak)
            return peak.extra_mib
        rows = rows_of(data)
    backbone = load_backbone(spec, Full(), vocab_size=1, seed=0)
    optimizer = AdamW().build(describe(backbone))
    plain_step(backbone.causal_lm, optimizer, rows[: arguments.rows], arguments.plain_rows)
    before = held_mib(backbone)
    plain_step(backbone.causal_lm, optimizer, rows[arguments.rows :], arguments.plain_rows)
    return memory_mib("VmHWM") - before


def in_a_process(*task: str | float) -> Any:
    """Measure in a fresh process, with the options of this one."""
    options = [*sys.argv[1:], "--child", json.dumps(task)]
    printed = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def measure_peaks(words: int, number: int) -> tuple[float, float]:
    """Memory of the plain way and of ours, on the same rows, in MiB."""
    plain, ours = (float(in_a_process("memory", words, number, way)) for way in ("plain", "ours"))
    print(f"{words}: plain {plain:.0f} MiB, ours {ours:.0f} MiB", file=sys.stderr, flush=True)
    return plain, ours


def row(words: int, num_parameters: int, peaks: list[tuple[float, float]], pairs: list[Pair]) -> str:
    """One row of the table."""
    cells = [
        *(f"{words:,}", f"{num_parameters / 1e6:.0f}M", str(len(pairs))),
        spread([pair.plain_seconds / pair.our_seconds for pair in pairs], "{:.2f}".format),
        spread([pair.plain_cpu_seconds / pair.our_cpu_seconds for pair in pairs], "{:.2f}".format),
        str(len(peaks)),
        spread([plain for plain, _ in peaks], "{:,.0f}".format),
        spread([ours for _, ours in peaks], "{:,.0f}".format),
        spread([ours / plain for plain, ours in peaks], "{:.2f}".format),
    ]
    return "| " + " | ".join(cells) + " |"


def padding_share(arguments: argparse.Namespace, num_steps: int) -> float:
    """Share of padding in what the plain way computes in the timed steps."""
    lengths = lengths_of(arguments, 0)[arguments.rows :][: num_steps * arguments.rows]
    widest = np.maximum.reduceat(lengths, range(0, len(lengths), arguments.plain_rows))
    return float(1 - lengths.sum() / (arguments.plain_rows * widest.sum()))


def measure_all(arguments: argparse.Namespace) -> str:
    """The whole page of results; memory first, then speed in the time that is left."""
    begin = time.perf_counter()
    peaks = {words: [measure_peaks(words, number) for number in range(arguments.runs)] for words in arguments.words}
    rows, num_steps = [], 0
    for index, words in enumerate(arguments.words):
        left = 60 * arguments.minutes - (time.perf_counter() - begin)
        num_parameters, *pairs = in_a_process("time", words, left / (len(arguments.words) - index))
        rows.append(row(words, num_parameters, peaks[words], [Pair(*pair) for pair in pairs]))
        num_steps = max(num_steps, len(pairs))
    return PAGE.format(
        **vars(arguments),
        command=" ".join(["python bench/sft.py", *sys.argv[1:]]),
        padding=f"{padding_share(arguments, num_steps):.0%}",
        python=platform.python_version(),
        capability=torch.backends.cpu.get_cpu_capability(),
        table="\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *rows]),
        **{name: version(name) for name in ("torch", "transformers", "lightning")},
    )


def child(arguments: argparse.Namespace) -> Any:
    """Do what the parent asks for."""
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    seed_everything(0, verbose=False)
    kind, *task = json.loads(arguments.child)
    return (measure_time if kind == "time" else measure_memory)(arguments, *task)


def main() -> None:
    """Parse the command line; children measure, the parent starts them and writes the page."""
    parser = argparse.ArgumentParser(description="A training step of ours against the plain padded step.")
    parser.add_argument("--words", type=int, nargs="+", default=[32768, 131072], help="sizes of the vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model")
    parser.add_argument("--rows", type=int, default=8, help="rows of an optimizer step")
    parser.add_argument("--our_rows", type=int, default=4, help="rows of a micro-batch of ours")
    parser.add_argument("--plain_rows", type=int, default=4, help="rows of a micro-batch of the plain step")
    parser.add_argument("--mean_length", type=float, default=270.0, help="tokens of a row, on average")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a row, at most")
    parser.add_argument("--deviation", type=float, default=0.75, help="standard deviation of the log of the lengths")
    parser.add_argument("--masked_share", type=float, default=0.7, help="share of the tokens that are not learned")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each vocabulary, at most")
    parser.add_argument("--runs", type=int, default=2, help="processes that measure memory, of each way and vocabulary")
    parser.add_argument("--minutes", type=float, default=7.0, help="no step is begun that would end after this")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    text = measure_all(arguments)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
