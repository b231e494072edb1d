"""A step of preference learning against the naive step: pairs per second, and memory of the whole process.

Ours is `Trainer.fit` with the stage and the DataModule, padding-free. The naive step is what one writes first: rows
padded on the right, chosen and rejected stacked, log_softmax of all logits in float32, a second model as reference.
Both train the same adapter on the same rows, and must report the same loss and the same norm of the gradient.

Each way is a process of its own, so its memory is its own. The ways of a group make the same step in turn, one at a
time, first to last and then last to first, so that a slow minute of the machine slows them all. Linux only (/proc).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from log_probs import memory_mib, spread
from numpy.typing import NDArray
from sft import make_spec
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lf_lightning import DPO, KTO, RM, AdamW, BackboneSpec, DataModule, Full, LoRA, ReferenceSpec, ScheduleSpec
from lf_lightning.console import quiet_libraries
from lf_lightning.models import ValueHeadSpec, add_value_head, load_backbone
from lf_lightning.optim import describe

RESULTS = Path(__file__).parent / "results" / "preference.md"
STAGES: dict[str, Any] = {"dpo": DPO, "kto": KTO, "rm": RM}
BETA = 0.1
OF_DATA = {"template": "empty", "layout": "padding_free", "shuffle": False, "cache_dir": None}
OF_TRAINER = ("logger", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
COLUMNS = ["stage", "ours", "prompt : response", "steps", "pairs/s, ours / naive", "the same in CPU time"]
COLUMNS += ["naive CPU s (system)", "our CPU s (system)", "naive MiB", "our MiB", "ours / naive memory"]
PAGE = """# A step of preference learning against the naive step

    {command}

Llama, hidden size {hidden}, {layers} layers, {words:,} words, tied embedding: {millions:.0f}M parameters; LoRA of
rank 8 on all linear layers, float32. {pairs} pairs a step, kto twice as many rows. Prompt and response have
{tokens:.0f} tokens together on average; lengths log-normal, deviation of the logarithm {deviation}.
Ours: `Trainer.fit`, `layout: padding_free`, `micro_batch_tokens: {micro_batch_tokens}`, steps that are not logged.
`online`: the reference runs in each step; `stored`: `reference.precompute`, filled before; `unshared`: online with
`share_prompt: false`. Naive: {naive_rows} rows a micro-batch in the order of the data, padded on the right
({padding:.0%} of what it computes for dpo is padding); log_softmax of all logits; dpo and kto: a second model as
reference, in each step; kto: four forward passes; rm: logits computed and not used.
Both: AdamW, clipping; loss and norm of the gradient agree to 1e-3 at every step.

Above 1 ours is faster. System: what of the CPU time the kernel takes, mostly to hand out memory. MiB: largest memory of
the whole process, imports and weights included. Median (smallest-largest) over steps, the first of
which pays for the growth of the heap; the machine is shared.
Python {python}, torch {torch} ({capability}), transformers {transformers}, lightning {lightning}, {threads} threads.

