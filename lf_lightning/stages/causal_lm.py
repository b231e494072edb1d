"""Next-token prediction: what pt and sft sum and count."""

from __future__ import annotations

import math
from functools import partial

from lf_lightning.losses.causal_lm import CountedStates, TokenLoss, TokenLossSums, token_loss_sums
from lf_lightning.losses.log_probs import CrossEntropySums, cross_entropy_sums
from lf_lightning.stages.base import Stage
from lf_lightning.types import IGNORE, LossSums, StepBatch, TokenBatch


class CausalLMStage(Stage):
    """Minimise -log p(token | tokens before it), or a loss made of it, averaged over all counted tokens of the step."""

    token_loss: TokenLoss | None = None
    """What is minimised instead of the plain negative log-likelihood."""
    metrics: tuple[str, ...] = ("accuracy",)

    def reference_states(self, micro_batch: TokenBatch) -> CountedStates | None:
        """What a reference says of a micro-batch. A hook: most losses know none."""
        return None

    @property
    def coefficients(self) -> dict[str, float]:
        """One term: the negative log-likelihood, or the loss that stands in its place."""
        return {"nll": 1.0} if self.token_loss is None else {"objective": 1.0}

    def step_counts(self, step: StepBatch) -> dict[str, int]:
        """Predicted tokens of the step; they divide the loss and every metric."""
        num_targets = sum(int((batch.targets != IGNORE).sum()) for batch in step.micro_batches)
        return dict.fromkeys((*self.coefficients, *self.metrics), num_targets)

    def micro_batch_loss(self, micro_batch: TokenBatch) -> LossSums:
        """Summed loss, and how many tokens were the likeliest; beside another loss the log-likelihood in nats."""
        if self.token_loss is None:
            plain: CrossEntropySums = self.backbone(micro_batch, kernel=cross_entropy_sums)
            return LossSums(terms={"nll": plain.nll}, metrics={"accuracy": plain.num_correct})
        reference = self.reference_states(micro_batch)
        kernel = partial(token_loss_sums, loss=self.token_loss, reference=reference)
        sums: TokenLossSums = self.backbone(micro_batch, kernel=kernel)
        found = {"nll": sums.nll, "kl": sums.kl, "accuracy": sums.num_correct}
        return LossSums(terms={"objective": sums.loss}, metrics={name: found[name] for name in self.metrics})

    def reported(self, means: dict[str, float]) -> dict[str, float]:
        """Loss, perplexity exp(mean negative log-likelihood) whatever the loss is, and the metrics."""
        nll = means["nll"]
        perplexity = math.inf if nll >= 700 else math.exp(nll)
        return {"loss": means["loss"], "perplexity": perplexity, **{name: means[name] for name in self.metrics}}
