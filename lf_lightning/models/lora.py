"""LoRA and its relatives: rsLoRA, DoRA, and the start from principal components (PiSSA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lf_lightning.models.adapters import WHERE, Adapter, continued, is_tied
from lf_lightning.models.targets import Targets, check_all_adapted, check_target, find_targets, modules_named
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ITERATIONS = 16


@dataclass(frozen=True)
class LoRA(Adapter):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A, of which only A and B train.

    Args:
        rank: Rank of the update, > 0.
        alpha: Strength of the update; empty means 2 * rank.
        dropout: Probability of dropping an input of A while training, in [0, 1).
        target: Layers that get an adapter: `all` (every linear layer but the output layer, and the tensors in which a
            model fuses its experts; routers stay frozen), or a list of module names such as [q_proj, v_proj], or a
            regular expression that whole names must match, such as `.*layers.(30|31).*q_proj`.
        adapter: Folder of an adapter to continue. Its own options apply, so no other may be given beside it.
        rslora: Divide by the root of the rank instead of the rank (Kalajdzievski 2023, arXiv:2312.03732).
        dora: Train the norm of each row of the weights apart (Liu et al. 2024, arXiv:2402.09353).
        init: How A and B begin. `zero`: A at random and B zero. `pissa`: with the largest principal components of the
            weights, which lose them (Meng et al. 2024, arXiv:2404.02948); `pissa_fast`: with approximate ones.
        pissa_iterations: Iterations of `pissa_fast`, > 0; empty means 16.
        modules_to_save: Modules that train whole and are saved with the adapter, such as [embed_tokens, lm_head].
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target: str | Sequence[str] = "all"
    adapter: str | None = None
    rslora: bool = False
    dora: bool = False
    init: Literal["zero", "pissa", "pissa_fast"] = "zero"
    pissa_iterations: int | None = None
    modules_to_save: Sequence[str] = ()
    kind = "LORA"

    def __post_init__(self) -> None:
        """Refuse values outside their range, and options that an adapter to continue would override.

        Raises:
            InputError: As said.
        """
        if self.rank < 1:
            raise InputError(f"{WHERE}.rank: must be at least 1, got {self.rank}. Try 8.")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"{WHERE}.alpha: must be positive, got {self.alpha}. Leave it out for 2 * rank.")
        check_target(self.target)
        if not 0 <= self.dropout < 1:
            raise InputError(f"{WHERE}.dropout: must be in [0, 1), got {self.dropout}. Try 0.0.")
        self._check_start()
        self.check_alone()

    def _check_start(self) -> None:
        if self.pissa_iterations is not None and self.init != "pissa_fast":
            raise InputError(
                f"{WHERE}.pissa_iterations: belongs to init: pissa_fast, got init: {self.init}. Remove it."
            )
        if self.pissa_iterations is not None and self.pissa_iterations < 1:
            raise InputError(f"{WHERE}.pissa_iterations: must be at least 1, got {self.pissa_iterations}. Try 16.")
        if self.dora and self.shifts_base:
            raise InputError(
                f"{WHERE}.dora: must be false with init: {self.init}, whose update cannot be given to the original "
                "model when norms train apart, got true. Remove one of the two."
            )

    @property
    def shifts_base(self) -> bool:
        """Whether the weights lose what the new adapter begins with."""
        return self.init != "zero"

    @property
    def needs_whole_weights(self) -> bool:
        """As for any adapter; DoRA reads the norms of the weights."""
        return super().needs_whole_weights or self.dora

    def apply(self, model: PreTrainedModel, *, vocabulary: Sequence[str] = ()) -> PreTrainedModel | PeftModel:
        """Add new adapters, or load the ones to continue; everything else is frozen."""
        from peft import LoraConfig, get_peft_model

        if self.adapter is not None:
            return continued(model, self, vocabulary)
        targets = find_targets(model, self.target)
        self._check_fits(model, targets)
        whole = list(dict.fromkeys([*modules_named(model, self.modules_to_save), *vocabulary]))
        init = {"zero": True, "pissa": "pissa", "pissa_fast": f"pissa_niter_{self.pissa_iterations or ITERATIONS}"}
        on_meta = next(model.parameters()).is_meta  # shapes without numbers
        options: dict[str, Any] = {
            "r": self.rank,
            "lora_alpha": 2 * self.rank if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": targets.modules,
            "target_parameters": targets.parameters or None,
            "use_rslora": self.rslora,
            "use_dora": self.dora,
            "init_lora_weights": init["zero" if on_meta else self.init],
            "modules_to_save": whole or None,
            "ensure_weight_tying": _ties(model, whole),
        }
        adapted: PeftModel = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
        check_all_adapted(adapted, targets)
        if _ties(model, whole) and not is_tied(model):
            raise InputError(
                f"{WHERE}.modules_to_save: peft cannot keep embedding and output layer of this family tied, got the "
                "embedding to train whole. Use Freeze or Full."
            )
        return adapted

    def _check_fits(self, model: PreTrainedModel, targets: Targets) -> None:
        options = {"dropout": self.dropout, "dora": self.dora, "init": self.shifts_base and self.init}
        for name, value in options.items() if targets.parameters else ():
            if value:
                raise InputError(
                    f"{WHERE}.{name}: cannot act on {targets.parameters[0]}, in which experts are fused, got {value}. "
                    "Remove it, or name the layers without experts in target."
                )
        head: Any = model.get_output_embeddings()
        on_head = any(model.get_submodule(name) is head for name in targets.modules)
        if on_head and self.dora:
            raise InputError(f"{WHERE}.dora: cannot act on the output layer, got it in target. Leave lm_head out.")
        if self.shifts_base and on_head and is_tied(model):
            raise InputError(
                f"{WHERE}.init: {self.init} would take its part out of the embedding too, which is tied to the output "
                "layer, got lm_head in target. Leave it out."
            )
        if self.shifts_base and next(model.parameters()).dtype == torch.float64:
            raise InputError(f"{WHERE}.init: {self.init} needs float32 or less, got float64. Set backbone.dtype.")


def _ties(model: PreTrainedModel, whole: Sequence[str]) -> bool:
    """Whether peft must tie the copies of embedding and output layer, as the model ties its own.

    Raises:
        InputError: Only the output layer is named.
    """
    tied = is_tied(model)
    embedding = model.get_input_embeddings()
    has_embedding = any(model.get_submodule(name) is embedding for name in whole)
    if tied and not has_embedding and any(model.get_submodule(name) is model.get_output_embeddings() for name in whole):
        raise InputError(
            f"{WHERE}.modules_to_save: must name the embedding, to which this model's output layer is tied, got the "
            "output layer alone. Name the embedding."
        )
    return tied and has_embedding
