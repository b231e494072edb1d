"""The one DataModule: from named datasets to optimizer steps, the same for every stage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

from lf_lightning.console import say
from lf_lightning.data.batches import settled_layout, settled_sharing
from lf_lightning.data.checks import JUDGING, ROLLING, check_options, given_backbone
from lf_lightning.data.doors import DataDoors
from lf_lightning.data.encode import EncodeOptions
from lf_lightning.data.layout import micro_batch_rules, plan_lines
from lf_lightning.data.loader import EvalLoader, StepLoader
from lf_lightning.data.prompt_sets import PromptSets
from lf_lightning.data.reader import Names, Reader
from lf_lightning.data.resume import DECIDING, check_continues, contents_of_prompts, contents_of_store, keeps_place
from lf_lightning.data.rollouts import RolloutLoader, prompt_rows_of
from lf_lightning.data.sets import EncodedSets, Split
from lf_lightning.data.stream import MixStrategy
from lf_lightning.data.stream_checks import check_stream_run
from lf_lightning.data.stream_documents import StreamDocuments
from lf_lightning.data.stream_loader import StreamLoader
from lf_lightning.data.stream_sets import StreamSets
from lf_lightning.lightning_private import global_seed
from lf_lightning.types import (
    BackboneSpec,
    InputError,
    Isolation,
    Layout,
    Task,
    UnitId,
)

SETS: dict[Split, str] = {
    "train": "datasets",
    "val": "eval_datasets",
    "test": "test_datasets",
    "predict": "predict_datasets",
}
"""Set -> the option that names its datasets."""
WANTED: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""What the trainer does -> the sets that are encoded for it; the first must exist."""
KINDS: dict[Task, type[EncodedSets]] = dict.fromkeys(ROLLING, PromptSets)
"""Task -> its sets, where they are no encoded ones."""
NOT_OPTIONS = ("self", "__class__", "backbone", "task")


