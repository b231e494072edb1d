"""A step of preference learning against the naive step: pairs per second, and memory of the whole process.

Ours is `Trainer.fit` with the stage and the DataModule, padding-free. The naive step is what one writes first: rows
padded on the right, chosen and rejected stacked, log_softmax of all logits in float32, a second model as reference.
Both train the same adapter on the same rows, and must report the same loss and the same norm of the gradient.

Each way is a process of its own, so that its memory is its own. The ways of a group make the same step in turn, one at
a time, first to last and then last to first, so that a slow minute of the machine slows them all. Linux only (/proc).
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from log_probs import memory_mib, spread
from numpy.typing import NDArray
from sft import make_spec, now
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lf_lightning import DPO, KTO, RM, AdamW, BackboneSpec, DataModule, Full, LoRA, ReferenceSpec, ScheduleSpec
from lf_lightning import ValueHeadSpec
from lf_lightning.console import quiet_libraries
from lf_lightning.data.store import TokenStore
from lf_lightning.models import Backbone, add_value_head, load_backbone

RESULTS = Path(__file__).parent / "results" / "preference.md"
STAGES: dict[str, Any] = {"dpo": DPO, "kto": KTO, "rm": RM}
BETA = 0.1
COLUMNS = ["stage", "ours", "prompt : response", "steps", "pairs/s, ours / naive", "the same in CPU time"]
COLUMNS += ["naive CPU s", "naive MiB", "our MiB", "ours / naive memory"]
PAGE = """# A step of preference learning against the naive step

    {command}

Llama, hidden size {hidden}, {layers} layers, {words:,} words, tied embedding: {millions:.0f}M parameters; LoRA of rank 8
on all linear layers, float32. {pairs} pairs a step, kto {rows} rows. A prompt and one response have {tokens:.0f} tokens
together on average, at most {most}; lengths log-normal, deviation of the logarithm {deviation}.
Ours: `Trainer.fit`, `layout: padding_free`, `micro_batch_tokens: {micro_batch_tokens}`, steps that are not logged.
`online`: the reference runs in each step; `stored`: `reference.precompute`, filled before; `unshared`:
`share_prompt: false`. Naive: micro-batches of {naive_rows} rows ({naive_pairs} pairs, kto {naive_rows} rows) in the order of
the data, padded on the right ({padding} of what it computes is padding); log_softmax of all logits; dpo and kto: a second
model as reference, online; kto: four forward passes; rm: all hidden states, logits computed and not used.
Both: AdamW, clipping; loss and norm of the gradient agree to 1e-3 at every step.

Above 1 ours is faster. MiB: largest memory of the whole process, imports and weights included. Median
(smallest-largest) over steps; the machine is shared.
Python {python}, torch {torch} ({capability}), transformers {transformers}, lightning {lightning}, {threads} threads.

