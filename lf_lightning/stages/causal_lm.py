"""Next-token prediction: what pt and sft sum and count."""

from __future__ import annotations

import math

from lf_lightning.losses.log_probs import CrossEntropySums, cross_entropy_sums
from lf_lightning.stages.base import Stage
from lf_lightning.types import IGNORE, LossSums, StepBatch, TokenBatch


class CausalLMStage(Stage):
    """Minimise -log p(token | tokens before it), averaged over all counted tokens of the step."""

    metrics = ("accuracy",)

    @property
    def coefficients(self) -> dict[str, float]:
        """One term: the negative log-likelihood."""
        return {"nll": 1.0}

    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Predicted tokens of the step; they divide the loss and the accuracy."""
        num_targets = sum(int((batch.targets != IGNORE).sum()) for batch in step.micro_batches)
        return {"nll": num_targets, "accuracy": num_targets}

    def micro_batch_loss(self, micro_batch: TokenBatch) -> LossSums:
        """Summed negative log-likelihood in nats, and how many tokens were the likeliest."""
        sums: CrossEntropySums = self.backbone(micro_batch, kernel=cross_entropy_sums)
        return LossSums(terms={"nll": sums.nll}, metrics={"accuracy": sums.num_correct})

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """Loss, perplexity exp(loss), and the share of tokens that were the likeliest."""
        loss = means["loss"]
        perplexity = math.inf if loss >= 700 else math.exp(loss)
        return {"loss": loss, "perplexity": perplexity, "accuracy": means["accuracy"]}
