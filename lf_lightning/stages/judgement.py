"""What stages that learn from judgements share: numbers of each unit, a reference, statistics of the step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lf_lightning.callbacks.run_log import log_is_due
from lf_lightning.losses.log_probs import front_sums, sequence_lengths, sequence_sums, token_statistics
from lf_lightning.models import Backbone, ReferenceSpec, without_dropout
from lf_lightning.stages.base import Stage
from lf_lightning.stages.held_reference import HeldReference, quiet
from lf_lightning.stages.reference_store import fill_stored_reference
from lf_lightning.types import BackboneSpec, Kernel, LossSums, OutputLayer, StepBatch, TokenBatch

ROUNDING = 1e-4
"""Nats by which a response must be ahead to count as ahead: while policy = reference all differences are rounding."""


class SequenceStatistics(NamedTuple):
    """What a model says of each of S responses; (S,) each, sums over the counted tokens."""

    log_probs: Tensor  # log-prob of the whole response, in nats
    front: Tensor  # of its first tokens, as many as both responses of its pair have; equal to log_probs without pairs
    lengths: Tensor  # int64: counted tokens
    num_correct: Tensor  # tokens that were the likeliest; no gradient
    entropy: Tensor  # entropy in nats; zeros where it was not asked for; no gradient


class JudgementStage(Stage):
    """A stage whose units give a few numbers each. Loss and metrics are functions of those numbers alone.

    So a step may have statistics of all its units, and a validation set is computed as one, however it is laid out.

    Dropout: the backbone's own layers are off where there is a reference, which never has any; an adapter's are on as
    the tuning says. Constants of a step are computed without any.

    Args:
        backbone: The policy, or the model under a value head.
        reference: What the policy is held against; None where the loss knows none.
        options: As in `Stage`.
    """

    def __init__(self, backbone: BackboneSpec, *, reference: ReferenceSpec | None, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.held = HeldReference(reference, self.tuning)
        self.wants_entropy = False
        """Whether the step is logged: entropy costs a pass over the logits."""

    # ------------------------------------------------------------------ what a stage defines

    reference_shape: ClassVar[tuple[int, ...]] = ()
    """Shape of the reference log-probs of one unit."""

    @abstractmethod
    def unit_values(self, micro_batch: Any) -> Any:
        """Numbers of each unit that the loss needs: a NamedTuple of tensors whose first dimension is the unit."""

    @abstractmethod
    def loss_sums(self, values: Any) -> LossSums:
        """Loss terms and metrics, summed over units with these values."""

    def reference_sums(self, micro_batch: Any) -> Tensor:
        """Log-probs under the reference, for stages that have one; (U, *reference_shape)."""
        raise AssertionError("a stage without a reference asks for none")

    def with_constants(self, micro_batch: Any) -> Any:
        """The micro-batch with what no gradient flows into. A hook: most stages need the reference only."""
        return self.with_reference(micro_batch)

    def add_head(self, backbone: Backbone) -> None:
        """Put a head on the model. A hook: most stages have none."""

    def look_at_data(self) -> None:
        """Check what the rows are before the reference runs on them. A hook."""

    def observe_step(self, micro_batches: Sequence[Any]) -> None:
        """Compute statistics of a training step from this rank's micro-batches. A hook."""

    def observe_set(self, values: Any) -> None:
        """Compute the same statistics of a validation set from this rank's units. A hook."""

    # ------------------------------------------------------------------ the model and its reference

    def extend_backbone(self, backbone: Backbone) -> None:
        """Add a head, and take a reference that lives in the policy, before it gets any trained weights."""
        self.add_head(backbone)
        if self.held.spec is not None:
            without_dropout(backbone)
            self.held.take_from(self, backbone)

    @property
    def companions(self) -> list[Backbone]:
        """The reference, where it is a model of its own."""
        return self.held.companions(self)

    def prepare_run(self) -> None:
        """Bring the reference to the device, or compute all its log-probs now and let it go."""
        if self.data is not None:
            self.data.stored_reference.clear()  # another stage's, whose reference was another
            self.look_at_data()
        spec, reference = self.held.spec, self.held.model
        if spec is None or reference is None:
            return
        reference.to(self.device)
        if spec.precompute:
            with quiet(self.backbone), self.trainer.precision_plugin.forward_context():
                fill_stored_reference(self, reference)
            if self.held.is_separate:
                self.held.model = None

    def with_reference(self, micro_batch: Any) -> Any:
        """The micro-batch with reference log-probs: those that were stored, else computed now."""
        if self.held.spec is None or micro_batch.reference is not None:
            return micro_batch
        return micro_batch._replace(reference=self.reference_sums(micro_batch))

    def reference_log_probs(self, tokens: TokenBatch, *, pairs: bool) -> SequenceStatistics:
        """What the reference says of each response, without gradient."""
        assert self.held.model is not None, "the log-probs of this batch were to be stored"
        statistics: SequenceStatistics = self.held.model.forward(tokens, kernel=statistics_kernel(tokens, pairs=pairs))
        return statistics

    def policy_log_probs(self, tokens: TokenBatch, *, pairs: bool) -> SequenceStatistics:
        """What the policy says of each response."""
        kernel = statistics_kernel(tokens, pairs=pairs, with_entropy=self.wants_entropy)
        statistics: SequenceStatistics = self.backbone(tokens, kernel=kernel)
        return statistics

    # ------------------------------------------------------------------ the step

    def prepare_step(self, step: StepBatch) -> StepBatch:
        """Reference log-probs of every micro-batch, then the statistics of them all."""
        self.wants_entropy = False
        with quiet(self.backbone):
            micro_batches = tuple(self.with_constants(micro_batch) for micro_batch in step.micro_batches)
            self.observe_step(micro_batches)
        self.wants_entropy = log_is_due(self.trainer, ahead=1)
        return StepBatch(micro_batches)

    def micro_batch_loss(self, micro_batch: Any) -> LossSums:
        """Loss and metrics of the units of a micro-batch."""
        return self.loss_sums(self.unit_values(micro_batch))

    # ------------------------------------------------------------------ validation

    def evaluate(self, step: StepBatch) -> None:
        """Keep the numbers of each unit: the loss may need statistics of the whole set."""
        (micro_batch,) = step.micro_batches
        self.wants_entropy = False
        micro_batch = self.with_constants(micro_batch)
        self.wants_entropy = True
        values = self.unit_values(micro_batch)
        self._means.kept.append((values, self.step_counts(step)))

    def finish_evaluation(self) -> None:
        """Statistics of the set, then the sums of its loss."""
        values = joined([values for values, _ in self._means.kept])
        counts = [counts for _, counts in self._means.kept]
        self.observe_set(values)
        self._means.update(self.loss_sums(values), {name: sum(each[name] for each in counts) for name in counts[0]})