{table}
"""


class Way(NamedTuple):
    """How a step is made."""

    name: str
    is_ours: bool = True
    options: tuple[tuple[str, Any], ...] = ()  # of the DataModule; `precompute` of the reference


NAIVE, ONLINE = Way("naive", is_ours=False), Way("online")
STORED, UNSHARED = Way("stored", options=(("precompute", True),)), Way("unshared", options=(("share_prompt", False),))


class Group(NamedTuple):
    """Ways that make the same steps, the naive one first."""

    stage: str
    ratio: int  # tokens of the prompt for each token of a response, on average
    ways: tuple[Way, ...]


GROUPS = {
    "dpo": Group("dpo", 4, (NAIVE, ONLINE, STORED, UNSHARED)),
    "dpo1": Group("dpo", 1, (NAIVE, ONLINE, STORED, UNSHARED)),
    "kto": Group("kto", 4, (NAIVE, ONLINE, STORED)),
    "rm": Group("rm", 4, (NAIVE, Way("shared"))),
}


class Measured(NamedTuple):
    """What a process reports of one step."""

    seconds: float
    cpu_seconds: float
    peak_mib: float  # of the whole process so far
    loss: float
    grad_norm: float


class Row(NamedTuple):
    """A prompt with a response."""

    ids: Tensor  # (T,)
    prompt_length: int


# ---------------------------------------------------------------------- rows and model


def lengths_of(group: Group, arguments: argparse.Namespace) -> NDArray[np.int64]:
    """Tokens of the prompt and of two responses of each row; (rows, 3).

    Those of the first step are short, and the last step is never made: ours would log it.
    """
    random, num_rows = np.random.default_rng(0), units_of(group, arguments)
    means = arguments.tokens * np.array([group.ratio, 1, 1]) / (group.ratio + 1)
    noise = random.lognormal(-(arguments.deviation**2) / 2, arguments.deviation, ((arguments.steps + 1) * num_rows, 3))
    warm_up = np.full((num_rows, 3), 12)
    return np.concatenate([warm_up, np.clip(means * noise, 4, arguments.most).round().astype(np.int64)])


def units_of(group: Group, arguments: argparse.Namespace) -> int:
    """Units of a step: kto has one response in each."""
    return 2 * arguments.pairs if group.stage == "kto" else int(arguments.pairs)


def write_rows(path: Path, group: Group, arguments: argparse.Namespace) -> None:
    """Write rows of random letters; a letter is a token."""
    random, letters = np.random.default_rng(1), np.array(list("abcdefghijklmnopqrstuvwxyz "))
    rows = []
    for number, lengths in enumerate(lengths_of(group, arguments)):
        prompt, chosen, rejected = ("".join(random.choice(letters, length)) for length in lengths)
        rows.append({"instruction": prompt, "chosen": chosen, "rejected": rejected, "liked": number % 2 == 0})
    path.write_text(json.dumps(rows), encoding="utf-8")


def make_data(spec: BackboneSpec, group: Group, arguments: argparse.Namespace, **options: Any) -> DataModule:
    """The rows in the order of the file."""
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    if group.stage == "kto":
        columns = {"prompt": "instruction", "response": "chosen", "kto_tag": "liked"}
    path = str(Path(str(spec.path)) / f"{group.stage}{group.ratio}.json")
    return DataModule(
        spec,
        group.stage,
        datasets=[{"path": path, "ranking": group.stage != "kto", "columns": columns}],
        template="empty",
        max_length=4 * arguments.most,
        global_batch_size=units_of(group, arguments),
        micro_batch_tokens=arguments.micro_batch_tokens,
        layout="padding_free",
        shuffle=False,
        cache_dir=None,
        **options,
    )


def make_stage(spec: BackboneSpec, stage: str, *, precompute: bool) -> LightningModule:
    """Ours, with the defaults but for what the naive step has too."""
    options: dict[str, Any] = {} if stage == "rm" else {"reference": ReferenceSpec(precompute=precompute), "beta": BETA}
    module: LightningModule = STAGES[stage](spec, LoRA(), AdamW(), ScheduleSpec("constant"), **options)
    return module


# ---------------------------------------------------------------------- the naive way


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Input ids, mask of what is not padding, and mask of responses; (R, T) each, padded on the right."""
    ids = pad_sequence([row.ids for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row.ids) for row in rows], batch_first=True)
    responses = [torch.arange(len(row.ids)) >= row.prompt_length for row in rows]
    return ids, mask, pad_sequence(responses, batch_first=True)


def log_probs(model: torch.nn.Module, rows: Sequence[Row]) -> Tensor:
    """Log-prob of each response, by way of all logits; (R,)."""
    ids, mask, is_response = padded(rows)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    found = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (found * is_response[:, 1:]).sum(-1)


class Naive:
    """Model, reference and optimizer of the naive step."""

    def __init__(self, spec: BackboneSpec, stage: str) -> None:
        self.policy, self.stage = load_backbone(spec, LoRA(), vocab_size=1, seed=0), stage
        self.model = self.policy.causal_lm
        if stage == "rm":
            add_value_head(self.policy, ValueHeadSpec(), tuning=LoRA(), path=spec.path, seed=0)
        else:
            self.reference = load_backbone(spec, Full(), vocab_size=1, seed=0, trains=False).causal_lm
        self.optimizer = AdamW().build(self.policy.named_parameters())

    def step(self, rows: Any, size: int) -> tuple[float, float]:
        """One optimizer step on rows in micro-batches of some size: loss and norm of the gradient."""
        losses: Callable[..., Iterator[Tensor]] = {"dpo": self.dpo, "kto": self.kto, "rm": self.rm}[self.stage]
        total = 0.0
        for loss in losses(rows, size):
            loss.backward()
            total += loss.item()
            del loss
        parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, float(grad_norm)

    def ratios(self, rows: Sequence[Row]) -> Tensor:
        """Log policy - log reference of each response; (R,)."""
        with torch.no_grad():
            reference = log_probs(self.reference, rows)
        return log_probs(self.model, rows) - reference

    def dpo(self, pairs: Sequence[tuple[Row, Row]], size: int) -> Iterator[Tensor]:
        """Loss of each micro-batch, over the pairs of the step."""
        for part in batched(pairs, size // 2):
            chosen, rejected = self.ratios([row for column in zip(*part, strict=True) for row in column]).chunk(2)
            yield -F.logsigmoid(BETA * (chosen - rejected)).sum() / len(pairs)

    def kto(self, feedback: Sequence[tuple[Row, Row, bool]], size: int) -> Iterator[Tensor]:
        """Loss of each micro-batch, over the rows of the step; the second row of each is the mismatched one."""
        with torch.no_grad():
            kl = torch.cat([self.ratios([row for _, row, _ in part]) for part in batched(feedback, size)]).mean()
        for part in batched(feedback, size):
            sign = torch.tensor([1.0 if liked else -1.0 for *_, liked in part])
            ratios = self.ratios([row for row, *_ in part])
            yield (1 - torch.sigmoid(BETA * sign * (ratios - kl.clamp(min=0)))).sum() / len(feedback)

    def rm(self, pairs: Sequence[tuple[Row, Row]], size: int) -> Iterator[Tensor]:
        """Loss of each micro-batch, over the pairs of the step."""
        assert self.policy.value_head is not None
        for part in batched(pairs, size // 2):
            ids, mask, _ = padded([row for column in zip(*part, strict=True) for row in column])
            found = self.model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True)
            values = self.policy.value_head(found.hidden_states[-1])
            chosen, rejected = values.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1).chunk(2)
            yield -F.logsigmoid(chosen - rejected).sum() / len(pairs)