{table}
"""
Row = tuple[Tensor, int]
"""Input ids of a prompt with a response, (T,), and the tokens of the prompt."""


class Group(NamedTuple):
    """Ways that make the same steps, all beside the naive one."""

    stage: str
    ratio: int  # tokens of the prompt for each token of a response, on average
    units: int  # for each pair of a step: kto has one response in each
    ways: tuple[str, ...]  # the naive one first


GROUPS = {
    "dpo": Group("dpo", 4, 1, ("naive", "online", "stored", "unshared")),
    "dpo_1": Group("dpo", 1, 1, ("naive", "online", "unshared")),
    "kto": Group("kto", 4, 2, ("naive", "online", "stored")),
    "rm": Group("rm", 4, 1, ("naive", "shared")),
}


class Measured(NamedTuple):
    """What a process reports of one step."""

    seconds: float
    cpu_seconds: float  # of all threads: a busy machine disturbs it less
    system_seconds: float  # the kernel's part of them
    peak_mib: float  # of the whole process so far
    loss: float
    grad_norm: float


def lengths_of(group: Group, arguments: argparse.Namespace) -> NDArray[np.int64]:
    """Tokens of the prompt and of two responses of each row; (rows, 3).

    The first step is short and not counted; the last one is never made, since ours would log it.
    """
    num_rows, deviation = arguments.pairs * group.units, arguments.deviation
    means = arguments.tokens * np.array([group.ratio, 1, 1]) / (group.ratio + 1)
    noise = np.random.default_rng(0).lognormal(-(deviation**2) / 2, deviation, (num_rows * (arguments.steps + 1), 3))
    lengths = np.maximum(means * noise, 4).round().astype(np.int64)
    return np.concatenate([np.full((num_rows, 3), 12), lengths])


def write_rows(path: Path, group: Group, arguments: argparse.Namespace) -> None:
    """Write rows of random letters; a letter is a token."""
    random, letters, rows = np.random.default_rng(1), np.array(list("abcdefghijklmnopqrstuvwxyz ")), []
    for number, lengths in enumerate(lengths_of(group, arguments)):
        prompt, chosen, rejected = ("".join(random.choice(letters, length)) for length in lengths)
        rows.append({"instruction": prompt, "chosen": chosen, "rejected": rejected, "liked": number % 2 == 0})
    path.write_text(json.dumps(rows), encoding="utf-8")


def make_data(spec: BackboneSpec, group: Group, way: str, arguments: argparse.Namespace) -> DataModule:
    """The rows in the order of the file."""
    is_kto = group.stage == "kto"
    columns = {"response": "chosen", "kto_tag": "liked"} if is_kto else {"chosen": "chosen", "rejected": "rejected"}
    columns["prompt"] = "instruction"
    options = {
        "datasets": [{"path": f"{spec.path}/rows.json", "ranking": not is_kto, "columns": columns}],
        "max_length": 100 * round(arguments.tokens),
        "global_batch_size": arguments.pairs * group.units,
        "micro_batch_tokens": arguments.micro_batch_tokens,
        "share_prompt": False if way == "unshared" else None,
    }
    return DataModule(spec, STAGES[group.stage].task, **OF_DATA, **options)


def padded(rows: Sequence[Row]) -> tuple[dict[str, Any], Tensor]:
    """What the model takes, padded on the right, and the mask of responses; (R, T)."""
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
    is_response = pad_sequence([torch.arange(len(ids)) >= length for ids, length in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}, is_response


def log_probs(model: torch.nn.Module, rows: Sequence[Row]) -> Tensor:
    """Log-prob of each response, by way of all logits; (R,)."""
    inputs, is_response = padded(rows)
    found = model(**inputs).logits[:, :-1].float().log_softmax(-1)
    return (found.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1) * is_response[:, 1:]).sum(-1)


def batched(rows: Sequence[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Micro-batches in the order of the data, column by column."""
    return (tuple(zip(*rows[start : start + size], strict=True)) for start in range(0, len(rows), size))


