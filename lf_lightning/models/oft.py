"""OFT: weights are rotated, not added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lf_lightning.models.adapters import WHERE, Adapter, continued, is_tied
from lf_lightning.models.targets import check_all_adapted, check_target, find_targets, modules_named
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

BLOCK_SIZE = 32


@dataclass(frozen=True)
class OFT(Adapter):
    """Orthogonal adapters (Qiu et al. 2023, arXiv:2306.07280): W R, of which only the rotation R, in blocks, trains.

    Args:
        block_size: Inputs that each block of R turns together, > 1; must divide the inputs of every target. Empty, with
            num_blocks empty too, means 32.
        num_blocks: Blocks of R in each layer, > 0, instead of block_size; must divide the inputs of every target.
        dropout: Probability of leaving a block out while training, in [0, 1).
        target: As for LoRA, but without tensors of fused experts.
        adapter: Folder of an adapter to continue. Its own options apply, so no other may be given beside it.
        exact: Make R exactly orthogonal, by solving a linear system, instead of by a series of five terms.
        modules_to_save: Modules that train whole and are saved with the adapter.
    """

    block_size: int | None = None
    num_blocks: int | None = None
    dropout: float = 0.0
    target: str | Sequence[str] = "all"
    adapter: str | None = None
    exact: bool = False
    modules_to_save: Sequence[str] = ()
    kind = "OFT"

    def __post_init__(self) -> None:
        """Refuse values outside their range, and options that an adapter to continue would override.

        Raises:
            InputError: As said.
        """
        if self.block_size is not None and self.num_blocks is not None:
            raise InputError(
                f"{WHERE}.num_blocks: excludes block_size, since one gives the other, got both. Remove one of the two."
            )
        for name, value, least in (("block_size", self.block_size, 2), ("num_blocks", self.num_blocks, 1)):
            if value is not None and value < least:
                raise InputError(f"{WHERE}.{name}: must be at least {least}, got {value}. Raise it.")
        check_target(self.target)
        if not 0 <= self.dropout < 1:
            raise InputError(f"{WHERE}.dropout: must be in [0, 1), got {self.dropout}. Try 0.0.")
        self.check_alone()

    def apply(self, model: PreTrainedModel, *, vocabulary: Sequence[str] = ()) -> PreTrainedModel | PeftModel:
        """Add new adapters, or load the ones to continue; everything else is frozen."""
        from peft import OFTConfig, get_peft_model

        if self.adapter is not None:
            return continued(model, self, vocabulary)
        targets = find_targets(model, self.target)
        if targets.parameters:
            raise InputError(
                f"{WHERE}.target: OFT cannot rotate {targets.parameters[0]}, in which experts are fused. "
                "Name the layers without experts, or use LoRA."
            )
        self._check_fits(model, targets.modules)
        whole = list(dict.fromkeys([*modules_named(model, self.modules_to_save), *vocabulary]))
        if whole and is_tied(model):
            raise InputError(
                f"{WHERE}: peft cannot keep embedding and output layer tied beside OFT, got {', '.join(whole)} to "
                "train whole. Use LoRA."
            )
        options: dict[str, Any] = {
            "r": self.num_blocks or 0,
            "oft_block_size": 0 if self.num_blocks else self.block_size or BLOCK_SIZE,
            "module_dropout": self.dropout,
            "target_modules": targets.modules,
            "use_cayley_neumann": not self.exact,
            "modules_to_save": whole or None,
        }
        adapted: PeftModel = get_peft_model(model, OFTConfig(task_type="CAUSAL_LM", **options))
        check_all_adapted(adapted, targets)
        return adapted

    def _check_fits(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        """Refuse blocks that leave a rest, which peft would fit by another size."""
        part, option = (
            self.num_blocks or self.block_size or BLOCK_SIZE,
            "num_blocks" if self.num_blocks else "block_size",
        )
        head = model.get_output_embeddings()
        for name in names:
            layer: Any = model.get_submodule(name)
            if layer is head:
                raise InputError(f"{WHERE}.target: OFT cannot act on the output layer, got {name}. Leave it out.")
            num_inputs = layer.weight.shape[0] if type(layer).__name__ == "Conv1D" else layer.in_features
            if num_inputs % part:
                raise InputError(
                    f"{WHERE}.{option}: must divide the {num_inputs} inputs of {name}, got {part}. Choose another."
                )
