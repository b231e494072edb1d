"""The proof of the step contract: how units lie on micro-batches and ranks never changes gradients or eval loss.

Every case is a real `Trainer.fit` (contract_run.py, one launch for each number of ranks) and is compared with a plain
PyTorch loop in float64: one process, one unit at a time, full logits, `cross_entropy(sum) / count`, hand-made tokens.
"""

from __future__ import annotations

import copy
import json
import math
import random
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lf_lightning.models import Full, load_backbone
from tests.ranks import fork_ranks
from tests.stages.contract_run import ADAMW, SEED, backbone_spec, exact_norm, fit_all

IGNORE = -100
TRAIN_LENGTHS = (3, 17, 9, 30, 5, 22, 12, 7, 26, 14)
EVAL_LENGTHS = (8, 2, 19, 11, 4, 28, 6, 15, 23, 10, 13)
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
"""Largest difference of a gradient, relative to the largest entry of its tensor."""
EVAL_OF = {"micro_batch_size": "eval_micro_batch_size", "micro_batch_tokens": "eval_micro_batch_tokens"}
RULES = {  # name of a micro-batch rule: the rule, and the eval batch that goes with it
    "1x8": ({"micro_batch_size": 8}, {"eval_micro_batch_size": 8}),
    "2x4": ({"micro_batch_size": 4}, {"eval_micro_batch_size": 3}),
    "4x2": ({"micro_batch_size": 2}, {"eval_micro_batch_size": 1}),
    "8x1": ({"micro_batch_size": 1}, {"eval_micro_batch_size": 3}),
    "tokens": ({"micro_batch_tokens": 90}, {"eval_micro_batch_tokens": 90}),
}


class Document(NamedTuple):
    """Tokens, and the same as labels where they are learned."""

    ids: list[int]
    labels: list[int]


class Record(NamedTuple):
    """What a run shows: gradients and loss of every step, and the eval loss and accuracy of every epoch's end."""

    gradients: list[dict[str, Tensor]]
    losses: list[float]
    val_loss: float
    val_accuracy: float


# ---------------------------------------------------------------------- rows, and their tokens made by hand


