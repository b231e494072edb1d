"""The one DataModule: from named datasets to optimizer steps, the same for every stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ParallelStrategy

from lf_lightning.console import say
from lf_lightning.data.checks import check_options, check_same_order, given_backbone
from lf_lightning.data.collate import prompt_batch, token_batch
from lf_lightning.data.encode import EncodeOptions
from lf_lightning.data.layout import MicroBatchRule, micro_batch_plan, micro_batch_rule, plan_lines
from lf_lightning.data.loader import EvalLoader, StepLoader
from lf_lightning.data.prompts import Prompt, prompt_rows
from lf_lightning.data.sets import EncodedSets, Names, Split
from lf_lightning.data.sources import resolve_sources
from lf_lightning.data.store import TokenStore, build_store
from lf_lightning.data.templates import Template, load_template, stop_token_ids
from lf_lightning.data.tokenizer import fit_tokenizer, load_tokenizer
from lf_lightning.lightning_private import global_seed
from lf_lightning.types import BackboneSpec, InputError, Isolation, Layout, PromptBatch, StepBatch, Task, Unit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETS: dict[Split, str] = {
    "train": "datasets",
    "val": "eval_datasets",
    "test": "test_datasets",
    "predict": "predict_datasets",
}
"""Set -> the option that names its datasets."""
WANTED: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""What the trainer does -> the sets that are encoded for it; the first must exist."""
NOT_OPTIONS = ("self", "__class__", "backbone", "task")