def batched(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Micro-batches in the order of the data."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def naive_rows(store: TokenStore, stage: str, step: range) -> list[Any]:
    """What the naive step takes of the documents of a step."""
    lengths, taken = store.facts["prompt_length"], []
    for index in step:
        ids, prompt = torch.from_numpy(store.document(index)[0]).long(), int(lengths[index])
        if stage == "kto":
            partner = index + 1 if index + 1 < step.stop else step.start
            answer = torch.from_numpy(store.document(partner)[0]).long()[int(lengths[partner]) :]
            mismatched = Row(torch.cat([ids[:prompt], answer]), prompt)
            taken.append((Row(ids, prompt), mismatched, bool(store.facts["is_desirable"][index])))
        else:
            end = prompt + int(store.facts["chosen_length"][index])
            taken.append((Row(ids[:end], prompt), Row(torch.cat([ids[:prompt], ids[end:]]), prompt)))
    return taken


# ---------------------------------------------------------------------- a process for each way


class Wire:
    """The parent's end: a line in asks for the next step, a line out reports the last one."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.start = out, now()

    def report(self, loss: float, grad_norm: float) -> bool:
        """Report a step, and wait; whether another one is asked for."""
        seconds, cpu_seconds = (end - start for start, end in zip(self.start, now(), strict=True))
        measured = Measured(seconds, cpu_seconds, memory_mib("VmHWM"), loss, grad_norm)
        print(json.dumps(measured), file=self.out, flush=True)
        is_asked = bool(sys.stdin.readline())
        self.start = now()
        return is_asked


class ReportSteps(Callback):
    """Report each step of ours. Loss and norm come from Lightning's hooks, since the steps are not logged."""

    def __init__(self, wire: Wire) -> None:
        self.wire, self.loss, self.grad_norm = wire, 0.0, 0.0

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the share of a micro-batch."""
        self.loss += loss.item()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The stage clips after this."""
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.grad_norm = float(torch.nn.utils.get_total_norm(gradients))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report, wait, and begin anew."""
        trainer.should_stop = not self.wire.report(self.loss, self.grad_norm)
        self.loss = 0.0


def child(arguments: argparse.Namespace, wire: Wire) -> None:
    """Make the steps of one way until the parent has enough."""
    key, index, folder = json.loads(arguments.child)
    group, spec = GROUPS[key], BackboneSpec(path=folder, tokenizer="bytes", dtype="float32")
    way = group.ways[index]
    options = dict(way.options)
    precompute = options.pop("precompute", False)
    data = make_data(spec, group, arguments, **options)
    if way.is_ours:
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            log_every_n_steps=arguments.log_every_n_steps,
            callbacks=[ReportSteps(wire)],
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=Path(folder) / way.name,
        )
        trainer.fit(make_stage(spec, group.stage, precompute=precompute), data)
        return
    naive, units, store = Naive(spec, group.stage), units_of(group, arguments), data.sets["train"].store
    for start in range(0, len(store), units):
        rows = naive_rows(store, group.stage, range(start, start + units))
        if not wire.report(*naive.step(rows, arguments.naive_rows)):
            return


# ---------------------------------------------------------------------- the parent


class Worker:
    """A process that makes the steps of one way; it begins with a short step that is not counted."""

    def __init__(self, key: str, index: int, folder: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", json.dumps([key, index, folder])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.steps: list[Measured] = []

    def receive(self) -> Measured:
        """Wait for the report of a step."""
        assert self.process.stdout is not None
        return Measured(*json.loads(self.process.stdout.readline()))

    def step(self) -> None:
        """Make a step."""
        assert self.process.stdin is not None
        print(file=self.process.stdin, flush=True)
        self.steps.append(self.receive())


def measure(key: str, folder: str, arguments: argparse.Namespace, *, deadline: float) -> list[list[Measured]]:
    """The steps of each way of a group, as many as the time allows, one at least."""
    group = GROUPS[key]
    write_rows(Path(folder) / f"{group.stage}{group.ratio}.json", group, arguments)
    workers = [Worker(key, index, folder) for index in range(len(group.ways))]
    for worker in workers:
        worker.receive()
    for number in range(arguments.steps):
        begin = time.perf_counter()
        for worker in workers[:: 1 if number % 2 == 0 else -1]:
            worker.step()
        naive, *ours = (worker.steps[-1] for worker in workers)
        for way, step in zip(group.ways, (naive, *ours), strict=True):
            print(f"{key} {way.name}: {step}", file=sys.stderr, flush=True)
            assert np.allclose(step[-2:], naive[-2:], rtol=1e-3), f"{way.name}: {step}, naive {naive}"
        if 2 * time.perf_counter() - begin > deadline:
            break
    for worker in workers:
        worker.process.communicate()
    return [worker.steps for worker in workers]


def table_rows(group: Group, found: list[list[Measured]]) -> list[str]:
    """A row of the table for each way of ours."""
    naive, lines = found[0], []
    for way, ours in zip(group.ways[1:], found[1:], strict=True):
        peaks = naive[-1].peak_mib, ours[-1].peak_mib
        cells = [
            *(group.stage, way.name, f"{group.ratio} : 1", str(len(ours))),
            spread([one.seconds / other.seconds for one, other in zip(naive, ours, strict=True)], "{:.2f}".format),
            spread([one.cpu_seconds / other.cpu_seconds for one, other in zip(naive, ours, strict=True)], "{:.2f}".format),
            spread([step.cpu_seconds for step in naive], "{:.0f}".format),
            *(f"{peaks[0]:,.0f}", f"{peaks[1]:,.0f}", f"{peaks[1] / peaks[0]:.2f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def measure_all(arguments: argparse.Namespace) -> str:
    """The whole page."""
    begin, lines = time.perf_counter(), []
    with TemporaryDirectory() as folder:
        backbone = load_backbone(make_spec(arguments.words, arguments), Full(), vocab_size=1, seed=0)
        backbone.causal_lm.save_pretrained(folder)
        millions = backbone.num_parameters()[1] / 1e6
        for number, key in enumerate(arguments.groups):
            left = 60 * arguments.minutes + begin - time.perf_counter()
            deadline = time.perf_counter() + left / (len(arguments.groups) - number)
            lines += table_rows(GROUPS[key], measure(key, folder, arguments, deadline=deadline))
    return PAGE.format(
        **vars(arguments),
        command=" ".join(["python bench/preference.py", *sys.argv[1:]]),
        millions=millions,
        rows=2 * arguments.pairs,
        naive_pairs=arguments.naive_rows // 2,
        padding="?",
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
    parser.add_argument("--hidden", type=int, default=512, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=20, help="blocks of the model")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step; kto has twice as many rows")
    parser.add_argument("--naive_rows", type=int, default=8, help="padded rows of a micro-batch of the naive step")
    parser.add_argument("--micro_batch_tokens", type=int, default=2048, help="tokens of a micro-batch of ours")
    parser.add_argument("--tokens", type=float, default=250.0, help="tokens of prompt and response, on average")
    parser.add_argument("--most", type=int, default=512, help="tokens of a prompt or a response, at most")
    parser.add_argument("--deviation", type=float, default=0.5, help="standard deviation of the log of the lengths")
    parser.add_argument("--log_every_n_steps", type=int, default=50, help="1: ours computes entropy in each step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each group, at most")
    parser.add_argument("--minutes", type=float, default=8.0, help="no step is begun that would end after this")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    seed_everything(0, verbose=False)
    if arguments.child:
        with redirect_stdout(sys.stderr):
            child(arguments, Wire(sys.__stdout__))
        return
    text = measure_all(arguments)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
