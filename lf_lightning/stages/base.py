"""The step contract: one Lightning batch is one optimizer step, and how it is laid out never changes the result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lf_lightning.callbacks import default_callbacks
from lf_lightning.lightning_private import global_seed
from lf_lightning.models import Backbone, GenerationSpec, LoRA, Tuning
from lf_lightning.models.export import load_weights, save_weights
from lf_lightning.models.quantization import check_quantized
from lf_lightning.optim import AdamW, OptimizerSpec, ScheduleSpec, group_options, restate, trained_parameters
from lf_lightning.stages.answers import answers_of
from lf_lightning.stages.building import build_backbone, check_gradients_meet
from lf_lightning.stages.deepspeed import check_stage
from lf_lightning.stages.doors import check_trainer, open_data
from lf_lightning.stages.layout import settle_layout
from lf_lightning.stages.means import SetMeans
from lf_lightning.stages.non_finite import NonFinite, is_scaled
from lf_lightning.stages.optimization import active_part, optimizer_and_schedule
from lf_lightning.stages.optimizer_doors import check_in_run, check_specs
from lf_lightning.stages.ranks import Ranks, seed_random_layers
from lf_lightning.stages.resume import restore, save_unnamed_weights, state_of, use_any_optimizer_state
from lf_lightning.stages.speed import TokenCount
from lf_lightning.stages.step_log import log_step
from lf_lightning.stages.stepping import clip, step_optimizer
from lf_lightning.types import (
    Answer,
    BackboneSpec,
    Isolation,
    LossSums,
    PromptBatch,
    StepBatch,
    Task,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer


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
    metrics: tuple[str, ...]
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
        check_quantized(backbone, tuning)
        self.automatic_optimization = False
        self.backbone_spec, self.tuning = backbone, tuning
        self.optimizer_spec, self.schedule_spec = optimizer, schedule
        self.max_grad_norm, self.non_finite, self.generation = max_grad_norm, non_finite, generation
        check_specs(self)
        self.seed = global_seed()
        self.weights_folder: Path | None = None
        """Folder with trained weights to start from; set it before `validate`, `test` or `predict`."""
        self.memory: dict[str, float] = {}
        """Numbers that a stage carries from step to step; a checkpoint holds them."""
        self.tokens, self.guard = TokenCount(), NonFinite(non_finite)
        self._backbone: Backbone | None = None
        self.isolation: Isolation | None = None
        self.grad_norm = self._loss = 0.0
        self._means = SetMeans([])

    # ------------------------------------------------------------------ what a stage defines

    @property
    @abstractmethod
    def coefficients(self) -> dict[str, float]:
        """Loss term -> its weight in the loss."""

    @abstractmethod
    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Count, from masks alone, what each loss term and each metric of a step is divided by.

        The keys are those of `coefficients` and `metrics`. Units, pairs or tokens of this rank; fillers count nothing.
        """

    @abstractmethod
    def micro_batch_loss(self, micro_batch: Any) -> LossSums:
        """Sum each loss term of `coefficients` and each metric over a micro-batch, which `prepare_step` has seen."""

    @abstractmethod
    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of a step or a set, given its loss, terms and metrics."""

    def prepare_step(self, step: StepBatch) -> StepBatch:
        """Compute constants and statistics of the whole step, before its first backward. A hook: most have none."""
        return step

    is_idle = False
    """Whether the step about to be made changes nothing. Equal on all ranks; most stages have no such steps."""

    def keeps_step(self, means: dict[str, float]) -> bool:
        """Decide whether the gradient of a step is used, given its loss, terms and metrics. A hook: most keep all."""
        return True

    @property
    def measured(self) -> tuple[str, ...]:
        """What the means over a validation set are taken of. A hook: most stages measure what they train."""
        return (*self.coefficients, *self.metrics)

    def set_values(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged of a validation set, given the means of what is `measured`. A hook."""
        return self.reported(self._with_loss(means))

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint holds of the algorithm besides `memory`; tensors and plain Python. A hook."""
        return {}

    def take_own_state(self, state: dict[str, Any]) -> None:
        """Continue from what `own_state` gave. A hook."""

    def evaluate(self, step: StepBatch) -> None:
        """Take in a micro-batch of a validation set. A hook: most stages add up the sums of each."""
        (micro_batch,) = step.micro_batches
        self._means.update(self.micro_batch_loss(micro_batch), self.step_counts(step))

    def finish_evaluation(self) -> None:
        """Add up what only the whole set decides. A hook: most stages have nothing left to do."""

    def extend_backbone(self, backbone: Backbone) -> None:
        """Add to the model what the algorithm needs, before weights are loaded into it. A hook."""

    def prepare_run(self) -> None:
        """Work that comes before the first batch, once model and layout stand. A hook."""

    @property
    def companions(self) -> list[Backbone]:
        """Other models that run on the same batches. A hook: most stages have none."""
        return []

    # ------------------------------------------------------------------ the model

    @property
    def backbone(self) -> Backbone:
        """The model. It exists once a Trainer has called `configure_model`."""
        assert self._backbone is not None, "the model is built by configure_model"
        return self._backbone

    def setup(self, stage: str) -> None:
        """Refuse what would train wrong numbers, and tell the data how many prompts go together."""
        check_trainer(self.trainer, self.task)
        verb = self.trainer.state.fn or "fit"
        check_stage(self, self.trainer.strategy, verb=verb)
        if verb == "fit":
            check_in_run(self.optimizer_spec, self.trainer, self.data)
        if self.data is not None:
            self.data.predict_batch_size = self.generation.batch_size

    def configure_model(self) -> None:
        """Build the model, shard it where the strategy asks for it, and leave it in train mode."""
        if self._backbone is None:
            self._backbone = build_backbone(self)
        elif self.weights_folder is not None and self.trainer.state.fn != "fit":
            load_weights(self._backbone, self.weights_folder)

    def configure_optimizers(self) -> Any:
        """Make the optimizer of the trainable parameters, and its schedule in optimizer steps."""
        made = optimizer_and_schedule(self)
        self._configured = group_options(made["optimizer"])
        return made

    def configure_callbacks(self) -> Sequence[Callback]:
        """Read the data, Lightning's last call before the process group starts; bring our callbacks where absent."""
        open_data(self)
        present = vars(self.trainer)["callbacks"]
        return [ours for ours in default_callbacks() if not any(isinstance(theirs, type(ours)) for theirs in present)]

    def on_fit_start(self) -> None:
        """Ask the model whether it keeps documents of one row apart, and tell the data what the layout is."""
        check_gradients_meet(self)
        self.settle_layout()
        self.prepare_run()

    def on_validation_start(self) -> None:
        """Add sums up exactly; and settle the layout where no fit has."""
        self._means = SetMeans(self.measured).to(self.device)
        self._means.begin(self.ranks.exact)
        if self.trainer.state.fn != "fit":
            self.settle_layout()
            self.prepare_run()

    def settle_layout(self) -> None:
        """Ask all models which layouts they can take, and take the one that the data wants."""
        models = [self.backbone, *self.companions]
        self.isolation = settle_layout(models, self.data, self.ranks, known=self.isolation)

    # ------------------------------------------------------------------ the step

    def training_step(self, step: StepBatch, batch_idx: int) -> None:
        """Make one optimizer step: count, forward and backward each micro-batch, clip, step, schedule."""
        optimizer = self._optimizer
        means, num_tokens = self._with_loss(dict.fromkeys((*self.coefficients, *self.metrics), 0.0)), 0
        has_gradient = is_kept = not self.is_idle
        if has_gradient:
            with active_part(optimizer.optimizer):
                means, num_tokens = self._backward(step)
            parameters = trained_parameters(optimizer.optimizer)
            self.guard.check_loss(self.trainer.global_step + 1, means, parameters, scaled=is_scaled(self.trainer))
            is_kept = self.keeps_step(means)
        self._loss = means["loss"]
        step_optimizer(self, optimizer, means, has_gradient=has_gradient, is_kept=is_kept)
        log_step(self, means, num_tokens, learning_rate=float(optimizer.param_groups[0]["lr"]))
        schedule: Any = self.lr_schedulers()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    def _backward(self, step: StepBatch) -> tuple[dict[str, float], int]:
        """Leave the gradient of a step in the parameters; its means over all ranks, and its tokens."""
        ranks = self.ranks
        own_counts = self.step_counts(step)
        counts = dict(zip(own_counts, ranks.sums(list(own_counts.values())), strict=True))
        step = self.prepare_step(step)
        sums: dict[str, Tensor | float] = {}
        last = len(step.micro_batches) - 1
        for index, micro_batch in enumerate(step.micro_batches):
            seed_random_layers(self.device, self.seed, self.trainer.global_step, ranks.rank, index)
            with ranks.gradient_sync(now=index == last):
                found = self.micro_batch_loss(micro_batch)
                # the strategy averages over ranks: its size makes a sum of that mean
                weights = {name: weight / max(counts[name], 1) for name, weight in self.coefficients.items()}
                terms = [weights[name] * term for name, term in found.terms.items()]
                self.manual_backward(ranks.size * torch.stack(terms).sum())
            for name, value in {**found.terms, **found.metrics}.items():
                sums[name] = sums.get(name, 0) + value.detach()
        num_tokens = sum(micro_batch.num_tokens for micro_batch in step.micro_batches)
        *totals, tokens = ranks.sums([*sums.values(), num_tokens])
        means = {name: total / max(counts[name], 1) for name, total in zip(sums, totals, strict=True)}
        return self._with_loss(means), int(tokens)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the global norm of the gradient, after 16-mixed has unscaled it."""
        clip(self, optimizer, loss=self._loss)

    @property
    def ranks(self) -> Ranks:
        """The data-parallel ranks of the trainer."""
        return Ranks(self.trainer, self.device)

    # ------------------------------------------------------------------ validation

    def validation_step(self, step: StepBatch, batch_idx: int) -> None:
        """Add a micro-batch to the sums of the set."""
        self.evaluate(step)

    def on_validation_epoch_end(self) -> None:
        """Reduce the sums of the whole set over ranks, once, and log their ratios."""
        self._log_set("val")

    test_step, on_test_start = validation_step, on_validation_start

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_set("test")

    def _log_set(self, prefix: str) -> None:
        self.finish_evaluation()
        found = self.set_values(self._means.compute())
        values = {f"{prefix}/{name}": torch.tensor(value, dtype=self.ranks.exact) for name, value in found.items()}
        self.log_dict(values, sync_dist=True)  # the values are equal on all ranks already

    def _with_loss(self, means: dict[str, float]) -> dict[str, float]:
        return {"loss": sum(weight * means[name] for name, weight in self.coefficients.items()), **means}

    # ------------------------------------------------------------------ prediction

    def predict_step(self, batch: Any, batch_idx: int) -> list[Any]:
        """What `predict` writes of a batch: an Answer to each prompt, or what the stage makes of its units."""
        return self.predictions(batch)

    def predictions(self, batch: Any) -> list[Any]:
        """What `predict` writes of a batch. A hook: most stages answer prompts."""
        return list(self.answers(batch))

    def answers(self, batch: PromptBatch) -> list[Answer]:
        """Generate an answer to each prompt, as the generation spec says; fillers are left out."""
        return answers_of(self, batch, self.generation)

    # ------------------------------------------------------------------ state

    def save_pretrained(self, folder: Path) -> None:
        """Write the trained weights as transformers or peft would; callbacks add tokenizer and value head."""
        save_weights(self.backbone, folder, base=self.backbone_spec.path, writes=self.trainer.is_global_zero)

    def save_unnamed(self, folder: Path) -> None:
        """Write to trainer_state/ what a resume needs of the weights and `save_pretrained` left under other names."""
        save_unnamed_weights(self, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a resume needs beside the weights, which lie in the folder already."""
        checkpoint["state_dict"] = {}
        checkpoint["stage"] = state_of(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with the weights of the checkpoint's folder, and with the layout that the run had settled on."""
        restore(self, checkpoint["stage"])
        folder = Path(str(self.trainer.ckpt_path)).parent
        load_weights(self.backbone, folder.parent)
        use_any_optimizer_state(self, checkpoint, folder)

    def on_train_start(self) -> None:
        """What the configuration says of the optimizer beats what a checkpoint remembers."""
        schedule: Any = self.lr_schedulers()
        restate(self._optimizer.optimizer, schedule, self._configured)
        self.tokens.restart()

    @property
    def _optimizer(self) -> LightningOptimizer:
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        return optimizer

    @property
    def data(self) -> Any:
        """The trainer's DataModule, which no stage imports; None where the user brings loaders."""
        return vars(self.trainer)["datamodule"]
