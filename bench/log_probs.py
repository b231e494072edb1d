"""Time and memory of the log-prob kernel against the path that holds all logits, paired and interleaved.

Every measurement is a process of its own: it makes weights and inputs, runs forward and backward once, and reports
seconds and the peak of its memory above weights, inputs and their gradients. A pair runs both ways back to back, and
the order changes from round to round, so that a slow minute of the machine slows both. Linux only (/proc).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lf_lightning.losses.log_probs import cross_entropy_sums, token_log_probs
from lf_lightning.types import OutputLayer

MIB = 2**20
RESULTS = Path(__file__).parent / "results" / "log_probs.md"
COLUMNS = ["form", "tokens", "H", "pairs", "naive s", "kernel s", "naive / kernel time", "the same in CPU time"]
COLUMNS += ["naive MiB", "kernel MiB", "kernel / naive memory"]
PAGE = """# The log-prob kernel against all logits

    {command}

Forward and backward in float32, {words:,} words, every position counted, {threads} threads. Naive: all logits, then
`F.cross_entropy`. Seconds: the machine is shared, so read the ratios; above 1 the kernel is faster. MiB: peak above
weights, inputs and their gradients. Median (smallest-largest) over pairs; each run is a fresh process.
The kernel's memory is one chunk of logits whatever the number of tokens, so its share falls as tokens grow.

{table}
"""


class Form(NamedTuple):
    """What is computed, and whether the output layer is trained."""

    title: str
    is_sum: bool
    is_trained: bool


FORMS = {
    "sums": Form("`cross_entropy_sums`", is_sum=True, is_trained=True),
    "sums_frozen": Form("`cross_entropy_sums`, frozen head", is_sum=True, is_trained=False),
    "tokens": Form("`token_log_probs`", is_sum=False, is_trained=True),
    "tokens_frozen": Form("`token_log_probs`, frozen head", is_sum=False, is_trained=False),
}


class Work(NamedTuple):
    """One row of the table."""

    form: str
    tokens: int
    words: int
    hidden: int


class Measured(NamedTuple):
    """What one process reports."""

    seconds: float  # on the clock
    cpu_seconds: float  # of all threads: a busy machine disturbs it less
    extra_mib: float  # peak above weights, inputs and their gradients
    nll: float  # both ways must agree


def memory_mib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def naive_nll(form: Form, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits in float32, kept no longer than autograd keeps them."""
    reduction = "sum" if form.is_sum else "none"
    return F.cross_entropy(F.linear(hidden, weight).flatten(0, 1).float(), targets.flatten(), reduction=reduction)


