"""Weights to a folder that transformers and peft open, and back from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lf_lightning.models.backbone import Backbone
from lf_lightning.models.parts import read_parts
from lf_lightning.models.pissa import trained_part
from lf_lightning.models.sharding import cut_again
from lf_lightning.models.tensor_files import names_in, tensor_files
from lf_lightning.models.value_head_files import SCORE, load_value_head
from lf_lightning.shards import cut_as, fill, fill_from, is_cut, own_box, reading_dim, whole_tensor
from lf_lightning.types import InputError

TRAINABLE = "trainable.safetensors"
"""Holds trained parameters by our names, in trainer_state/, where the folder itself stores them under other names."""

TRAINED = "default"
"""peft's name of the adapter that trains; a reward's adapter beside it is not written."""


def save_weights(backbone: Backbone, folder: Path, *, base: str | None, writes: bool) -> None:
    """Write what was trained: an adapter alone, or the whole model, with its configuration.

    Args:
        backbone: The model; where it is sharded, every rank must call.
        folder: An existing folder.
        base: What an adapter names as its base model.
        writes: Whether this rank writes; only one may.
    """
    model: Any = backbone.model
    state = _gathered(backbone, keeps=writes)
    if not writes:
        return
    if backbone.is_adapter:
        model.peft_config[TRAINED].base_model_name_or_path = base
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False, selected_adapters=[TRAINED])
        (folder / "README.md").unlink(missing_ok=True)  # peft writes an empty model card
        _sort_config(folder / "adapter_config.json")
    else:
        model.save_pretrained(folder, state_dict=state)


def _sort_config(path: Path) -> None:
    """Give the names in an adapter's configuration an order: peft writes sets, each process in its own."""
    values = json.loads(path.read_text())
    for name in ("target_modules", "target_parameters", "modules_to_save"):
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _gathered(backbone: Backbone, *, keeps: bool) -> dict[str, Tensor] | None:
    """What is written of a sharded model, whole and on the CPU, one tensor after the other; None where none is sharded.

    A tensor with several names is one tensor here too, so that it is written once. Ranks that do not keep them hold one
    at a time.
    """
    cut_again(backbone)
    model = backbone.model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if not any(map(is_cut, parameters.values())):
        return None
    known: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, held in model.state_dict().items():
        if backbone.is_adapter and TRAINED not in name.split("."):
            continue
        key = id(parameters.get(name, held))
        if key not in known:
            whole = whole_tensor(parameters.get(name, held))
            known[key] = whole.cpu() if keeps else torch.empty(0)
        state[name] = known[key]
    return state


def unnamed_weights(backbone: Backbone, folder: Path) -> list[str]:
    """Names of the trained parameters that `folder` does not hold under these names.

    Some families (fused experts) are saved in another arrangement than they are trained in.
    """
    if backbone.is_adapter:
        return []
    names = set(tensor_files(folder))
    aliases = tied_names(backbone)
    return [
        name
        for name, parameter in backbone.causal_lm.named_parameters()
        if parameter.requires_grad and name not in names and not aliases.get(name, set()) & names
    ]


def save_named_weights(backbone: Backbone, names: list[str], folder: Path, *, writes: bool) -> None:
    """Write parameters by our names to `folder`/trainer_state; where they are sharded, every rank must call."""
    cut_again(backbone)
    parameters = dict(backbone.causal_lm.named_parameters())
    tensors = {}
    for name in names:
        tensor = whole_tensor(parameters[name])
        if writes:
            tensors[name] = tensor.cpu().contiguous()
    if tensors:
        save_file(tensors, folder / "trainer_state" / TRAINABLE)


def load_weights(backbone: Backbone, folder: Path) -> None:
    """Put the trained weights of a checkpoint or a final folder into a model of the same make, value head included.

    Raises:
        InputError: The folder holds no weights, or not those that this model trains.
    """
    cut_again(backbone)
    if backbone.is_adapter != (folder / "adapter_config.json").is_file():
        want, got = ("an adapter", "none") if backbone.is_adapter else ("a whole model", "an adapter")
        raise InputError(f"{folder}: must hold {want}, as the tuning says, got {got}. Use the run's own tuning.")
    if backbone.value_head is not None:
        load_value_head(backbone.value_head, folder)
    if backbone.is_adapter:
        _load_adapter(backbone, folder)
    else:
        _load_model(backbone, folder)


