"""The value head of a reward model: from the last hidden state to a score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lf_lightning.models.adapters import Adapter, Tuning, is_tied
from lf_lightning.models.sequence_classification import check_has_classifier, export_sequence_classification
from lf_lightning.models.value_head_files import find_value_head, load_value_head, save_value_head
from lf_lightning.types import InputError, Kernel, OutputLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lf_lightning.models.backbone import Backbone

__all__ = [
    "ValueHead",
    "ValueHeadSpec",
    "add_value_head",
    "export_sequence_classification",
    "last_counted",
    "load_value_head",
    "save_value_head",
    "score_kernel",
    "sequence_ends",
]


@dataclass(frozen=True)
class ValueHeadSpec:
    """The linear layer that turns the last hidden state into a score.

    Args:
        dropout: Probability of dropping a hidden unit before the layer while training, in [0, 1).
        init: Where its weights come from. `load`: value_head.safetensors or value_head.bin of the adapter that is
            continued, else of the backbone. `new`: random. `auto`: loaded where there is one, else new.
        save_as: What is written. `value_head`: value_head.safetensors beside a plain model or adapter, as LlamaFactory
            reads it. `sequence_classification`: a folder for transformers' AutoModelForSequenceClassification; the
            layer then has no bias.
    """

    dropout: float = 0.0
    init: Literal["auto", "new", "load"] = "auto"
    save_as: Literal["value_head", "sequence_classification"] = "value_head"

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"model.init_args.value_head.dropout: must be in [0, 1), got {self.dropout}. Use 0.0 for none."
            )


class ValueHead(nn.Module):
    """Score = w . hidden + b, in float32 whatever the model's type is (float64 where that is float64).

    Args:
        hidden_size: H.
        bias: Whether there is b.
        dropout: Probability of dropping a hidden unit while training.
        like: A tensor of the model, whose device is taken, and whose type where it is more accurate than float32.
        seed: Of the weights w, drawn from N(0, 1 / (H + 1)); b starts at 0.

    Source: initialisation of Stiennon et al. 2020, arXiv:2009.01325.
    """

    def __init__(self, hidden_size: int, *, bias: bool, dropout: float, like: Tensor, seed: int = 0) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.dropout = nn.Dropout(dropout)
        # without nn.Linear's own weights, which would be drawn from the global random state
        self.summary = skip_init(nn.Linear, hidden_size, 1, bias=bias, dtype=dtype, device=like.device)
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, hidden_size, generator=generator) * (hidden_size + 1) ** -0.5
        with torch.no_grad():
            self.summary.weight.copy_(weight)
            if bias:
                self.summary.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (...) of hidden states (..., H); autocast does not reach in."""
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.summary(self.dropout(hidden.to(self.summary.weight.dtype)))
        return values.squeeze(-1)


def _without_output_layer(causal_lm: PreTrainedModel) -> int:
    """Freeze the output layer, which nothing uses then; the size of its hidden states.

    It never gets a gradient, for which DDP would wait.

    Raises:
        InputError: An adapter lies on it.
    """
    from peft.utils import ModulesToSaveWrapper

    layer = causal_lm.get_output_embeddings()
    inner = layer.original_module if isinstance(layer, ModulesToSaveWrapper) else layer  # a copy: of new tokens
    if not isinstance(inner, nn.Linear):
        raise InputError(
            "model.init_args.tuning.init_args.target: must leave out the output layer, which a reward model does not "
            f"use, got a {type(inner).__name__} there. Remove lm_head from target."
        )
    if not is_tied(causal_lm):
        layer.requires_grad_(False)
    return inner.in_features


def add_value_head(
    backbone: Backbone,
    spec: ValueHeadSpec,
    *,
    tuning: Tuning,
    path: str | None,
    seed: int,
    revision: str | None = None,
    keeps_output_layer: bool = False,
) -> bool:
    """Give a backbone a value head that trains, in place of its output layer, or beside it.

    Args:
        backbone: The model, not yet sharded.
        spec: The head.
        tuning: As the backbone was loaded with.
        path: Folder or hub name of the backbone; None where it was built from an architecture.
        seed: Seed of new weights.
        revision: Branch, tag or commit of a hub name.
        keeps_output_layer: The output layer goes on as the tuning says, as the critic of a policy needs; otherwise
            nothing uses it, and it does not train.

    Returns:
        Whether the head was loaded, from the adapter or from the backbone; else its weights are new.

    Raises:
        InputError: The tuning adapts the output layer, the head to load is missing or does not fit, or the family has
            no model for sequence classification and `save_as` asks for one.
    """
    causal_lm = backbone.causal_lm
    hidden_size = backbone.output_layer.weight.shape[1] if keeps_output_layer else _without_output_layer(causal_lm)
    standard = spec.save_as == "sequence_classification"
    if standard:
        check_has_classifier(backbone)
    like = causal_lm.get_input_embeddings().weight
    assert isinstance(like, Tensor)
    head = ValueHead(hidden_size, bias=not standard, dropout=spec.dropout, like=like, seed=seed)
    backbone.value_head = head.train(backbone.training)
    if spec.init == "new":
        return False
    names = [tuning.adapter] if isinstance(tuning, Adapter) and tuning.adapter else []
    names += [path] if path else []
    folder = next(
        filter(None, (find_value_head(name, revision=revision if name == path else None) for name in names)), None
    )
    if folder is not None:
        load_value_head(head, folder)
        return True
    if spec.init == "load":
        raise InputError(
            "model.init_args.value_head.init: load needs value_head.safetensors or value_head.bin in "
            f"{' or '.join(names) or 'backbone.path'}, got neither. Give a reward model's folder, or set init: new."
        )
    return False


# ---------------------------------------------------------------------- scores


def sequence_ends(sequences: Tensor, num_sequences: int) -> Tensor:
    """Where the last counted token of each sequence lies: one after the last position that predicts one of its tokens.

    Args:
        sequences: The sequence whose token is predicted, S where nothing counts; (B, T).
        num_sequences: S. Each has a counted token; the answer for one that has none is 0.

    Returns:
        Indices into the B * T positions, row by row; (S,) int64.
    """
    flat = sequences.reshape(-1)
    positions = torch.arange(flat.numel(), device=flat.device)
    last = positions.new_full((num_sequences + 1,), -1).scatter_reduce(0, flat, positions, "amax")
    return last[:num_sequences] + 1


def last_counted(mask: Tensor) -> Tensor:
    """Index of the last 1 in each row of a mask (B, T), on whichever side the padding is; 0 in a row of zeros; (B,)."""
    return (torch.arange(mask.shape[1], device=mask.device) * (mask != 0)).amax(dim=1)


def score_kernel(head: nn.Module, sequences: Tensor, num_sequences: int) -> Kernel:
    """What a reward model hands to its backbone: the head's value at the last counted token of each sequence.

    Args:
        head: From hidden states (S, H) to values (S,).
        sequences: As in `sequence_ends`; (B, T).
        num_sequences: S; with 0 the scores are empty and their gradients zero.

    Returns:
        A kernel that gives scores, (S,), from hidden states (B, T, H).
    """

    def scores(hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> Tensor:
        values: Tensor = head(hidden.flatten(0, 1)[sequence_ends(sequences, num_sequences)])
        return values

    return scores