class DataModule(DataDoors):
    """Datasets, template, batches and their order.

    Args:
        backbone: Whose tokenizer encodes. On the command line this is the stage's own backbone.
        task: How rows are encoded. On the command line the stage decides.
        datasets: What trains: names in dataset_info.json, or inline sources such as {path: my.json} or
            {records: [{instruction: ..., output: ...}]}.
        eval_datasets: What validates, instead of a share of the training rows.
        test_datasets: What `test` measures.
        predict_datasets: What `predict` answers, or scores with rm; empty means the validation rows.
        dataset_dir: Folder of dataset_info.json and of the files it names.
        allow_outside: Whether dataset_info.json may name files outside of its folder, also through symbolic links.
        template: `auto` for the tokenizer's own chat template, or the name of one: default, empty, chatml, qwen,
            llama3, alpaca.
        max_length: Most tokens of a sequence or of a pack, > 1; longer rows are cut.
        max_samples: Use only the first rows of each dataset; empty means all.
        val_size: Rows of the training data that validate instead: a count (>= 1) or a share (below 1); 0 means none.
            With streaming a count, of the first rows.
        global_batch_size: Units per optimizer step over all devices: the batch size of the mathematics. With ppo and
            grpo the responses of a minibatch.
        rollout_size: ppo, grpo: responses that are drawn, scored and then learned together; a multiple of grpo's
            group_size. Empty means global_batch_size.
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
        share_prompt: rm, dpo, kto: run the prompt once for both responses; empty means where layout and model allow.
        kl_pairs: kto: whose response stands against a prompt in the estimate of the KL. `step`: that of the next unit
            of the optimizer step, for the last unit the first's; `dataset`: that of the row before, always the same.
        shuffle: Visit the rows in a new order each epoch; false keeps the order of the files.
        streaming: Read and encode the training rows while training, and as many as trainer.max_steps wants: for data
            that is too large to encode beforehand. Validation rows are read at the start.
        buffer_size: streaming: rows that are read, mixed and used together; 1 mixes none. Empty means 16384.
        mix_strategy: streaming: how several datasets become one stream. `concat`: their files one after the other, in a
            new order each pass. `interleave_under`, `interleave_over`, `interleave_once`: row by row, until the first
            dataset has ended; until all have, where those that have begin anew; or until all have, each row once.
        interleave_probs: streaming: how often a row is drawn from each of `datasets`, in their order; they are divided
            by their sum. Empty draws from them in turn.
        seed: Seed of order and split; empty means the value of seed_everything.
        mask_history: Learn only the last answer of a conversation.
        train_on_prompt: Learn the prompt too.
        history: What a conversation becomes where the template rewrites earlier turns: `per_turn` one sequence for
            each answer as it was at its turn, `whole` one sequence of which only the last answer is learned.
        invalid_rows: A row that cannot be used: `stop` with its name, or `skip` it and count it.
        cache_dir: Where encoded data is kept between runs; empty keeps it in memory only.
        num_workers: Processes that encode; empty means this one.
        accept_changes: Continue a checkpoint although data, template, seed or batch size are no longer its own; each
            difference is said. The units that it has consumed are then counted in the new order.
    """

    _train_loader: StepLoader | RolloutLoader | StreamLoader | None = None
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
        allow_outside: bool = False,
        template: str = "auto",
        max_length: int = 2048,
        max_samples: int | None = None,
        val_size: float = 0.0,
        global_batch_size: int = 8,
        rollout_size: int | None = None,
        micro_batch_size: int | None = None,
        micro_batch_tokens: int | None = None,
        eval_micro_batch_size: int | None = None,
        eval_micro_batch_tokens: int | None = None,
        layout: Literal["auto", "padded", "padding_free"] = "auto",
        packing: Literal["none", "blocks", "knapsack"] = "none",
        isolate_documents: bool | None = None,
        share_prompt: bool | None = None,
        kl_pairs: Literal["step", "dataset"] = "step",
        shuffle: bool = True,
        streaming: bool = False,
        buffer_size: int | None = None,
        mix_strategy: MixStrategy = "concat",
        interleave_probs: Sequence[float] | None = None,
        seed: int | None = None,
        mask_history: bool = False,
        train_on_prompt: bool = False,
        history: Literal["per_turn", "whole"] = "per_turn",
        invalid_rows: Literal["stop", "skip"] = "stop",
        cache_dir: str | None = "~/.cache/lf_lightning",
        num_workers: int | None = None,
        accept_changes: bool = False,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in NOT_OPTIONS}
        super().__init__()
        check_options(task, **arguments)
        self.options = EncodeOptions(task, max_length, packing, train_on_prompt, mask_history, history)
        self._take(given_backbone(backbone), arguments)

    def _take(self, backbone: BackboneSpec, arguments: dict[str, Any]) -> None:
        """Take over options that have been checked."""
        self.task, self.backbone, self.arguments, self.stored_reference = self.options.task, backbone, arguments, {}
        self.global_batch_size: int = arguments["global_batch_size"]
        self.rule, self.eval_rule = micro_batch_rules(arguments)
        self.seed = global_seed() if arguments["seed"] is None else arguments["seed"]
        self.reader = Reader(backbone, self.options, arguments)
        kind = StreamSets if arguments["streaming"] else KINDS.get(self.task, EncodedSets)
        self.sets = kind(self.reader, self.names, val_size=arguments["val_size"], seed=self.seed)
        self._layout = "padded" if arguments["layout"] == "auto" else arguments["layout"]
        self._share_prompt = bool(arguments["share_prompt"])

    @property
    def names(self) -> dict[Split, Names]:
        """The datasets of each set."""
        return {split: self.arguments[option] for split, option in SETS.items()}

    def resolve_layout(self, verdict: Isolation) -> Layout:
        """Take the verdict of the stage's probe on the layouts in which the model keeps documents of a row apart.

        Raises:
            InputError: The configuration needs what the model cannot do.
        """
        isolates = self.options.packing != "none" and self.isolate_documents
        self._layout = settled_layout(self.arguments["layout"], verdict, packs_isolated=isolates)
        if self.task in JUDGING:
            self._share_prompt = settled_sharing(self.arguments["share_prompt"], verdict, self._layout)
        return self._layout

    # ------------------------------------------------------------------ Lightning's hooks

    def open_sets(self, verb: str) -> None:
        """Encode or open what the trainer is about to read: before its process group starts, whose time-outs run.

        Processes that share `cache_dir` share the work. The gate calls it, and from Python the stage; without one of
        ours `prepare_data` does. What is open already takes no time.

        Args:
            verb: `fit`, `validate`, `test` or `predict`.

        Raises:
            InputError: A row cannot be used, or `cache_dir` cannot be written; on every process.
        """
        for split in self._wanted(verb):
            if split in self.sets:
                self.sets.open(split)

    def prepare_data(self) -> None:
        """Encode what the run needs and is not in the cache yet, on one process of each node."""
        verb = self.trainer.state.fn if self.trainer is not None else None
        if self.arguments["cache_dir"]:
            self.open_sets(verb or "fit")

    def setup(self, stage: str) -> None:
        """Open the encoded sets and say what was kept, cut and dropped.

        Raises:
            InputError: There is nothing to do the stage with.
        """
        splits = self._wanted(stage)
        for split in splits[:1]:
            if split not in self.sets:
                raise InputError(f"data.{SETS[split]}: must name at least one dataset, got none. Name one.")
        for line in [line for split in splits for line in self.sets.lines(split)]:
            say(line)

    def _wanted(self, verb: str) -> tuple[Split, ...]:
        """The sets that are encoded for what the trainer does; the first must exist."""
        return (self.sets.predicted,) if verb == "predict" and self.task == "rm" else WANTED.get(verb, ())

    def train_dataloader(self) -> StepLoader | RolloutLoader | StreamLoader:
        """The optimizer steps of this rank."""
        if isinstance(self.sets, StreamSets):
            loader: StepLoader | RolloutLoader | StreamLoader = self._stream(self.sets)
        else:
            loader = self._rollouts() if self.task in ROLLING else self._steps()
        self._train_loader = loader
        cursor, self._cursor = self._cursor, None
        if cursor is not None:
            accepts, in_rollout = self.arguments["accept_changes"], bool(cursor.get("rollout_step"))
            before, now = cursor["order"], self._order(loader.num_units)
            check_continues(before, now, accepts=accepts, in_rollout=in_rollout)
            if isinstance(loader, StreamLoader) and not keeps_place(before, now):
                loader.begin_next_pass(cursor)
            else:
                loader.load_state_dict(cursor)
        return loader

    def _stream(self, sets: StreamSets) -> StreamLoader:
        max_steps, max_epochs = (self.trainer.max_steps, self.trainer.max_epochs) if self.trainer else (-1, None)
        check_stream_run(max_steps=max_steps, max_epochs=max_epochs)
        stream, encoder = sets.stream(self.arguments), sets.encoder
        size = f"{self.global_batch_size:,} units"
        say(f"train: {max_steps:,} steps of {size}, rows mixed {stream.plan.buffer_size:,} at a time")
        return StreamLoader(
            StreamDocuments(stream, encoder, invalid_rows=self.arguments["invalid_rows"]),
            encoder,
            num_steps=max_steps,
            global_batch_size=self.global_batch_size,
            arrange=lambda units, store: self._batches.step(units, store, self.rule),
            wants_partners=lambda: self.task == "kto" and self.wants_partners,
        )

    def _steps(self) -> StepLoader:
        costs = self._batches.costs(self.units("train"), self.sets["train"].store)
        for line in plan_lines(costs, self.global_batch_size, self.rule):
            say(line)
        return StepLoader(
            units_of_epoch=partial(self.units, "train"),
            num_units=len(costs),
            global_batch_size=self.global_batch_size,
            arrange=self._arrange,
        )

    def _rollouts(self) -> RolloutLoader:
        prompts, plan = self.prompts("train"), self._rollout_plan.check()
        loader = RolloutLoader(
            prompts,
            plan,
            rule=self.rule,
            batches=lambda: self._batches,
            stage=self._rolling_stage,
            batch_size=self.predict_batch_size,
            pad_id=int(self.tokenizer.pad_token_id),
        )
        say(plan.line(len(prompts), len(loader)))
        return loader

    @property
    def rollout_in_progress(self) -> bool:
        """Whether steps of a begun rollout are left."""
        return isinstance(self._train_loader, RolloutLoader) and self._train_loader.in_rollout

    def rows_asked(self) -> tuple[UnitId, ...]:
        """The rows whose prompts are being answered, or were last; none but with ppo and grpo."""
        return prompt_rows_of(self._train_loader.asked) if isinstance(self._train_loader, RolloutLoader) else ()

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

    def _order(self, num_units: int | None) -> dict[str, Any]:
        """What the units and their order follow from; what names a difference best comes first.

        Names and paths of datasets are not in it: they may hold what belongs into no file, and the content says more.
        """
        options = {name: self.arguments[name] for name in DECIDING}
        plan = self._rollout_plan._asdict() if self.task in ROLLING else {}
        plan |= {"tokens": self.sets.tokens()} if isinstance(self.sets, StreamSets) else {}
        return {"seed": self.seed, **options, **plan, "num_units": num_units, "content": self._content}

    @cached_property
    def _content(self) -> str:
        if isinstance(self.sets, StreamSets):
            return self.sets.contents()
        if self.task in ROLLING:
            return contents_of_prompts(self.prompts("train"))
        return contents_of_store(self.sets["train"].store)

    def val_dataloader(self) -> EvalLoader | list[EvalLoader]:
        """The validation set in micro-batches, with ppo and grpo its prompts; nothing where there is none."""
        return self._measured("val") if "val" in self.sets else []

    def test_dataloader(self) -> EvalLoader:
        """The test set in micro-batches, with ppo and grpo its prompts."""
        return self._measured("test")

    def predict_dataloader(self) -> EvalLoader:
        """The prompts to answer, in batches of this rank; with rm the pairs to score, in micro-batches."""
        if self.task == "rm":
            return EvalLoader(partial(self._one_by_one, self.sets.predicted))
        return self.prompt_loader("predict", batch_size=self.predict_batch_size)

    def _measured(self, split: Split) -> EvalLoader:
        if self.task in ROLLING:
            return self.prompt_loader(split, batch_size=self.predict_batch_size)
        return EvalLoader(partial(self._one_by_one, split))