class Naive:
    """Model, reference and optimizer of the naive step."""

    def __init__(self, spec: BackboneSpec, stage: str) -> None:
        self.policy, self.stage = load_backbone(spec, LoRA(), vocab_size=1, seed=0), stage
        self.model: Any = self.policy.causal_lm
        if stage == "rm":
            add_value_head(self.policy, ValueHeadSpec(), tuning=LoRA(), path=spec.path, seed=0)
        else:
            self.reference = load_backbone(spec, Full(), vocab_size=1, seed=0, trains=False).causal_lm
        self.optimizer = AdamW().build(describe(self.policy))

    def step(self, rows: Sequence[tuple[Row, ...]], size: int) -> tuple[float, float]:
        """One optimizer step in micro-batches of so many padded rows: loss and norm of the gradient."""
        total = 0.0
        for loss in self.kto(rows, size) if self.stage == "kto" else self.paired(rows, size // 2):
            loss.backward()
            total += loss.item()
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, grad_norm

    def rewards(self, rows: Sequence[Row]) -> Tensor:
        """The policy's log-prob of each response less the reference's, times beta; (R,)."""
        with torch.no_grad():
            reference = log_probs(self.reference, rows)
        return BETA * (log_probs(self.model, rows) - reference)

    def scores(self, rows: Sequence[Row]) -> Tensor:
        """The value head at the last token of each row; (R,)."""
        inputs, _ = padded(rows)
        values = self.policy.value_head(self.model(**inputs, output_hidden_states=True).hidden_states[-1])
        return values.gather(1, inputs["attention_mask"].sum(1, keepdim=True) - 1).squeeze(1)

    def paired(self, pairs: Sequence[tuple[Row, ...]], size: int) -> Iterator[Tensor]:
        """Loss of dpo or rm of each micro-batch, over the pairs of the step."""
        for chosen, rejected in batched(pairs, size):
            found = (self.scores if self.stage == "rm" else self.rewards)(chosen + rejected).view(2, -1)
            yield -F.logsigmoid(found[0] - found[1]).sum() / len(pairs)

    def kto(self, feedback: Sequence[tuple[Row, ...]], size: int) -> Iterator[Tensor]:
        """The same of feedback, of which every other row is liked; the kl is that of the step's mismatched rows."""
        with torch.no_grad():
            kl = torch.cat([self.rewards(mismatched) for _, mismatched in batched(feedback, size)]).mean().clamp(min=0)
        for rows, _ in batched(feedback, size):
            towards = self.rewards(rows) - kl
            towards[1::2] *= -1
            yield (1 - torch.sigmoid(towards)).sum() / len(feedback)


def naive_rows(data: DataModule, step: range) -> list[tuple[Row, ...]]:
    """What the naive step takes: both rows of each pair; of feedback the row and the mismatched one."""
    store, taken = data.sets["train"].store, []
    documents = [torch.from_numpy(store.document(index)[0]).long() for index in step]
    cuts = [ids.tensor_split([store.facts["prompt_length"][index]]) for index, ids in zip(step, documents, strict=True)]
    for number, (prompt, answer) in enumerate(cuts):
        answers = (answer, cuts[(number + 1) % len(cuts)][1])
        if data.task != "kto":
            answers = answer.tensor_split([store.facts["chosen_length"][step[number]]])
        taken.append(tuple((torch.cat([prompt, each]), len(prompt)) for each in answers))
    return taken


class Reporter(Callback):
    """Report each step on standard output, loss and norm as Lightning's hooks tell, and wait for the parent."""

    def __init__(self) -> None:
        self.start, self.loss, self.grad_norm = os.times(), 0.0, 0.0

    def report(self) -> bool:
        """Report a step, and wait; whether another one is asked for."""
        user, system, _, _, seconds = np.subtract(os.times(), self.start).tolist()
        step = Measured(seconds, user + system, system, memory_mib("VmHWM"), self.loss, self.grad_norm)
        print(json.dumps(step), file=sys.__stdout__, flush=True)
        line, self.loss, self.start = sys.stdin.readline(), 0.0, os.times()
        return bool(line)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the part of a micro-batch."""
        self.loss += loss.item()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """The stage clips after this."""
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """The step is done."""
        trainer.should_stop = not self.report()


def child(arguments: argparse.Namespace, reporter: Reporter) -> None:
    """Make the steps of one way until the parent has enough."""
    key, way, folder = json.loads(arguments.child)
    group, spec = GROUPS[key], BackboneSpec(path=folder, tokenizer="bytes", dtype="float32")
    data, num_units = make_data(spec, group, way, arguments), arguments.pairs * group.units
    if way == "naive":
        naive, start, is_asked = Naive(spec, group.stage), 0, True
        while is_asked:
            rows = naive_rows(data, range(start, start + num_units))
            reporter.loss, reporter.grad_norm = naive.step(rows, arguments.naive_rows)
            start, is_asked = start + num_units, reporter.report()
        return
    options: dict[str, Any] = {**dict.fromkeys(OF_TRAINER, False), "default_root_dir": Path(folder) / way}
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[reporter], **options)
    of_stage = {} if group.stage == "rm" else {"reference": ReferenceSpec(precompute=way == "stored"), "beta": BETA}
    trainer.fit(STAGES[group.stage](spec, LoRA(), AdamW(), ScheduleSpec("constant"), **of_stage), data)


def measure(key: str, folder: str, arguments: argparse.Namespace, *, seconds: float) -> list[list[Measured]]:
    """The steps of each way of a group: as many as the time allows, and at least one."""
    group, deadline = GROUPS[key], time.perf_counter() + seconds
    write_rows(Path(folder) / "rows.json", group, arguments)
    processes: dict[str, Any] = {}
    for way in group.ways:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", json.dumps([key, way, folder])]
        processes[way] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    for process in processes.values():
        process.stdout.readline()
    steps: dict[str, list[Measured]] = {way: [] for way in group.ways}
    begin, last = time.perf_counter(), 0.0
    while not last or (len(steps["naive"]) < arguments.steps and begin + last < deadline):
        for way in group.ways[:: -1 if len(steps["naive"]) % 2 else 1]:
            print(file=processes[way].stdin, flush=True)
            steps[way].append(Measured(*json.loads(processes[way].stdout.readline())))
            print(key, way, steps[way][-1], file=sys.stderr, flush=True)
        naive, *ours = (np.array(found[-1][-2:]) for found in steps.values())
        assert all(np.allclose(numbers, naive, rtol=1e-3) for numbers in ours), f"loss and norm: {naive}, ours {ours}"
        begin, last = time.perf_counter(), time.perf_counter() - begin
    for process in processes.values():
        process.communicate()
    return list(steps.values())


def table_rows(group: Group, found: list[list[Measured]]) -> list[str]:
    """A row of the table for each way of ours."""
    naive, lines = np.array(found[0]), []
    for way, steps in zip(group.ways[1:], found[1:], strict=True):
        ours = np.array(steps)
        cells = [group.stage, way, f"{group.ratio} : 1", str(len(steps))]
        cells += [spread((naive[:, column] / ours[:, column]).tolist(), "{:.2f}".format) for column in (0, 1)]
        cells += ["{:.0f} ({:.0f})".format(*np.median(each, 0)[1:3]) for each in (naive, ours)]
        peaks = naive[-1, 3], ours[-1, 3]
        lines.append("| " + " | ".join([*cells, *map("{:,.0f}".format, peaks), f"{peaks[1] / peaks[0]:.2f}"]) + " |")
    return lines


def measure_all(arguments: argparse.Namespace) -> str:
    """The whole page."""
    end, lines = time.perf_counter() + 60 * arguments.minutes, []
    with TemporaryDirectory() as folder:
        backbone = load_backbone(make_spec(arguments.words, arguments), Full(), vocab_size=1, seed=0)
        backbone.causal_lm.save_pretrained(folder)
        for index, key in enumerate(arguments.groups):
            seconds = (end - time.perf_counter()) / (len(arguments.groups) - index)
            lines += table_rows(GROUPS[key], measure(key, folder, arguments, seconds=seconds))
    lengths = lengths_of(GROUPS["dpo"], arguments)[arguments.pairs : -arguments.pairs]
    padded_rows = (lengths[:, :1] + lengths[:, 1:]).reshape(-1, arguments.naive_rows)
    return PAGE.format(
        **vars(arguments),
        command=" ".join(["python bench/preference.py", *sys.argv[1:]]),
        millions=backbone.num_parameters()[1] / 1e6,
        padding=1 - padded_rows.mean() / padded_rows.max(1).mean(),
        python=platform.python_version(),
        capability=torch.backends.cpu.get_cpu_capability(),
        table="\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *lines]),
        **{name: version(name) for name in ("torch", "transformers", "lightning")},
    )


def main() -> None:
    """Parse the command line; children measure, the parent starts them and writes the page."""
    parser = argparse.ArgumentParser(description="A step of preference learning of ours against the naive step.")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS), help="what is measured")
    parser.add_argument("--words", type=int, default=65536, help="size of the vocabulary")
    parser.add_argument("--layers", type=int, default=20, help="blocks of the model")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step; kto has twice as many rows")
    parser.add_argument("--micro_batch_tokens", type=int, default=1024, help="tokens of a micro-batch of ours")
    parser.add_argument("--tokens", type=float, default=250.0, help="tokens of a prompt and one response, on average")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each group, at most")
    parser.add_argument("--minutes", type=float, default=8.0, help="no step is begun that would end after this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.set_defaults(hidden=512, naive_rows=8, deviation=0.5, threads=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    seed_everything(0, verbose=False)
    if arguments.child:
        with redirect_stdout(sys.stderr):  # what libraries print there is no report
            return child(arguments, Reporter())
    RESULTS.write_text(measure_all(arguments), encoding="utf-8")


if __name__ == "__main__":
    main()