def kernel_nll(form: Form, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The kernel with its own chunk size."""
    if form.is_sum:
        return cross_entropy_sums(hidden, OutputLayer(weight), targets).nll
    return -token_log_probs(hidden, OutputLayer(weight), targets).flatten()


def measure(work: Work, *, is_kernel: bool) -> Measured:
    """Run forward and backward once, after a small run that loads libraries and starts threads."""
    torch.manual_seed(0)
    form = FORMS[work.form]

    def inputs(tokens: int, words: int) -> tuple[Tensor, Tensor, Tensor]:
        weight = torch.randn(words, work.hidden).mul_(work.hidden**-0.5).requires_grad_(form.is_trained)
        return torch.randn(1, tokens, work.hidden, requires_grad=True), weight, torch.randint(words, (1, tokens))

    def step(hidden: Tensor, weight: Tensor, targets: Tensor) -> float:
        nll = (kernel_nll if is_kernel else naive_nll)(form, hidden, weight, targets)
        nll.backward(None if form.is_sum else torch.linspace(-1.0, 1.0, nll.numel()))
        return nll.sum().item()

    step(*inputs(64, 1024))
    hidden, weight, targets = inputs(work.tokens, work.words)
    before = memory_mib("VmRSS")
    start, cpu_start = time.perf_counter(), time.process_time()
    nll = step(hidden, weight, targets)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    gradients = sum(leaf.grad.nbytes for leaf in (hidden, weight) if leaf.grad is not None) / MIB
    return Measured(seconds, cpu_seconds, memory_mib("VmHWM") - before - gradients, nll)


def in_a_process(work: Work, *, is_kernel: bool, threads: int) -> Measured:
    """Measure in a fresh process."""
    options = ["--child", json.dumps([*work]), "--threads", str(threads), *(["--kernel"] if is_kernel else [])]
    printed = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
    return Measured(*json.loads(printed))


def measure_all(works: list[Work], arguments: argparse.Namespace) -> dict[Work, list[tuple[Measured, Measured]]]:
    """Pairs (naive, kernel) of each row, round by round; a pair that would outlast the time is left out."""
    pairs: dict[Work, list[tuple[Measured, Measured]]] = {work: [] for work in works}
    seconds = dict.fromkeys(works, 0.0)
    begin = time.perf_counter()
    for number in range(arguments.rounds):
        for work in works:
            start = time.perf_counter()
            if start - begin + seconds[work] > 60 * arguments.minutes:
                continue
            order = (False, True) if number % 2 == 0 else (True, False)
            found = {way: in_a_process(work, is_kernel=way, threads=arguments.threads) for way in order}
            naive, kernel = found[False], found[True]
            assert abs(naive.nll - kernel.nll) <= 1e-5 * abs(naive.nll), f"nll: naive {naive.nll}, kernel {kernel.nll}"
            pairs[work].append((naive, kernel))
            seconds[work] = time.perf_counter() - start
            print(f"{work}: naive {naive}, kernel {kernel}", file=sys.stderr, flush=True)
    return pairs


def spread(values: list[float], text: Callable[[float], str]) -> str:
    """Median (smallest-largest)."""
    return f"{text(statistics.median(values))} ({text(min(values))}-{text(max(values))})"


def row(work: Work, pairs: list[tuple[Measured, Measured]]) -> str:
    """One row of the table."""
    cells = [
        *(FORMS[work.form].title, f"{work.tokens:,}", str(work.hidden), str(len(pairs))),
        spread([naive.seconds for naive, _ in pairs], "{:.1f}".format),
        spread([kernel.seconds for _, kernel in pairs], "{:.1f}".format),
        spread([naive.seconds / kernel.seconds for naive, kernel in pairs], "{:.2f}".format),
        spread([naive.cpu_seconds / kernel.cpu_seconds for naive, kernel in pairs], "{:.2f}".format),
        spread([naive.extra_mib for naive, _ in pairs], "{:,.0f}".format),
        spread([kernel.extra_mib for _, kernel in pairs], "{:,.0f}".format),
        spread([100 * kernel.extra_mib / naive.extra_mib for naive, kernel in pairs], "{:.1f} %".format),
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Parse the command line; a child measures once, the parent starts children."""
    parser = argparse.ArgumentParser(description="The log-prob kernel against all logits: time and peak memory.")
    parser.add_argument("--tokens", type=int, default=4096, help="counted tokens of the summed form")
    parser.add_argument("--side_tokens", type=int, default=1024, help="counted tokens of the other forms")
    parser.add_argument("--words", type=int, default=131072, help="size of the vocabulary")
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 896], help="hidden sizes of the summed form")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each row, at most")
    parser.add_argument("--minutes", type=float, default=5.5, help="no pair is begun that would end after this")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--kernel", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(measure(Work(*json.loads(arguments.child)), is_kernel=arguments.kernel)))
        return
    main_form, *side_forms = FORMS
    works = [Work(main_form, arguments.tokens, arguments.words, hidden) for hidden in arguments.hidden]
    works += [Work(form, arguments.side_tokens, arguments.words, arguments.hidden[0]) for form in side_forms]
    rows = [row(work, pairs) for work, pairs in measure_all(works, arguments).items() if pairs]
    table = "\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *rows])
    command = " ".join(["python bench/log_probs.py", *sys.argv[1:]])
    text = PAGE.format(command=command, words=arguments.words, threads=arguments.threads, table=table)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
