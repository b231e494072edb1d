"""Ways to tune: which parameters train. One small frozen spec each."""

from __future__ import annotations

import difflib
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from lf_lightning.models.tensor_files import refuse_pickles
from lf_lightning.shards import has_storage, without_storage
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Tuning(ABC):
    """Which parameters of the backbone train."""

    @abstractmethod
    def apply(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Set `requires_grad` of every parameter, and add adapters where there are any.

        Raises:
            InputError: The model lacks what the spec names.
        """


@dataclass(frozen=True)
class Full(Tuning):
    """Every parameter trains."""

    def apply(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Let every parameter train."""
        model.requires_grad_(True)
        return model


@dataclass(frozen=True)
class Freeze(Tuning):
    """The last blocks train; embeddings, earlier blocks, the last norm and the output layer stay.

    Args:
        num_layers: Number of blocks that train, counted from the end, > 0.
    """

    num_layers: int = 2

    def apply(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Let the parameters of the last blocks train."""
        blocks = decoder_blocks(model)
        if not 1 <= self.num_layers <= len(blocks):
            raise InputError(
                f"model.init_args.tuning.init_args.num_layers: must be 1 to {len(blocks)} for this model, "
                f"got {self.num_layers}. Choose a number in that range."
            )
        model.requires_grad_(False)
        trained = blocks[-self.num_layers :]
        for block in trained:
            block.requires_grad_(True)
        half = next(model.parameters()).dtype
        if half in (
            torch.bfloat16,
            torch.float16,
        ):  # the trained blocks will be float32: cast where they meet the others
            trained[0].register_forward_pre_hook(_cast_inputs, with_kwargs=True)
            trained[-1].register_forward_hook(partial(_cast_output, dtype=half))
        return model


@dataclass(frozen=True)
class LoRA(Tuning):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): W + (alpha / rank) B A, of which only A and B train.

    Args:
        rank: Rank of the update, > 0.
        alpha: Strength of the update; empty means 2 * rank.
        dropout: Probability of dropping an input of A while training, in [0, 1).
        target: Linear layers that get an adapter: `all` (every one but the output layer; experts that a model fuses
            into one tensor are no linear layers), or a list of module names such as [q_proj, v_proj].
        adapter: Folder of an adapter to continue. Its own rank, alpha, dropout and target apply, so none of them may
            be given beside it.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target: str | list[str] = "all"
    adapter: str | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range, and options that an adapter to continue would override.

        Raises:
            InputError: As said.
        """
        where = "model.init_args.tuning.init_args"
        if self.rank < 1:
            raise InputError(f"{where}.rank: must be at least 1, got {self.rank}. Try 8.")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"{where}.alpha: must be positive, got {self.alpha}. Leave it out for 2 * rank.")
        if not self.target:
            raise InputError(f"{where}.target: must name linear layers, got none. Use all.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"{where}.dropout: must be in [0, 1), got {self.dropout}. Try 0.0.")
        if self.adapter and (self.rank, self.alpha, self.dropout, self.target) != (8, None, 0.0, "all"):
            raise InputError(
                f"{where}: an adapter to continue brings its own rank, alpha, dropout and target, got some beside "
                f"adapter: {self.adapter}. Remove them, or remove adapter."
            )

    def apply(self, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
        """Add new adapters, or load the ones to continue; everything else is frozen."""
        from peft import LoraConfig, get_peft_model

        if self.adapter is not None:
            return _continued(model, self.adapter)
        target: str | list[str] = "all-linear"
        if self.target != "all":
            target = [self.target] if isinstance(self.target, str) else list(self.target)
            _check_targets(model, target)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]  # takes floats
            lora_dropout=self.dropout,
            target_modules=target,
            task_type="CAUSAL_LM",
        )
        adapted: PeftModel = get_peft_model(model, config)
        return adapted


def _cast_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Hidden states of frozen half-precision blocks become the float32 of the first trained one."""
    cast = [_to(value, torch.float32) for value in args]
    return tuple(cast), {name: _to(value, torch.float32) for name, value in kwargs.items()}


def _cast_output(block: nn.Module, args: tuple[Any, ...], output: Any, *, dtype: torch.dtype) -> Any:
    """Hidden states of the last trained block become the half precision of the frozen norm and output layer."""
    if isinstance(output, tuple):
        return (_to(output[0], dtype), *output[1:])
    return _to(output, dtype)


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _continued(model: PreTrainedModel, adapter: str) -> PeftModel:
    """A model with a saved adapter that trains on; of a reward model's, all but its value head."""
    from peft import PeftConfig, PeftModel

    where, folder = "model.init_args.tuning.init_args.adapter", Path(adapter)
    refuse_pickles(folder, where)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{where}: must be a folder with {name}, got {adapter}. Give the folder of an adapter.")
    try:
        config: Any = PeftConfig.from_pretrained(adapter)
        if config.task_type == "SEQ_CLS":
            config.task_type, config.modules_to_save = "CAUSAL_LM", None
        continued: PeftModel = PeftModel.from_pretrained(model, adapter, is_trainable=True, config=config)
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise InputError(f"{where}: {adapter} does not fit the model, got {reason} Use its own base model.") from error
    return continued


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer blocks of a model: its list of as many modules as the config counts layers."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise InputError(
        f"model.init_args.tuning: no list of {num_layers} blocks in {type(model).__name__}. Use Full or LoRA instead."
    )


def upcast_trainable(model: nn.Module) -> None:
    """Hold every trainable parameter in float32 at least: half precision would round small updates away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            real = has_storage(parameter)  # otherwise each rank has its rows elsewhere
            parameter.data = parameter.data.float() if real else without_storage(parameter, torch.float32)


def copies_modules(tuning: Tuning) -> bool:
    """Whether peft will copy whole layers of the model, for an adapter that brings trained copies of its own."""
    if not isinstance(tuning, LoRA) or tuning.adapter is None:
        return False
    path = Path(tuning.adapter) / "adapter_config.json"
    return path.is_file() and bool(json.loads(path.read_text()).get("modules_to_save"))


def _check_targets(model: nn.Module, target: list[str]) -> None:
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
    for want in target:
        if not any(name == want or name.endswith(f".{want}") for name in names):
            near = difflib.get_close_matches(want, leaves, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Choose among {', '.join(leaves)}."
            raise InputError(
                f"model.init_args.tuning.init_args.target: must name linear layers of the model, got {want}. {hint}"
            )
