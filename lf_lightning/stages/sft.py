"""Supervised fine-tuning on conversations."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, final

from torch import Tensor

from lf_lightning.losses.causal_lm import (
    CountedStates,
    TokenLoss,
    TokenLosses,
    asft_loss,
    counted_states,
    dft_loss,
    eaft_loss,
    smoothed_loss,
)
from lf_lightning.models import Backbone, GenerationSpec, LoRA, ReferenceSpec, Tuning, without_dropout
from lf_lightning.optim import AdamW, OptimizerSpec, ScheduleSpec
from lf_lightning.stages.building import sharing_mesh
from lf_lightning.stages.causal_lm import CausalLMStage
from lf_lightning.stages.deepspeed import ZeroStrategy
from lf_lightning.stages.held_reference import HeldReference
from lf_lightning.types import BackboneSpec, InputError, TokenBatch

LossName = Literal["cross_entropy", "dft", "eaft", "asft"]


@final
class SFT(CausalLMStage):
    """Supervised fine-tuning: the answers of conversations are learned, their prompts are read.

    Args:
        backbone: The language model.
        tuning: Which parameters train; LoRA on every linear layer unless given.
        optimizer: The optimizer and its constants.
        schedule: How the learning rate changes.
        loss: What is minimised of each answered token: `cross_entropy`; `dft` (Wu et al. 2025, arXiv:2508.05629),
            where a token weighs as much as the model believes in it; `eaft` (Diao et al. 2026, arXiv:2601.02151),
            where tokens of which the model is sure weigh little; `asft` (Zhu et al. 2025, arXiv:2509.23753), which is
            dft held near a reference.
        label_smoothing: Share of the target that is spread over all words, in [0, 1); of cross_entropy only.
        eaft_alpha: Sharpness of eaft's weights, >= 0; 0 is cross_entropy.
        asft_alpha: Weight of asft's KL(reference || policy), >= 0.
        reference: The frozen model near which asft stays: the model before training, unless another is given.
        max_grad_norm: Largest global norm of the gradient, > 0; larger ones are scaled down to it. Empty: no limit.
        non_finite: A loss or gradient that is not finite: `stop` the run, or `skip` the step and count it.
        generation: How `predict` and callbacks generate answers.
    """

    task = "sft"

    def __init__(
        self,
        backbone: BackboneSpec,
        tuning: Tuning = LoRA(),
        optimizer: OptimizerSpec = AdamW(),
        schedule: ScheduleSpec = ScheduleSpec(),
        *,
        loss: LossName = "cross_entropy",
        label_smoothing: float = 0.0,
        eaft_alpha: float = 1.0,
        asft_alpha: float = 0.1,
        reference: ReferenceSpec = ReferenceSpec(),
        max_grad_norm: float | None = 1.0,
        non_finite: Literal["stop", "skip"] = "stop",
        generation: GenerationSpec = GenerationSpec(),
    ) -> None:
        check_numbers(label_smoothing=label_smoothing, eaft_alpha=eaft_alpha, asft_alpha=asft_alpha)
        check_read(loss, label_smoothing, eaft_alpha, asft_alpha, reference)
        super().__init__(
            backbone,
            tuning,
            optimizer,
            schedule,
            max_grad_norm=max_grad_norm,
            non_finite=non_finite,
            generation=generation,
        )
        self.loss, self.reference = loss, reference
        self.token_loss = token_loss_of(
            loss, label_smoothing=label_smoothing, eaft_alpha=eaft_alpha, asft_alpha=asft_alpha
        )
        if self.token_loss is not None:
            self.metrics = ("nll", "kl", "accuracy") if loss == "asft" else ("nll", "accuracy")
        self.held = HeldReference(reference if loss == "asft" else None, self.tuning)

    # ------------------------------------------------------------------ the reference of asft

    def extend_backbone(self, backbone: Backbone) -> None:
        """Take a reference that lives in the policy, before it gets any trained weights."""
        if self.held.spec is not None:
            without_dropout(backbone)
            self.held.take_from(self, backbone)

    @property
    def companions(self) -> list[Backbone]:
        """The reference, where it is a model of its own."""
        return self.held.companions(self)

    def prepare_run(self) -> None:
        """Bring the reference to the device.

        Raises:
            InputError: It predicts over other words than the policy does.
        """
        if self.held.model is None:
            return
        self.held.model.to(self.device)
        ours, theirs = self.backbone.vocabulary, self.held.model.backbone.vocabulary
        if ours != theirs:
            raise InputError(
                f"model.init_args.reference.path: must have the {ours} rows of the policy's embedding for asft, which "
                f"compares all words, got {theirs}. Use a model of the same size of vocabulary."
            )

    def reference_states(self, micro_batch: TokenBatch) -> CountedStates | None:
        """Hidden states of the reference at the answered tokens."""
        if self.held.model is None:
            return None
        stays = sharing_mesh(self) is None and not isinstance(self.trainer.strategy, ZeroStrategy)
        kernel = partial(counted_states, keeps_weights=stays)
        states: CountedStates = self.held.model.forward(micro_batch, kernel=kernel)
        return states


def token_loss_of(loss: LossName, *, label_smoothing: float, eaft_alpha: float, asft_alpha: float) -> TokenLoss | None:
    """The loss of a token with its constants; None for the plain negative log-likelihood, which has a faster way."""

    def smoothed(logits: Tensor, targets: Tensor, _: Tensor | None) -> TokenLosses:
        return smoothed_loss(logits, targets, label_smoothing=label_smoothing)

    def dft(logits: Tensor, targets: Tensor, _: Tensor | None) -> TokenLosses:
        return dft_loss(logits, targets)

    def eaft(logits: Tensor, targets: Tensor, _: Tensor | None) -> TokenLosses:
        return eaft_loss(logits, targets, alpha=eaft_alpha)

    def asft(logits: Tensor, targets: Tensor, reference: Tensor | None) -> TokenLosses:
        assert reference is not None, "the stage asks its reference first"
        return asft_loss(logits, targets, reference, alpha=asft_alpha)

    table = {"cross_entropy": smoothed if label_smoothing else None, "dft": dft, "eaft": eaft, "asft": asft}
    return table[loss]


def check_numbers(*, label_smoothing: float, eaft_alpha: float, asft_alpha: float) -> None:
    """Refuse numbers outside their range.

    Raises:
        InputError: As said.
    """
    for name, value, holds, want in (
        ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "in [0, 1)"),
        ("eaft_alpha", eaft_alpha, 0 <= eaft_alpha < math.inf, "0 or more"),
        ("asft_alpha", asft_alpha, 0 <= asft_alpha < math.inf, "0 or more"),
    ):
        if not holds:
            raise InputError(f"model.init_args.{name}: must be {want}, got {value}. Correct it.")


def check_read(
    loss: str, label_smoothing: float, eaft_alpha: float, asft_alpha: float, reference: ReferenceSpec
) -> None:
    """Refuse options that this loss would not read.

    Raises:
        InputError: Names the option and the loss that reads it.
    """
    for name, changed, reader in (
        ("label_smoothing", label_smoothing != 0.0, "cross_entropy"),
        ("eaft_alpha", eaft_alpha != 1.0, "eaft"),
        ("asft_alpha", asft_alpha != 0.1, "asft"),
        ("reference", reference != ReferenceSpec(), "asft"),
    ):
        if changed and loss != reader:
            raise InputError(
                f"model.init_args.{name}: belongs to loss: {reader}, got loss: {loss}. Remove it, or set {reader}."
            )
    if reference.precompute:
        raise InputError(
            "model.init_args.reference.precompute: asft compares whole distributions, which are too large to store, "
            "got true. Remove it."
        )