def words(lengths: tuple[int, ...], seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdefgh ") for _ in range(length)) for length in lengths]


def byte_ids(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def pt_document(text: str) -> Document:
    ids = [*byte_ids(text), 2]
    return Document(ids, ids)


def sft_document(question: str, answer: str) -> Document:
    prompt = [1, *byte_ids(f"user\n{question}"), 2, *byte_ids("\n"), 1, *byte_ids("assistant\n")]
    learned = [*byte_ids(answer), 2, *byte_ids("\n")]
    return Document(prompt + learned, [IGNORE] * len(prompt) + learned)


def rows_of(stage: str, lengths: tuple[int, ...], seed: int) -> list[dict[str, str]]:
    texts = words(lengths, seed)
    if stage == "PT":
        return [{"text": text} for text in texts]
    return [{"instruction": text[::2], "output": text[1::2] + "!"} for text in texts]


@cache
def documents_of(stage: str, lengths: tuple[int, ...], seed: int) -> list[Document]:
    rows = rows_of(stage, lengths, seed)
    if stage == "PT":
        return [pt_document(row["text"]) for row in rows]
    return [sft_document(row["instruction"], row["output"]) for row in rows]


def write_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The files of both stages, as options of the DataModule."""
    options: dict[str, dict[str, Any]] = {}
    for stage, formatting in (("PT", "text"), ("SFT", "alpaca")):
        for split, lengths in (("train", TRAIN_LENGTHS), ("val", EVAL_LENGTHS)):
            path = folder / f"{stage}_{split}.json"
            path.write_text(json.dumps(rows_of(stage, lengths, seed=len(lengths))))
            key = "datasets" if split == "train" else "eval_datasets"
            options.setdefault(stage, {})[key] = [{"path": str(path), "formatting": formatting}]
    return options


# ---------------------------------------------------------------------- the plain loop


Unit = list[Document]
"""Stretches that do not see each other, with labels that are not shifted."""


def chunks(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def one_document_units(stage: str, lengths: tuple[int, ...]) -> list[Unit]:
    return [[document] for document in documents_of(stage, lengths, len(lengths))]


def block_units(stage: str, lengths: tuple[int, ...], size: int, *, isolate: bool) -> list[Unit]:
    """The stream of all documents, cut every `size` tokens; `isolate` cuts it at the ends of documents too."""
    stream = [
        (index, token, label)
        for index, document in enumerate(documents_of(stage, lengths, len(lengths)))
        for token, label in zip(*document, strict=True)
    ]
    units = []
    for block in chunks(stream, size):
        keys = sorted({index for index, _, _ in block}) if isolate else [None]
        parts = [[entry for entry in block if key in (None, entry[0])] for key in keys]
        units.append([Document([token for _, token, _ in part], [label for _, _, label in part]) for part in parts])
    return units


def loss_sum(logits: Tensor, target: Tensor, reference: Tensor, init: dict[str, Any]) -> Tensor:
    """The loss of a document, as SFT's options say, written another way than the package does."""
    kind, smoothing = init.get("loss", "cross_entropy"), init.get("label_smoothing", 0.0)
    learned = target != IGNORE
    logits, target, reference = logits[learned], target[learned], reference[learned]
    nll = cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    if kind == "cross_entropy":
        return nll.sum()
    if kind == "eaft":
        top = logits.detach().softmax(1).sort(1, descending=True).values[:, :20]
        top = top / top.sum(1, keepdim=True)
        return (-(top * top.log()).sum(1) / math.log(20) * nll).sum()
    anchor = kl_div(logits.log_softmax(1), reference.softmax(1), reduction="sum")
    return (nll.detach().neg().exp() * nll).sum() + (init["asft_alpha"] * anchor if kind == "asft" else 0)


def unit_sums(model: Any, unit: Unit, frozen: Any, init: dict[str, Any]) -> tuple[Tensor, int, int]:
    """Summed loss, number of correct predictions and number of predictions of a unit."""
    total, num_correct, count = torch.zeros((), dtype=torch.float64), 0, 0
    for ids, labels in unit:
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        reference = logits
        if init.get("loss") == "asft":
            with torch.no_grad():
                reference = frozen(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        target = torch.tensor(labels[1:])
        if len(target):
            total = total + loss_sum(logits, target, reference, init)
            learned = target != IGNORE
            num_correct += int((logits.argmax(-1) == target)[learned].sum())
            count += int(learned.sum())
    return total, num_correct, count


def plain_loop(case: dict[str, Any], epochs: list[list[list[Unit]]], eval_units: list[Unit]) -> Record:
    """Train on epochs of steps of units with nothing but PyTorch, in float64."""
    spec = backbone_spec({**case, "attention": "sdpa"})  # transformers' eager softmax rounds to float32
    model = load_backbone(spec, Full(), vocab_size=259, seed=SEED).causal_lm.double()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, **ADAMW)
    frozen, init = copy.deepcopy(model), case.get("init", {})
    gradients, losses = [], []
    for units in (units for steps in epochs for units in steps):
        sums = [unit_sums(model, unit, frozen, init) for unit in units]
        loss = sum(total for total, _, _ in sums) / sum(count for _, _, count in sums)
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        losses.append(float(loss.detach()))
        optimizer.step()
    with torch.no_grad():
        sums = [unit_sums(model, unit, frozen, init) for unit in eval_units]
    count = sum(count for _, _, count in sums)
    val_loss = float(sum(total for total, _, _ in sums)) / count
    return Record(gradients, losses, val_loss, sum(correct for _, correct, _ in sums) / count)


# ---------------------------------------------------------------------- cases


class Case(NamedTuple):
    """A run, and what the plain loop trains and evaluates on."""

    options: dict[str, Any]
    epochs: list[list[list[Unit]]]
    eval_units: list[Unit]

    @property
    def key(self) -> str:
        """Cases with the same key differ in their layout alone, so that they share a reference."""
        named = {name: self.options[name] for name in ("stage", "tied", "dtype", "attention", "init")}
        return json.dumps([named, self.epochs, self.eval_units])


def case(
    name: str,
    stage: str,
    *,
    epochs: list[list[list[Unit]]],
    eval_units: list[Unit] | None = None,
    tied: bool = False,
    dtype: str = "float64",
    attention: str = "sdpa",
    init: dict[str, Any] | None = None,
    **data: Any,
) -> Case:
    data = {"shuffle": False, "max_length": 64, "global_batch_size": 8, "template": "auto", **data}
    if stage == "PT":
        data["template"] = "default"
    options = {"name": name, "stage": stage, "tied": tied, "dtype": dtype, "attention": attention}
    options["init"] = init or {}
    options |= {"epochs": len(epochs), "data": data}
    return Case(options, epochs, one_document_units(stage, EVAL_LENGTHS) if eval_units is None else eval_units)


def layout_cases() -> list[Case]:
    """{1x8, 2x4, 4x2, 8x1, tokens} x {padded, padding_free} x {PT, SFT} x {tied, untied}: steps of 8 and 2 units."""
    cases = []
    for (rule, (train, evaluate)), layout, stage in product(RULES.items(), ("padded", "padding_free"), ("PT", "SFT")):
        epochs = [chunks(one_document_units(stage, TRAIN_LENGTHS), 8)]
        for tied, dtype in ((False, "float64"), (True, "float64"), (stage == "PT", "float32")):
            name = f"{stage}-{rule}-{layout}-{'tied' if tied else 'untied'}-{dtype}"
            options: dict[str, Any] = {**train, **evaluate, "layout": layout}
            cases.append(case(name, stage, epochs=epochs, tied=tied, dtype=dtype, **options))
    return cases


def short_step_cases() -> list[Case]:
    """10 sequences in steps of 4, two epochs, each in its own order: 4, 4, 2 and 4, 4, 2."""
    units = one_document_units("SFT", TRAIN_LENGTHS)
    orders = [np.random.default_rng([SEED, epoch]).permutation(10) for epoch in (0, 1)]
    epochs = [chunks([units[index] for index in order], 4) for order in orders]
    options: dict[str, Any] = {"global_batch_size": 4, "shuffle": True}
    return [
        case("short-padded", "SFT", epochs=epochs, micro_batch_size=3, layout="padded", **options),
        case("short-free", "SFT", epochs=epochs, micro_batch_tokens=70, layout="auto", **options),
        case("short-eager", "SFT", epochs=epochs, micro_batch_size=2, layout="auto", attention="eager", **options),
    ]


KNAPSACK = ([3, 9], [8, 1], [5, 6, 2], [7, 4, 0])
"""PT's rows of 4, 18, 10, 31, 6, 23, 13, 8, 27, 15 tokens in packs of at most 48: 31 + 15, 27 + 18, 23 + 13 + 10 ..."""
EVAL_KNAPSACK = ([5, 7, 1], [8, 2], [10, 3, 9, 0], [6, 4])
"""The same of 9, 3, 20, 12, 5, 29, 7, 16, 24, 11, 14 tokens: 29 + 16 + 3, 24 + 20, 14 + 12 + 11 + 9, 7 + 5."""


def pack_cases() -> list[Case]:
    """Packs in steps of 2: blocks that see across documents or not, knapsacks that do not."""
    cases = []
    for layout, micro_batch_size in (("padded", 2), ("padded", 1), ("padding_free", 2), ("padding_free", 1)):
        options: dict[str, Any] = {"layout": layout, "micro_batch_size": micro_batch_size, "eval_micro_batch_size": 3}
        options |= {"global_batch_size": 2}
        for stage, size, isolate in (("PT", 48, False), ("PT", 48, True), ("SFT", 56, False), ("SFT", 56, True)):
            train = block_units(stage, TRAIN_LENGTHS, size, isolate=isolate)
            evaluate = block_units(stage, EVAL_LENGTHS, size, isolate=isolate)
            name = f"blocks-{stage}-{layout}-{micro_batch_size}-{isolate}"
            packing: dict[str, Any] = {"packing": "blocks", "isolate_documents": isolate}
            options |= {"max_length": size}  # at least the longest conversation: sft cuts rows to it
            cases.append(case(name, stage, epochs=[chunks(train, 2)], eval_units=evaluate, **packing, **options))
        options |= {"max_length": 48}
        train = [[documents_of("PT", TRAIN_LENGTHS, 10)[index] for index in pack] for pack in KNAPSACK]
        evaluate = [[documents_of("PT", EVAL_LENGTHS, 11)[index] for index in pack] for pack in EVAL_KNAPSACK]
        name = f"knapsack-{layout}-{micro_batch_size}"
        cases.append(case(name, "PT", epochs=[chunks(train, 2)], eval_units=evaluate, packing="knapsack", **options))
    return cases


LOSSES: dict[str, dict[str, Any]] = {
    "smoothed": {"label_smoothing": 0.2},
    "dft": {"loss": "dft"},
    "eaft": {"loss": "eaft"},
    "asft": {"loss": "asft", "asft_alpha": 0.5},
}


def loss_cases() -> list[Case]:
    """SFT's other losses in three layouts; steps of 8 and 2 units."""
    epochs = [chunks(one_document_units("SFT", TRAIN_LENGTHS), 8)]
    cases = []
    for (name, init), rule in product(LOSSES.items(), ("2x4", "8x1", "tokens")):
        train, evaluate = RULES[rule]
        options: dict[str, Any] = {**train, **evaluate, "layout": "padded" if rule == "2x4" else "padding_free"}
        cases.append(case(f"{name}-{rule}", "SFT", epochs=epochs, init=init, tied=rule == "8x1", **options))
    return cases


def filler_cases() -> list[Case]:
    """Steps of 5 units on 3 ranks, and a last one of 5, 1 or 2: some ranks only run fillers."""
    cases = []
    for layout, rule, global_batch_size in (
        ("padded", {"micro_batch_size": 1}, 5),
        ("padding_free", {"micro_batch_size": 2}, 9),
        ("padding_free", {"micro_batch_tokens": 60}, 8),
        ("padded", {"micro_batch_tokens": 60}, 9),
    ):
        for stage, tied in (("PT", True), ("SFT", False)):
            epochs = [chunks(one_document_units(stage, TRAIN_LENGTHS), global_batch_size)]
            name = f"fillers-{stage}-{layout}-{next(iter(rule))}-{global_batch_size}"
            options: dict[str, Any] = {**rule, "layout": layout, "global_batch_size": global_batch_size}
            cases.append(case(name, stage, epochs=epochs, tied=tied, **options))
    return cases


# ---------------------------------------------------------------------- running and comparing


@cache
def references() -> dict[str, Record]:
    return {}


def reference_of(each: Case) -> Record:
    known = references()
    if each.key not in known:
        known[each.key] = plain_loop(each.options, each.epochs, each.eval_units)
    return known[each.key]


def run(cases: list[Case], num_ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    """What every rank saw of every case, from one launch."""
    rows = write_rows(folder)
    for each in cases:
        each.options["data"] |= rows[each.options["stage"]]
    return launch([each.options for each in cases], num_ranks, folder)


def launch(cases: list[dict[str, Any]], num_ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Fit the cases on ranks of their own; what every rank saw of every case."""
    folder.mkdir(exist_ok=True)
    fork_ranks(lambda: fit_all(cases, num_ranks, folder), num_ranks, folder)
    return [[torch.load(folder / f"{each['name']}.{rank}.pt") for rank in range(num_ranks)] for each in cases]


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest difference of any entry, relative to the largest entry of its tensor."""
    assert got.keys() == want.keys()
    return max(float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want)


def differences(each: Case, ranks: list[dict[str, Any]]) -> list[str]:
    """Where a case departs from the plain loop."""
    name, tolerance, want = each.options["name"], TOLERANCE[each.options["dtype"]], reference_of(each)
    found = []
    for rank, record in enumerate(ranks):
        if len(record["gradients"]) != len(want.gradients):
            found.append(f"{name}, rank {rank}: {len(record['gradients'])} steps, not {len(want.gradients)}")
        for step, (got, right) in enumerate(zip(record["gradients"], want.gradients, strict=False)):
            if not (distance := furthest(got, right)) <= tolerance:
                found.append(f"{name}, rank {rank}, step {step}: gradients differ by {distance:.1e}")
        values = [*zip(record["losses"], want.losses, strict=False), (record["val"]["val/loss"], want.val_loss)]
        found += [
            f"{name}, rank {rank}: loss {got}, not {right}"
            for got, right in values
            if not abs(got - right) <= tolerance * right
        ]
        if record["val"]["val/accuracy"] != pytest.approx(want.val_accuracy, abs=1e-12):
            found.append(f"{name}, rank {rank}: accuracy {record['val_accuracy']}, not {want.val_accuracy}")
    return found + unequal_shares(each, ranks)


def unequal_shares(each: Case, ranks: list[dict[str, Any]]) -> list[str]:
    """Where a step's units are not all there once, or ranks run different numbers of micro-batches."""
    name, steps = each.options["name"], [units for epoch in each.epochs for units in epoch]
    found = []
    for step, units in enumerate(steps):
        shares = [record["micro_batches"][step] for record in ranks]
        if len({len(share) for share in shares}) != 1 or not shares[0]:
            found.append(f"{name}, step {step}: {[len(share) for share in shares]} micro-batches on the ranks")
        num_units = sum(number for share in shares for number, _, _ in share)
        num_tokens = sum(number for share in shares for _, number, _ in share)
        want = len(units), sum(len(document.ids) for unit in units for document in unit)
        if (num_units, num_tokens) != want:
            found.append(f"{name}, step {step}: {num_units} units of {num_tokens} tokens, not {want}")
    evaluated = [sum(record["evaluated_units"]) for record in ranks]
    if sum(evaluated) != len(each.eval_units) * len(each.epochs):
        found.append(f"{name}: {evaluated} units evaluated, not {len(each.eval_units)} an epoch")
    return found


def prove(cases: list[Case], num_ranks: int, folder: Path) -> list[list[dict[str, Any]]]:
    records = run(cases, num_ranks, folder)
    found = [line for each, ranks in zip(cases, records, strict=True) for line in differences(each, ranks)]
    assert not found, "\n".join(found)
    return records


# ---------------------------------------------------------------------- the tests


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


def test_on_one_rank_no_layout_changes_gradients_or_eval_loss(tmp_path: Path) -> None:
    prove([*layout_cases(), *short_step_cases(), *pack_cases(), *loss_cases()], 1, tmp_path)


def test_on_two_ranks_no_layout_changes_gradients_or_eval_loss(tmp_path: Path) -> None:
    prove([*layout_cases(), *short_step_cases(), *pack_cases(), *loss_cases()], 2, tmp_path)


def test_on_three_ranks_fillers_add_nothing_and_dropout_is_drawn_apart(tmp_path: Path) -> None:
    cases = filler_cases()
    records = prove(cases, 3, tmp_path)
    for ranks in records:
        seeds = [seed for record in ranks for seed in record["seeds"]]
        assert len(set(seeds)) == len(seeds), "every micro-batch of every rank draws for itself"
    fillers = [
        sum(number == 0 for share in record["micro_batches"] for number, _, _ in share)
        for ranks in records
        for record in ranks
    ]
    assert max(fillers) > 0, "no case had a filler"
