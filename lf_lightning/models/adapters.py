"""Ways to tune: which parameters train. One small frozen spec each; this room holds what they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
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

WHERE = "model.init_args.tuning.init_args"


@dataclass(frozen=True)
class Tuning(ABC):
    """Which parameters of the backbone train."""

    @abstractmethod
    def apply(self, model: PreTrainedModel, *, vocabulary: Sequence[str] = ()) -> PreTrainedModel | PeftModel:
        """Set `requires_grad` of every parameter, and add adapters where there are any.

        Args:
            model: The model.
            vocabulary: Names of modules that must train whole beside: embedding and output layer of new tokens.

        Raises:
            InputError: The model lacks what the spec names.
        """

    @property
    def needs_whole_weights(self) -> bool:
        """Whether `apply` reads or copies weights, which a rank that holds only its rows of them cannot."""
        return False


@dataclass(frozen=True)
class Full(Tuning):
    """Every parameter trains."""

    def apply(self, model: PreTrainedModel, *, vocabulary: Sequence[str] = ()) -> PreTrainedModel | PeftModel:
        """Let every parameter train."""
        model.requires_grad_(True)
        return model


class Adapter(Tuning):
    """Parameters beside the model's own, which stay as they are."""

    adapter: str | None
    """Folder of an adapter to continue."""
    dropout: float
    """Probability of leaving out a part of the adapter while training."""
    modules_to_save: Sequence[str]
    """Modules that train whole and are saved with the adapter."""
    kind: str
    """What peft calls it."""

    @property
    def shifts_base(self) -> bool:
        """Whether the new adapter is no zero: it takes over a part of the weights, which lose it."""
        return False

    @property
    def needs_whole_weights(self) -> bool:
        """As said; peft copies modules that train whole, and reads the weights that an adapter takes over."""
        if self.adapter is None:
            return bool(self.modules_to_save) or self.shifts_base
        folder = Path(self.adapter)
        if not (folder / "adapter_config.json").is_file():
            return False
        return vars(_config_of(folder, "adapter")).get("modules_to_save") is not None  # not every kind has it

    def check_alone(self) -> None:
        """Refuse options that an adapter to continue overrides.

        Raises:
            InputError: As said.
        """
        given = [
            each.name
            for each in fields(self)
            if each.name != "adapter" and each.default is not MISSING and not _same(vars(self)[each.name], each.default)
        ]
        if self.adapter and given:
            raise InputError(
                f"{WHERE}: an adapter to continue brings its own {', '.join(given)}, got them beside "
                f"adapter: {self.adapter}. Remove them, or remove adapter."
            )


def _same(given: Any, default: Any) -> bool:
    return given == default or (isinstance(default, tuple) and not default and not given)


def continued(model: PreTrainedModel, tuning: Adapter, vocabulary: Sequence[str]) -> PeftModel:
    """A model with a saved adapter that trains on; of a reward model's, all but its value head.

    Raises:
        InputError: The folder holds no adapter of this kind, or one that does not fit.
    """
    assert tuning.adapter is not None
    folder = Path(tuning.adapter)
    config = _checked_config(tuning.adapter, f"{WHERE}.adapter")
    if config.peft_type.value != tuning.kind:
        raise InputError(
            f"{WHERE}.adapter: must be a {tuning.kind} adapter for {type(tuning).__name__}, got "
            f"{config.peft_type.value} in {folder}. Use the tuning of its kind."
        )
    kept = vars(config).get("modules_to_save") or ()
    left = [name for name in vocabulary if not any(name == each or name.endswith(f".{each}") for each in kept)]
    if left:
        raise InputError(
            f"{WHERE}.adapter: must train {left[0]} whole where there are new tokens, got one in {folder} that does "
            "not. Put it into backbone.merge_adapters, and train a new adapter."
        )
    return _loaded(model, folder, config, where=f"{WHERE}.adapter", is_trainable=True)


def merge_adapters(model: PreTrainedModel, folders: Iterable[str]) -> PreTrainedModel:
    """A model into whose weights saved adapters are merged, one after the other.

    Raises:
        InputError: A folder holds no adapter, or one that does not fit or is not finite.
    """
    where = "model.init_args.backbone.merge_adapters"
    for name in folders:
        folder = Path(name)
        loaded: Any = _loaded(model, folder, _checked_config(name, where), where=where, is_trainable=False)
        try:
            model = loaded.merge_and_unload(safe_merge=True)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            raise InputError(
                f"{where}: {folder} cannot be merged, got {_reason(error)} Use another adapter."
            ) from error
    return model


def _config_of(folder: Path, where: str) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{where}: {folder} cannot be read, got {_reason(error)} Give another adapter.") from error


def _checked_config(given: str, where: str) -> Any:
    """The configuration of a saved adapter that is valid on its base as it stands."""
    folder = Path(given)
    refuse_pickles(folder, where)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{where}: must be a folder with {name}, got {given}. Give the folder of an adapter.")
    config = _config_of(folder, where)
    if config.task_type == "SEQ_CLS":
        kept = [name for name in config.modules_to_save or () if name not in ("score", "classifier")]
        config.task_type, config.modules_to_save = "CAUSAL_LM", kept or None
    init = vars(config).get("init_lora_weights")
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        raise InputError(
            f"{where}: must be valid on its base, got {folder}, which was started as {init} and belongs to a base "
            "without what the start took out of it. Convert it to a plain LoRA first: our final/ folders are."
        )
    return config


def _loaded(model: PreTrainedModel, folder: Path, config: Any, *, where: str, is_trainable: bool) -> PeftModel:
    from peft import PeftModel

    try:
        loaded: PeftModel = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable, config=config)
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"{where}: {folder} does not fit the model, got {_reason(error)} Use its own base.") from error
    return loaded


def _reason(error: Exception) -> str:
    return " ".join(" ".join(str(error).splitlines()[:2]).split())


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


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and output layer are one weight."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight
