"""Reward modelling: a scalar head learns which of two responses was preferred."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, final

from torch import Tensor

from lf_lightning.console import say
from lf_lightning.losses.reward import centering_penalty, reward_loss
from lf_lightning.models import Backbone, LoRA, Tuning, ValueHeadSpec, add_value_head, score_kernel
from lf_lightning.optim import AdamW, OptimizerSpec, ScheduleSpec
from lf_lightning.stages.judgement import JudgementStage
from lf_lightning.types import (
    BackboneSpec,
    InputError,
    LossSums,
    PairScore,
    PreferenceBatch,
    StepBatch,
)


class ScoreValues(NamedTuple):
    """Numbers of P pairs; (P,) each."""

    chosen: Tensor
    rejected: Tensor
    margin: Tensor  # no gradient


@final
class RM(JudgementStage):
    """Reward modelling (Ouyang et al. 2022, arXiv:2203.02155, eq. 1): of two responses the preferred one scores higher.

    loss = -log sigma(s_chosen - s_rejected - margin) + centering (s_chosen + s_rejected)^2

    A score is the value head's output at the last token of a response. The margin is a column of the data.

    Args:
        backbone: The language model below the head. Its output layer is not used.
        tuning: Which parameters train beside the head; LoRA on every linear layer unless given.
        optimizer: The optimizer and its constants.
        schedule: How the learning rate changes.
        value_head: The head: its dropout, where it comes from, and the form in which the model is saved.
        centering: Weight of the penalty that keeps scores around zero, >= 0. Typical 0.01.
        max_grad_norm: Largest global norm of the gradient, > 0; larger ones are scaled down to it. Empty: no limit.
        non_finite: A loss or gradient that is not finite: `stop` the run, or `skip` the step and count it.
    """

    task = "rm"
    metrics = ("accuracy", "scores/chosen", "scores/rejected", "margin")

    def __init__(
        self,
        backbone: BackboneSpec,
        tuning: Tuning = LoRA(),
        optimizer: OptimizerSpec = AdamW(),
        schedule: ScheduleSpec = ScheduleSpec(),
        *,
        value_head: ValueHeadSpec = ValueHeadSpec(),
        centering: float = 0.0,
        max_grad_norm: float | None = 1.0,
        non_finite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__(
            backbone,
            reference=None,
            tuning=tuning,
            optimizer=optimizer,
            schedule=schedule,
            max_grad_norm=max_grad_norm,
            non_finite=non_finite,
        )
        if not 0 <= centering < math.inf:
            raise InputError(f"model.init_args.centering: must be 0 or more, got {centering}. Try 0.01.")
        self.value_head, self.centering = value_head, centering

    @property
    def coefficients(self) -> dict[str, float]:
        """The loss of pairs, and the penalty where it has a weight."""
        return {"reward": 1.0, **({"centering": self.centering} if self.centering else {})}

    def add_head(self, backbone: Backbone) -> None:
        """Put the value head on the model."""
        spec = self.backbone_spec
        is_loaded = add_value_head(
            backbone, self.value_head, tuning=self.tuning, path=spec.path, seed=self.seed, revision=spec.revision
        )
        if not is_loaded and self.weights_folder is None and self.trainer.ckpt_path is None:
            say("value head: new, since neither adapter nor backbone holds a value_head file")

    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Pairs of the step; they divide everything."""
        num_pairs = sum(micro_batch.num_units for micro_batch in step.micro_batches)
        return dict.fromkeys((*self.coefficients, *self.metrics), num_pairs)

    def unit_values(self, micro_batch: PreferenceBatch) -> ScoreValues:
        """Scores of both responses of each pair."""
        tokens, head = micro_batch.tokens, self.backbone.value_head
        assert tokens.sequences is not None
        assert head is not None
        scores: Tensor = self.backbone(tokens, kernel=score_kernel(head, tokens.sequences, tokens.num_sequences))
        chosen, rejected = scores.view(-1, 2).unbind(1)
        return ScoreValues(chosen, rejected, micro_batch.margins.to(scores.dtype))

    def loss_sums(self, values: ScoreValues) -> LossSums:
        """The loss of each pair, and how often and how far the preferred response is ahead."""
        chosen, rejected = values.chosen, values.rejected
        terms = {"reward": reward_loss(chosen, rejected, margin=values.margin).sum()}
        if self.centering:
            terms["centering"] = centering_penalty(chosen, rejected).sum()
        metrics = {
            "accuracy": (chosen > rejected).sum(),
            "scores/chosen": chosen.sum(),
            "scores/rejected": rejected.sum(),
            "margin": (chosen - rejected).sum(),
        }
        return LossSums(terms, metrics)

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """Loss, its parts, and the metrics."""
        return means if self.centering else {name: value for name, value in means.items() if name != "reward"}

    # ------------------------------------------------------------------ prediction

    def on_predict_start(self) -> None:
        """Pairs are scored as they are trained."""
        self.settle_layout()

    def predictions(self, batch: StepBatch) -> list[PairScore]:
        """The scores of both responses of each pair."""
        (micro_batch,) = batch.micro_batches
        values = self.unit_values(micro_batch)
        columns = (micro_batch.rows.tolist(), values.chosen.tolist(), values.rejected.tolist())
        return [PairScore(*numbers) for numbers in zip(*columns, strict=True)]