def statistics_kernel(tokens: TokenBatch, *, pairs: bool, with_entropy: bool = False) -> Kernel:
    """A kernel for `Backbone.forward` that gives SequenceStatistics.

    Args:
        tokens: The batch that the model will run on; S sequences.
        pairs: Sequences 2 i and 2 i + 1 are a pair, and `front` counts as many tokens as the shorter one has.
        with_entropy: Compute the entropy.
    """
    sequences, num_sequences = tokens.sequences, tokens.num_sequences
    assert sequences is not None

    def kernel(hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> SequenceStatistics:
        found = token_statistics(hidden, output_layer, targets, with_entropy=with_entropy)
        whole = sequence_sums(found.log_probs, sequences, num_sequences)
        lengths = sequence_lengths(sequences, num_sequences)
        front = whole
        if pairs:
            shorter = lengths.view(-1, 2).amin(1).repeat_interleave(2)
            front = front_sums(found.log_probs, sequences, shorter)
        correct = sequence_sums(found.is_correct.to(whole.dtype), sequences, num_sequences)
        entropy = torch.zeros_like(correct)
        if found.entropy is not None:
            entropy = sequence_sums(found.entropy, sequences, num_sequences)
        return SequenceStatistics(whole, front, lengths, correct, entropy)

    return kernel


def joined(parts: Sequence[Any]) -> Any:
    """The values of several micro-batches as those of one."""
    return type(parts[0])._make(torch.cat(columns) for columns in zip(*parts, strict=True))