class DataModule(LightningDataModule):
    """Datasets, template, batches and their order.

    Args:
        backbone: Whose tokenizer encodes. On the command line this is the stage's own backbone.
        task: How rows are encoded. On the command line the stage decides.
        datasets: What trains: names in dataset_info.json, or inline sources such as {path: my.json}.
        eval_datasets: What validates, instead of a share of the training rows.
        test_datasets: What `test` measures.
        predict_datasets: What `predict` answers; empty means the validation rows.
        dataset_dir: Folder of dataset_info.json and of the files it names.
        template: `auto` for the tokenizer's own chat template, or the name of one: default, empty, chatml, qwen,
            llama3, alpaca.
        max_length: Most tokens of a sequence or of a pack, > 1; longer rows are cut.
        max_samples: Use only the first rows of each dataset; empty means all.
        val_size: Rows of the training data that validate instead: a count (>= 1) or a share (below 1); 0 means none.
        global_batch_size: Units per optimizer step over all devices: the batch size of the mathematics.
        micro_batch_size: Units that one device computes at once. Excludes micro_batch_tokens.
        micro_batch_tokens: Tokens that one device computes at once, padding included. Empty, with micro_batch_size
            empty too, means 8192.
        eval_micro_batch_size: The same for validation; empty means as in training.
        eval_micro_batch_tokens: The same for validation; empty means as in training.
        layout: `padding_free` puts the units of a micro-batch into one row, `padded` into rows of the same length.
            `auto` takes padding_free where the model passes a probe before the first step.
        packing: What makes a unit. `none`: each sequence. `blocks`: documents end to end, cut every max_length tokens.
            `knapsack`: whole documents packed up to max_length tokens.
        isolate_documents: Whether documents of a pack are hidden from each other; empty means yes for knapsack, no for
            blocks.
        shuffle: Visit the rows in a new order each epoch; false keeps the order of the files.
        seed: Seed of order and split; empty means the value of seed_everything.
        mask_history: Learn only the last answer of a conversation.
        train_on_prompt: Learn the prompt too.
        history: What a conversation becomes where the template rewrites earlier turns: `per_turn` one sequence for
            each answer as it was at its turn, `whole` one sequence of which only the last answer is learned.
        invalid_rows: A row that cannot be used: `stop` with its name, or `skip` it and count it.
        cache_dir: Where encoded data is kept between runs; empty keeps it in memory only.
        num_workers: Processes that encode; empty means this one.
    """

    _tokenizer: PreTrainedTokenizerBase | None = None
    _train_loader: StepLoader | None = None
    _cursor: dict[str, Any] | None = None

    def __init__(
        self,
        backbone: BackboneSpec | None = None,
        task: Task = "sft",
        *,
        datasets: Sequence[str | dict[str, Any]] = (),
        eval_datasets: Sequence[str | dict[str, Any]] = (),
        test_datasets: Sequence[str | dict[str, Any]] = (),
        predict_datasets: Sequence[str | dict[str, Any]] = (),
        dataset_dir: str = "data",
        template: str = "auto",
        max_length: int = 2048,
        max_samples: int | None = None,
        val_size: float = 0.0,
        global_batch_size: int = 8,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        eval_micro_batch_size: int | None = None,
        eval_micro_batch_tokens: int | None = None,
        layout: Literal["auto", "padded", "padding_free"] = "auto",
        packing: Literal["none", "blocks", "knapsack"] = "none",
        isolate_documents: bool | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        mask_history: bool = False,
        train_on_prompt: bool = False,
        history: Literal["per_turn", "whole"] = "per_turn",
        invalid_rows: Literal["stop", "skip"] = "stop",
        cache_dir: str | None = "~/.cache/lf_lightning",
        num_workers: int | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in NOT_OPTIONS}
        super().__init__()
        check_options(**arguments)
        self.arguments = arguments
        """The options as they were given, without the two that the stage decides."""
        self.backbone, self.task, self.global_batch_size = given_backbone(backbone), task, global_batch_size
        self.names: dict[Split, Names] = {split: arguments[option] for split, option in SETS.items()}
        self.rule = micro_batch_rule(micro_batch_size, micro_batch_tokens) or MicroBatchRule(None, 8192)
        self.eval_rule = micro_batch_rule(eval_micro_batch_size, eval_micro_batch_tokens) or self.rule
        self.isolate_documents = packing == "knapsack" if isolate_documents is None else isolate_documents
        self.seed = global_seed() if seed is None else seed
        self.options = EncodeOptions(task, max_length, packing, train_on_prompt, mask_history, history)
        self.sets = EncodedSets(self._build, self.names, val_size=val_size, seed=self.seed)
        self._layout: Layout | None = None if layout == "auto" else layout

    # ------------------------------------------------------------------ what stages and callbacks ask

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the template that the data is rendered with."""
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.backbone)
            self._template = load_template(self.arguments["template"], tokenizer, self.task)
            fit_tokenizer(tokenizer, self._template)
            self._tokenizer = tokenizer
        return self._tokenizer

    @property
    def template(self) -> Template:
        """The chat template."""
        assert self.tokenizer is not None  # reading it loads both
        return self._template

    @property
    def stop_token_ids(self) -> list[int]:
        """Tokens that end an answer."""
        return stop_token_ids(self.template, self.tokenizer)

    @property
    def layout(self) -> Layout:
        """How micro-batches lie in memory: as asked for, or as the stage's probe decided."""
        return self._layout or "padded"

    def resolve_layout(self, verdict: Isolation) -> Layout:
        """Take the verdict of the stage's probe on the layouts in which the model keeps documents of a row apart.

        Raises:
            InputError: The configuration needs what the model cannot do.
        """
        if self.arguments["layout"] == "padding_free" and not verdict.padding_free:
            raise InputError(
                "data.layout: padding_free needs a model whose documents do not see each other, "
                "got one that failed the probe. Set data.layout: padded."
            )
        if self.arguments["layout"] == "auto":
            self._layout = "padding_free" if verdict.padding_free else "padded"
        isolates = self.options.packing != "none" and self.isolate_documents
        if isolates and self.layout == "padded" and not verdict.padded:
            raise InputError(
                "data.isolate_documents: needs a model whose documents do not see each other in one row, "
                "got one that failed the probe in the padded layout. Set it to false, or data.packing: none."
            )
        return self.layout

    # ------------------------------------------------------------------ Lightning's hooks

    def prepare_data(self) -> None:
        """Encode what the run needs and is not in the cache yet, on one process of each node."""
        verb = self.trainer.state.fn if self.trainer is not None else None
        for split in WANTED.get(verb or "fit", ()) if self.arguments["cache_dir"] else ():
            names = self.names[split] or (self.names["train"] if split == "val" and self.arguments["val_size"] else ())
            if names:
                self._build(names)

    def setup(self, stage: str) -> None:
        """Open the encoded sets and say what was kept, cut and dropped.

        Raises:
            InputError: There is nothing to do the stage with.
        """
        splits = WANTED.get(stage, ())
        for split in splits[:1]:
            if split not in self.sets:
                raise InputError(f"data.{SETS[split]}: must name at least one dataset, got none. Name one.")
        for split in splits:
            if split in self.sets and self.names[split]:
                for line in self.sets.lines(split):
                    say(line)

    def train_dataloader(self) -> StepLoader:
        """The optimizer steps of this rank."""
        lengths = [unit.num_tokens for unit in self.units("train")]
        for line in plan_lines(lengths, self.global_batch_size, self.rule):
            say(line)
        self._train_loader = StepLoader(
            units_of_epoch=partial(self.units, "train"),
            num_units=len(lengths),
            global_batch_size=self.global_batch_size,
            arrange=self._arrange,
        )
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            check_same_order(cursor["order"], self._order(len(lengths)))
            self._train_loader.load_state_dict(cursor)
        return self._train_loader

    def state_dict(self) -> dict[str, Any]:
        """The cursor of the training loader: how many units of which epoch are consumed, in which order."""
        if self._train_loader is None:
            return {}
        return {**self._train_loader.state_dict(), "order": self._order(self._train_loader.num_units)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader begin where `state_dict` was taken.

        Lightning hands a loader its own state only where nobody has asked for the number of steps before: too late.
        """
        self._cursor = state_dict or None

    def _order(self, num_units: int) -> dict[str, Any]:
        """What the order of the units follows from."""
        names = ("shuffle", "max_length", "packing", "val_size")
        return {"seed": self.seed, **{name: self.arguments[name] for name in names}, "num_units": num_units}

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """The validation set in micro-batches; nothing where there is none."""
        return EvalLoader(partial(self._eval_batches, "val")) if "val" in self.sets else []

    def test_dataloader(self) -> EvalLoader:
        """The test set in micro-batches."""
        return EvalLoader(partial(self._eval_batches, "test"))

    def predict_dataloader(self) -> EvalLoader:
        """The prompts to answer, in batches of this rank."""
        return self.prompt_loader("predict", batch_size=self.predict_batch_size)

    predict_batch_size = 8  # prompts of a batch; the stage sets it from its generation spec

    # ------------------------------------------------------------------ doors for notebooks and callbacks

    def units(self, split: Split, epoch: int = 0) -> list[Unit]:
        """The units of an epoch in their order: a function of (data, seed, epoch) alone."""
        return self.sets[split].units(
            packing=self.options.packing,
            max_length=self.options.max_length,
            seed=self.seed,
            epoch=epoch,
            shuffle=self.arguments["shuffle"] and split == "train",
        )

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of a set with the answers that the data gives; validation rows of a split training set too.

        Raises:
            InputError: There is no such set.
        """
        if split == "predict" and not self.names["predict"]:
            split = "val"
        if split == "val" and not self.names["val"] and "val" in self.sets:
            chosen = self.sets["val"].row_keys()
            everything = self._read_prompts(self.names["train"])
            return [prompt for prompt in everything if (prompt.source, prompt.row) in chosen]
        if not self.names[split]:
            raise InputError("data.predict_datasets: must name prompts to answer, got none. Name at least one dataset.")
        return self._read_prompts(self.names[split])

    def prompt_loader(self, split: Split, *, batch_size: int) -> EvalLoader:
        """The prompts of a set in batches of this rank; the same number of batches on every rank."""
        return EvalLoader(partial(self._prompt_batches, split, batch_size))

    @property
    def _rank_and_size(self) -> tuple[int, int]:
        """This process among the data-parallel ones: the strategy knows, also where ranks share a model."""
        strategy = self.trainer.strategy if self.trainer is not None else None
        if not isinstance(strategy, ParallelStrategy):
            return 0, 1
        place = strategy.distributed_sampler_kwargs
        return int(place["rank"]), int(place["num_replicas"])

    def _build(self, names: Names) -> TokenStore:
        given = self.arguments
        return build_store(
            resolve_sources(list(names), self.arguments["dataset_dir"]),
            self.options,
            self.tokenizer,
            self.template,
            cache_dir=Path(given["cache_dir"]).expanduser() if given["cache_dir"] else None,
            num_workers=given["num_workers"],
            max_samples=given["max_samples"],
            invalid_rows=given["invalid_rows"],
        )

    def _read_prompts(self, names: Names) -> list[Prompt]:
        return prompt_rows(
            resolve_sources(list(names), self.arguments["dataset_dir"]),
            self.tokenizer,
            self.template,
            task=self.task,
            max_samples=self.arguments["max_samples"],
            invalid_rows=self.arguments["invalid_rows"],
        )

    def _arrange(self, units: Sequence[Unit]) -> StepBatch:
        rank, num_ranks = self._rank_and_size
        plan = micro_batch_plan(
            [unit.num_tokens for unit in units], num_ranks=num_ranks, rule=self.rule, layout=self.layout
        )
        return StepBatch(tuple(self._collate("train", units, positions) for positions in plan[rank]))

    def _collate(self, split: Split, units: Sequence[Unit], positions: Sequence[int]) -> Any:
        chosen = [units[position] for position in positions]
        return token_batch(chosen, self.sets[split].store, layout=self.layout, isolate=self.isolate_documents)

    def _eval_batches(self, split: Split) -> list[partial[StepBatch]]:
        units = self.units(split)
        rank, num_ranks = self._rank_and_size
        lengths = [unit.num_tokens for unit in units]
        plan = micro_batch_plan(lengths, num_ranks=num_ranks, rule=self.eval_rule, layout=self.layout)
        return [partial(self._eval_batch, split, units, positions) for positions in plan[rank]]

    def _eval_batch(self, split: Split, units: Sequence[Unit], positions: Sequence[int]) -> StepBatch:
        return StepBatch((self._collate(split, units, positions),))

    def _prompt_batches(self, split: Split, batch_size: int) -> list[partial[PromptBatch]]:
        prompts = self.prompts(split)
        rank, num_ranks = self._rank_and_size
        longest_first = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row].ids), row))
        batches: list[partial[PromptBatch]] = []
        for start in range(0, len(prompts), batch_size * num_ranks):
            rows = longest_first[start : start + batch_size * num_ranks][rank::num_ranks]
            chosen = [prompts[row] for row in rows] or [prompts[0]]
            batches.append(partial(prompt_batch, chosen, rows or [-1], pad_id=int(self.tokenizer.pad_token_id)))
        return batches
