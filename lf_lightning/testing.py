"""For tests of models: load them as training and as plain transformers does, and say what differs and what trains.

The names are those of LlamaFactory's `train/test_utils.py`. `patch_valuehead_model` has no successor: our value head is
a module that loads its own file, so there is nothing to patch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lf_lightning.data.datamodule import DataModule
from lf_lightning.data.tokenizer import add_new_tokens, load_tokenizer
from lf_lightning.models import Backbone, Full, LoRA, Tuning, ValueHeadSpec, add_value_head, load_backbone
from lf_lightning.models.export import load_weights
from lf_lightning.models.value_head import ValueHead
from lf_lightning.models.value_head_files import find_value_head, load_value_head
from lf_lightning.types import BackboneSpec, Task, Unit

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def compare_model(a: nn.Module, b: nn.Module, diff_keys: Iterable[str] = ()) -> None:
    """Assert that two models have the same weights, but for those that are named.

    Args:
        a: A model.
        b: Another one.
        diff_keys: Parts of names; tensors whose name contains one must differ.

    Raises:
        AssertionError: Names that only one has, the first tensor that differs, or the first that should and does not;
            equal means within 1e-5 + 1e-4 of the value.
    """
    ours, theirs, parts = a.state_dict(), b.state_dict(), tuple(diff_keys)
    only = sorted(ours.keys() ^ theirs.keys())
    assert not only, f"only one of the models has {', '.join(only[:5])}"
    for name, tensor in ours.items():
        same = tensor.shape == theirs[name].shape and torch.allclose(tensor, theirs[name], rtol=1e-4, atol=1e-5)
        should_differ = any(part in name for part in parts)
        assert same != should_differ, f"{name} must {'differ' if should_differ else 'be equal'}"


def check_lora_model(model: nn.Module) -> tuple[set[str], set[str]]:
    """Assert that of a model exactly its adapter trains, in float32.

    Args:
        model: With peft's LoRA on it.

    Returns:
        Last names of the layers that are adapted, and of the modules that train whole.

    Raises:
        AssertionError: A part of the adapter does not train or is in another type, or something else trains.
    """
    adapted: set[str] = set()
    whole: set[str] = set()
    for name, parameter in model.named_parameters():
        places = name.split(".")
        marks = [place for place in ("lora_A", "lora_B", "modules_to_save") if place in places]
        if not marks:
            assert not parameter.requires_grad, f"{name} must not train"
            continue
        assert parameter.requires_grad, f"{name} must train"
        assert parameter.dtype == torch.float32, f"{name} must be float32, got {parameter.dtype}"
        found = whole if marks[0] == "modules_to_save" else adapted
        found.add(places[places.index(marks[0]) - 1])
    return adapted, whole


def load_train_model(
    backbone: BackboneSpec, tuning: Tuning = LoRA(), *, add_valuehead: bool = False, seed: int = 0
) -> Backbone:
    """The model as a stage trains it.

    Args:
        backbone: Which model.
        tuning: Which parameters train.
        add_valuehead: Whether it gets a value head, as rm does.
        seed: Of new weights.

    Raises:
        InputError: As a run would end with.
    """
    return _loaded(backbone, tuning, add_valuehead=add_valuehead, seed=seed, trains=True)


def load_infer_model(
    backbone: BackboneSpec,
    tuning: Tuning = Full(),
    *,
    folder: Path | str | None = None,
    add_valuehead: bool = False,
    seed: int = 0,
) -> Backbone:
    """The model as `predict` runs it: frozen and in evaluation mode.

    Args:
        backbone: Which model.
        tuning: As it was trained with; of a model nobody has trained, Full.
        folder: A checkpoint or final/ with trained weights.
        add_valuehead: Whether it has a value head.
        seed: Of new weights.

    Raises:
        InputError: As a run would end with.
    """
    loaded = _loaded(backbone, tuning, add_valuehead=add_valuehead, seed=seed, trains=False)
    if folder is not None:
        load_weights(loaded, Path(folder))
    return loaded.requires_grad_(False).eval()


def load_reference_model(
    path: Path | str, adapter: Path | str | None = None, *, is_trainable: bool = False, add_valuehead: bool = False
) -> PreTrainedModel | PeftModel:
    """The model as plain transformers and peft load it, to hold ours against.

    Args:
        path: Folder of the model.
        adapter: Folder of an adapter on top. Ours are valid on the original model, PiSSA too.
        is_trainable: Whether the adapter trains, in float32; without one the whole model does.
        add_valuehead: Whether it gets the value head of the last of the two folders that has one, as `v_head`.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto", use_safetensors=True)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=is_trainable)
    else:
        model.requires_grad_(is_trainable)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if add_valuehead:
        folders = [str(each) for each in (adapter, path) if each is not None]
        folder = next(found for name in folders if (found := find_value_head(name, revision=None)) is not None)
        like = model.get_input_embeddings().weight
        model.v_head = ValueHead(like.shape[1], bias=True, dropout=0.0, like=like)
        load_value_head(model.v_head, folder)
    return model.train(is_trainable)  # type: ignore[no-any-return]


def load_train_dataset(backbone: BackboneSpec, task: Task, **options: Any) -> list[Unit]:
    """The units of the first epoch, in the order in which they train.

    Args:
        backbone: Whose tokenizer encodes.
        task: How rows are encoded.
        options: Of the DataModule, `datasets` first of all.

    Raises:
        InputError: As a run would end with.
    """
    data = DataModule(backbone, task, **options)
    data.open_sets("fit")
    return data.units("train")


def _loaded(backbone: BackboneSpec, tuning: Tuning, *, add_valuehead: bool, seed: int, trains: bool) -> Backbone:
    tokenizer = load_tokenizer(backbone)
    new_rows = add_new_tokens(tokenizer, backbone)
    loaded = load_backbone(backbone, tuning, vocab_size=len(tokenizer), seed=seed, trains=trains, new_rows=new_rows)
    if add_valuehead:
        add_value_head(loaded, ValueHeadSpec(), tuning=tuning, path=backbone.path, seed=seed)
    return loaded