def _load_model(backbone: Backbone, folder: Path) -> None:
    files = tensor_files(folder)
    own = folder / "trainer_state" / TRAINABLE
    files |= dict.fromkeys(names_in(own), own) if own.is_file() else {}
    aliases = tied_names(backbone)
    converted: dict[str, Tensor] | None = None
    for name, parameter in backbone.causal_lm.named_parameters():
        stored = next((alias for alias in (name, *sorted(aliases.get(name, ()))) if alias in files), None)
        if stored is not None:
            with safe_open(files[stored], "pt") as handle:
                rows = handle.get_slice(stored)
                _check_shape(parameter, rows.get_shape(), name, folder)
                fill(parameter, rows)
            continue
        if parameter.requires_grad and converted is None:
            converted = _converted(backbone, folder)
        found = (converted or {}).get(name)
        if found is not None:
            _check_shape(parameter, list(found.shape), name, folder)
            fill_from(parameter, found)
        elif parameter.requires_grad:
            raise InputError(f"{folder}: lacks the trained weight {name}. Give a folder of this configuration.")


def _converted(backbone: Backbone, folder: Path) -> dict[str, Tensor]:
    """The weights of a folder in the arrangement in which the model holds them, as transformers converts them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    cut = next((each for each in backbone.parameters() if isinstance(each, DTensor)), None)
    answer: Any
    try:
        mesh = reading_dim(cut.device_mesh) if cut is not None else None
        if mesh is not None:
            config = AutoConfig.from_pretrained(folder)
            answer = read_parts(str(folder), config, mesh, dtype="auto")
        else:
            answer = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", output_loading_info=True, use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: must hold the weights of a model, got none that can be read.") from error
    causal_lm, report = answer
    trained = {name for name, parameter in backbone.causal_lm.named_parameters() if parameter.requires_grad}
    missing = set(report["missing_keys"])  # a folder for sequence classification has no output layer
    if missing & trained:
        raise InputError(f"{folder}: lacks the weight {min(missing & trained)}. Give a folder that is whole.")
    found = causal_lm.named_parameters(remove_duplicate=False)
    return {name: parameter.detach() for name, parameter in found if name not in missing}


def _load_adapter(backbone: Backbone, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError(f"{folder}: must hold adapter_model.safetensors, got none. Give the folder of an adapter.")
    try:
        tensors = load_file(path)
        if backbone.value_head is not None:
            tensors.pop(SCORE[1], None)
        if backbone.start:
            tensors = trained_part(backbone, path, tensors)
        tensors = _cut_for(backbone, tensors)
        result: Any = set_peft_model_state_dict(backbone.model, tensors)
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise InputError(f"{path}: does not fit this model's adapter: {reason} Use the run's own tuning.") from error
    trained = {name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad}
    missing = sorted(trained & set(result.missing_keys))
    if missing or result.unexpected_keys:
        culprit = (missing or result.unexpected_keys)[0]
        raise InputError(f"{path}: does not fit this model's adapter, first at {culprit}. Use the run's own tuning.")


def tied_names(backbone: Backbone) -> dict[str, set[str]]:
    """Every name of a parameter that has several, with all its names."""
    names: dict[int, set[str]] = {}
    by_name = dict(backbone.causal_lm.named_parameters(remove_duplicate=False))
    for name, parameter in by_name.items():
        names.setdefault(id(parameter), set()).add(name)
    return {name: names[id(parameter)] for name, parameter in by_name.items() if len(names[id(parameter)]) > 1}


def _cut_for(backbone: Backbone, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter's file, of which this rank keeps its rows where the adapter is sharded."""
    like = next((each for each in backbone.parameters() if each.requires_grad and isinstance(each, DTensor)), None)
    if like is None:
        return tensors
    return {
        name: cut_as(whole[own_box(like, whole.shape)].contiguous(), like, whole) for name, whole in tensors.items()
    }


def _check_shape(parameter: nn.Parameter, shape: list[int], name: str, folder: Path) -> None:
    if list(parameter.shape) != shape:
        got, want = tuple(shape), tuple(parameter.shape)
        raise InputError(f"{folder}: weight {name} must have shape {want}, got {got}. Use the run's own backbone.")
