"""The step contract: one Lightning batch is one optimizer step, and how it is laid out never changes the result."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from lf_lightning.console import say
from torch import Tensor
from torchmetrics import MeanMetric

from lf_lightning.callbacks import default_callbacks
from lf_lightning.lightning_private import global_seed
from lf_lightning.models import Backbone, LoRA, Tuning, load_backbone
from lf_lightning.models.export import load_weights, save_unnamed_weights, save_weights
from lf_lightning.models.generation import generate_answers
from lf_lightning.models.probe import check_output_layer, documents_are_isolated
from lf_lightning.models.sharding import clip_gradients, shard
from lf_lightning.optim import AdamW, OptimizerSpec, ScheduleSpec
from lf_lightning.types import (
    Answer,
    BackboneSpec,
    GenerationSpec,
    InputError,
    LossSums,
    PromptBatch,
    StepBatch,
    Task,
    TokenBatch,
    TrainingStopped,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer

PATIENCE_WITH_THE_SCALER = 20
"""Steps in a row that 16-mixed may skip for a gradient that overflows, before it counts as non-finite."""


class Stage(LightningModule, ABC):
    """What all stages share. A stage says what it counts and what it sums; this class makes the optimizer step of it.

    Args:
        backbone: The language model.
        tuning: Which parameters train; LoRA on every linear layer unless given.
        optimizer: The optimizer and its constants.
        schedule: How the learning rate changes.
        max_grad_norm: Largest global norm of the gradient, > 0; larger ones are scaled down to it. Empty: no limit.
        non_finite: A loss or gradient that is not finite: `stop` the run, or `skip` the step and count it.
        generation: How `predict` and callbacks generate answers.
    """

    task: ClassVar[Task]
    coefficients: ClassVar[dict[str, float]]
    """Loss term -> its weight in the loss."""
    metrics: ClassVar[tuple[str, ...]]
    """Names of what `LossSums.metrics` holds."""

    strict_loading = False  # frozen weights are not in a checkpoint

    def __init__(
        self,
        backbone: BackboneSpec,
        tuning: Tuning = LoRA(),
        optimizer: OptimizerSpec = AdamW(),
        schedule: ScheduleSpec = ScheduleSpec(),
        *,
        max_grad_norm: float | None = 1.0,
        non_finite: Literal["stop", "skip"] = "stop",
        generation: GenerationSpec = GenerationSpec(),
    ) -> None:
        super().__init__()
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise InputError(
                f"model.init_args.max_grad_norm: must be positive or null, got {max_grad_norm}. Use null for no limit."
            )
        self.automatic_optimization = False
        self.backbone_spec, self.tuning = backbone, tuning
        self.optimizer_spec, self.schedule_spec = optimizer, schedule
        self.max_grad_norm: float | None = max_grad_norm
        self.non_finite = non_finite
        self.generation = generation
        self.seed = global_seed()
        self.weights_folder: Path | None = None
        """Folder with trained weights to start from; set it before `validate`, `test` or `predict`."""
        self.total_tokens = 0
        """Tokens trained on so far, over all ranks, padding not counted."""
        self.num_skipped_steps = 0
        self._backbone: Backbone | None = None
        self._padding_free: bool | None = None
        self._grad_norm = torch.zeros(())
        self._overflows_in_a_row = 0
        self._tokens_since_log, self._time_of_log = 0, 0.0
        self._means = torch.nn.ModuleDict({name: MeanMetric() for name in (*self.coefficients, *self.metrics)})

    # ------------------------------------------------------------------ what a stage defines

    @abstractmethod
    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Count, from masks alone, what each loss term and each metric of a step is divided by."""

    @abstractmethod
    def micro_batch_loss(self, micro_batch: TokenBatch) -> LossSums:
        """Sum each loss term and each metric over a micro-batch."""

    def prepare_step(self, step: StepBatch) -> None:
        """Compute statistics of the whole step, before its first backward. Most stages have none."""

    # ------------------------------------------------------------------ the model

    @property
    def backbone(self) -> Backbone:
        """The model. It exists once a Trainer has called `configure_model`."""
        assert self._backbone is not None, "the model is built by configure_model"
        return self._backbone

    def configure_model(self) -> None:
        """Build the model, shard it where the strategy asks for it, and leave it in train mode."""
        if self._backbone is not None:
            return
        data = self._datamodule
        backbone = load_backbone(
            self.backbone_spec,
            self.tuning,
            vocab_size=len(data.tokenizer) if data is not None else 0,
            seed=self.seed,
        )
        if data is not None:
            backbone.causal_lm.generation_config.eos_token_id = data.stop_token_ids
            backbone.causal_lm.generation_config.pad_token_id = data.tokenizer.pad_token_id
        if self.weights_folder is not None:
            load_weights(backbone, self.weights_folder)
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(backbone, self.device_mesh)
        self._backbone = backbone.train()
        trained, everything = backbone.num_parameters()
        say(f"model: {trained:,} of {everything:,} parameters train ({100 * trained / everything:.2f} %)")

    def configure_optimizers(self) -> Any:
        """Make the optimizer of the trainable parameters, and its schedule in optimizer steps."""
        optimizer = self.optimizer_spec.build(self.named_parameters())
        schedule = self.schedule_spec.build(optimizer, int(self.trainer.estimated_stepping_batches))
        self._configured = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_callbacks(self) -> Sequence[Callback]:
        """Bring the run folder, the checkpoints and the logs where the trainer has none of ours."""
        present = {type(callback) for callback in self.trainer.callbacks}
        return [callback for callback in default_callbacks() if type(callback) not in present]

    def on_fit_start(self) -> None:
        """Ask the model whether it keeps documents of one row apart, and tell the data what the layout is."""
        self._settle_layout()

    def on_validation_start(self) -> None:
        """Exact sums: float32 would lose counts above 2^24."""
        if self.device.type != "mps":  # which has no float64
            for metric in self._means.values():
                metric.set_dtype(torch.float64)
        if not self.trainer.training and not self.trainer.state.fn == "fit":
            self._settle_layout()

    def _settle_layout(self) -> None:
        check_output_layer(self.backbone)
        data = self._datamodule
        if data is None:
            return
        if self._padding_free is None:
            verdict = torch.tensor(float(documents_are_isolated(self.backbone)), device=self.device)
            self._padding_free = bool(self._reduce(verdict, "min"))
        layout = data.resolve_layout(padding_free=self._padding_free)
        self.backbone.set_layout(layout)
        say(f"data.layout: {layout}" + ("" if self._padding_free else " (documents of a row are not apart)"))

    # ------------------------------------------------------------------ the step

    def training_step(self, step: StepBatch, batch_idx: int) -> None:
        """Make one optimizer step: count, forward and backward each micro-batch, clip, step, schedule."""
        counts = self._global_counts(step)
        self.prepare_step(step)
        sums: dict[str, Tensor] = {}
        last = len(step.micro_batches) - 1
        for index, micro_batch in enumerate(step.micro_batches):
            self._seed_random_layers(index)
            with self._gradient_sync(now=index == last):
                found = self.micro_batch_loss(micro_batch)
                loss = sum(
                    self.coefficients[name] / max(counts[name], 1) * self._num_ranks * term
                    for name, term in found.terms.items()
                )
                self.manual_backward(loss)
            _add(sums, found)
        means, num_tokens = self._global_means(sums, counts, sum(batch.num_tokens for batch in step.micro_batches))
        optimizer = self.optimizers()
        if not all(np.isfinite(value) for value in means.values()):
            self._give_up_step(optimizer, "loss", means)
        optimizer.step()
        self.lr_schedulers().step()
        optimizer.zero_grad(set_to_none=True)
        self._log_step(means, num_tokens)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the global norm of the gradient, after 16-mixed has unscaled it."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._grad_norm = clip_gradients(parameters, self.max_grad_norm)
        if torch.isfinite(self._grad_norm):
            self._overflows_in_a_row = 0
            return
        self._overflows_in_a_row += 1
        if self.trainer.precision == "16-mixed" and self._overflows_in_a_row < PATIENCE_WITH_THE_SCALER:
            return  # the GradScaler skips this step by itself
        self._give_up_step(optimizer, "gradient", {"norm": float(self._grad_norm)})

    def _give_up_step(self, optimizer: Any, what: str, values: dict[str, float]) -> None:
        """Stop, or take the gradients away: stepping without any changes nothing, and the step still counts."""
        step = self.trainer.global_step + 1
        found = ", ".join(f"{name} {value}" for name, value in values.items())
        if self.non_finite == "stop":
            raise TrainingStopped(
                f"step {step}: the {what} is not finite, got {found}. Lower the learning rate or look at the rows of "
                "this step, or set model.init_args.non_finite: skip."
            )
        self.num_skipped_steps += 1
        say(f"step {step}: skipped, the {what} is not finite ({found}); {self.num_skipped_steps} so far")
        optimizer.zero_grad(set_to_none=True)

    def _seed_random_layers(self, micro_batch: int) -> None:
        """Dropout draws a function of (seed, step, rank, micro-batch), so that a resume draws the same."""
        state = np.random.SeedSequence([self.seed, self.trainer.global_step, self.global_rank, micro_batch])
        torch.manual_seed(int(state.generate_state(1, np.uint64)[0] >> 1))

    def _gradient_sync(self, *, now: bool) -> AbstractContextManager[Any]:
        """Reduce gradients over ranks only with the last micro-batch of a step."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) and not now else nullcontext()

    # ------------------------------------------------------------------ sums over ranks

    @property
    def _num_ranks(self) -> int:
        """Data-parallel size, by which the strategy averages gradients."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, ParallelStrategy):
            return 1
        return int(strategy.distributed_sampler_kwargs["num_replicas"])

    def _reduce(self, value: Tensor, operation: str = "sum") -> Tensor:
        reduced = self.trainer.strategy.reduce(value, reduce_op=operation)
        assert isinstance(reduced, Tensor)
        return reduced

    def _global_counts(self, step: StepBatch) -> dict[str, float]:
        """Counts of the step over all ranks, by one small all-reduce."""
        counts = self.step_counts(step)
        vector = torch.tensor(list(counts.values()), dtype=self._exact, device=self.device)
        return dict(zip(counts, self._reduce(vector).tolist(), strict=True))

    def _global_means(
        self, sums: dict[str, Tensor], counts: dict[str, float], num_tokens: int
    ) -> tuple[dict[str, float], int]:
        """Loss and metrics of the step, and its tokens, over all ranks, by one small all-reduce."""
        vector = torch.stack([*(value.to(self._exact) for value in sums.values()), self._number(num_tokens)])
        *totals, tokens = self._reduce(vector).tolist()
        means = {name: total / max(counts[name], 1) for name, total in zip(sums, totals, strict=True)}
        return {"loss": self._weighted(means), **means}, int(tokens)

    def _weighted(self, means: dict[str, float]) -> float:
        return sum(coefficient * means[name] for name, coefficient in self.coefficients.items())

    def _number(self, value: int) -> Tensor:
        return torch.tensor(value, dtype=self._exact, device=self.device)

    @property
    def _exact(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64

    # ------------------------------------------------------------------ validation

    def validation_step(self, step: StepBatch, batch_idx: int) -> None:
        """Add a micro-batch to the sums of the set."""
        (micro_batch,) = step.micro_batches
        counts = self.step_counts(step)
        found = self.micro_batch_loss(micro_batch)
        for name, value in {**found.terms, **found.metrics}.items():
            if counts[name]:
                self._means[name].update(value.to(self._exact) / counts[name], counts[name])

    def on_validation_epoch_end(self) -> None:
        """Reduce the sums of the whole set over ranks, once, and log their ratios."""
        self._log_set("val")

    def test_step(self, step: StepBatch, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(step, batch_idx)

    def on_test_start(self) -> None:
        """As `on_validation_start`."""
        self.on_validation_start()

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_set("test")

    def _log_set(self, prefix: str) -> None:
        means = {name: float(metric.compute()) for name, metric in self._means.items()}
        for metric in self._means.values():
            metric.reset()
        values = {"loss": self._weighted(means), **means}
        names = self.reported(values)
        self.log_dict(
            {f"{prefix}/{name}": torch.tensor(value, dtype=self._exact) for name, value in names.items()},
            sync_dist=True,
        )

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of a step or a set: loss and metrics, and what follows from them."""
        return {name: value for name, value in means.items() if name not in self.coefficients or len(self.coefficients) > 1}

    # ------------------------------------------------------------------ prediction

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[Answer]:
        """Answer the prompts of a batch."""
        return self.answers(batch)

    def answers(self, batch: PromptBatch) -> list[Answer]:
        """Generate an answer to each prompt, as the generation spec says; fillers are left out."""
        data = self._datamodule
        assert data is not None, "answers need the DataModule's tokenizer"
        tokens = generate_answers(
            self.backbone,
            batch,
            self.generation,
            stop_token_ids=data.stop_token_ids,
            pad_token_id=data.tokenizer.pad_token_id,
        )
        texts = data.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        rows = zip(batch.rows, batch.prompts, texts, batch.references, strict=True)
        return [Answer(row, prompt, text, label) for row, prompt, text, label in rows if row >= 0]

    # ------------------------------------------------------------------ state

    def save_pretrained(self, folder: Path) -> None:
        """Write the trained weights as transformers or peft would, with what only a resume needs in trainer_state/."""
        save_weights(self.backbone, folder, base=self.backbone_spec.path)
        if (folder / "trainer_state").is_dir():
            save_unnamed_weights(self.backbone, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resume needs beside the weights, which lie in the folder already."""
        checkpoint["state_dict"] = {}
        checkpoint["stage"] = {
            "name": type(self).__name__,
            "padding_free": self._padding_free,
            "total_tokens": self.total_tokens,
            "num_skipped_steps": self.num_skipped_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the weights of the checkpoint's folder, and with the layout that the run had settled on."""
        state = checkpoint["stage"]
        if state["name"] != type(self).__name__:
            raise InputError(
                f"model.class_path: must be {state['name']}, the stage of this checkpoint, got {type(self).__name__}. "
                "Change it, or start without --ckpt_path."
            )
        self._padding_free = state["padding_free"]
        self.total_tokens, self.num_skipped_steps = state["total_tokens"], state["num_skipped_steps"]
        load_weights(self.backbone, Path(str(self.trainer.ckpt_path)).parent.parent)

    def on_train_start(self) -> None:
        """What the configuration says of the optimizer beats what a checkpoint remembers."""
        optimizer, schedule = self.optimizers().optimizer, self.lr_schedulers()
        for group, configured in zip(optimizer.param_groups, self._configured, strict=True):
            group.update(configured)
        schedule.base_lrs = [configured["initial_lr"] for configured in self._configured]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, factors, strict=True):
            group["lr"] = base * factor
        self._tokens_since_log, self._time_of_log = 0, time.perf_counter()

    # ------------------------------------------------------------------ logging

    def _log_step(self, means: dict[str, float], num_tokens: int) -> None:
        """Log the step where it is due: loss of this very step, so that a resumed run logs the same."""
        self.total_tokens += num_tokens
        self._tokens_since_log += num_tokens
        step = self.trainer.global_step
        if step % self.trainer.log_every_n_steps and step != self.trainer.estimated_stepping_batches:
            return
        now = time.perf_counter()
        values = {f"train/{name}": value for name, value in self.reported(means).items()}
        values["train/grad_norm"] = float(self._grad_norm)
        values["train/learning_rate"] = float(self.lr_schedulers().get_last_lr()[0])
        speed = self._tokens_since_log / max(now - self._time_of_log, 1e-9)
        self._tokens_since_log, self._time_of_log = 0, now
        self.log_dict({name: torch.tensor(value, dtype=self._exact) for name, value in values.items()})
        self.log("tokens/s", torch.tensor(speed, dtype=self._exact), prog_bar=True)
        self.log("loss", torch.tensor(means["loss"], dtype=self._exact), prog_bar=True, logger=False)

    @property
    def _datamodule(self) -> Any:
        """Lightning types this attribute as any DataModule; ours has a tokenizer. None where the user brings loaders."""
        return self.trainer.datamodule


def _add(sums: dict[str, Tensor], found: LossSums) -> None:
    for name, value in {**found.terms, **found.metrics}.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()
