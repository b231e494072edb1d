"""A reward model as a folder for transformers' AutoModelForSequenceClassification, with which any library scores."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lf_lightning.models.tensor_files import tensor_files
from lf_lightning.models.value_head_files import SCORE, WEIGHT, whole_head
from lf_lightning.types import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lf_lightning.models.backbone import Backbone

SAVE_AS = "model.init_args.value_head.save_as"
ONE_LABEL = {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}}
INDEX = "model.safetensors.index.json"


def check_has_classifier(backbone: Backbone) -> None:
    """Make sure that transformers has a class for this family that is our decoder and a linear layer on top.

    Raises:
        InputError: It has none, or one of another form.
    """
    causal_lm = backbone.causal_lm
    if backbone.is_adapter and any("modules_to_save" in name for name, _ in causal_lm.named_parameters()):
        raise InputError(
            f"{SAVE_AS}: sequence_classification cannot hold modules that train whole beside an adapter, such as the "
            "embedding of new tokens, got some. Set save_as: value_head."
        )
    config = causal_lm.config
    kind = _classifier(config)
    if kind is None:
        raise InputError(
            f"{SAVE_AS}: sequence_classification needs a class of transformers, which has none for "
            f"{config.model_type}. Set save_as: value_head."
        )
    with torch.device("meta"):
        classifier = kind(type(config).from_dict(config.to_dict() | ONE_LABEL))
    shapes = {name: tuple(tensor.shape) for name, tensor in classifier.state_dict().items()}
    if shapes != _decoder_shapes(backbone) | {SCORE[0]: (1, causal_lm.get_output_embeddings().in_features)}:
        raise InputError(
            f"{SAVE_AS}: sequence_classification needs a class that is the decoder and one linear layer, got "
            f"{kind.__name__}. Set save_as: value_head."
        )


def _classifier(config: PretrainedConfig) -> Any:
    """The class of transformers for sequence classification with this family; None where it has none."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    known = type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)] if known else None


def _decoder_shapes(backbone: Backbone) -> dict[str, tuple[int, ...]]:
    """Shape of every weight but the output layer's, by the name it has without adapters."""
    causal_lm = backbone.causal_lm
    output_layer = _output_layer_name(causal_lm)
    return {
        name.replace(".base_layer", ""): tuple(tensor.shape)
        for name, tensor in causal_lm.state_dict().items()
        if ".lora_" not in name and not name.startswith(f"{output_layer}.")
    }


def _output_layer_name(causal_lm: Any) -> str:
    output_layer: nn.Module = causal_lm.get_output_embeddings()
    names = (name for name, module in causal_lm.named_modules() if module is output_layer)
    return str(next(names))


def export_sequence_classification(
    backbone: Backbone,
    folder: Path,
    *,
    writes: bool,
    ending_ids: Collection[int] | None = None,
    pad_id: int | None = None,
) -> int | None:
    """Turn what `save_weights` wrote into a folder that AutoModelForSequenceClassification opens (for LoRA with peft).

    transformers scores the right-most token that is not the pad token, by its id. A pad token that can also end a
    sequence would move the score to the wrong token, so it never becomes that of the folder; without any, transformers
    scores one sequence at a time and refuses more. An adapter cannot bring a pad token: its base's own is used.

    Args:
        backbone: A reward model; where it is sharded, every rank must call.
        folder: What `save_weights` wrote.
        writes: Whether this rank writes; only one may.
        ending_ids: Tokens that can be the last of a sequence; empty means those that end the model's generation.
        pad_id: Pad token to take; empty, or where it can end a sequence: the one of generation, or of the model.

    Returns:
        The pad token of the folder, which its tokenizer must pad with too; None where there is none.
    """
    score = whole_head(backbone)[WEIGHT]
    config: PretrainedConfig = backbone.causal_lm.config
    generation: Any = backbone.causal_lm.generation_config
    if ending_ids is None:
        stop = generation.eos_token_id
        ending_ids = [stop] if isinstance(stop, int) else stop or []
    candidates: tuple[int | None, ...] = (pad_id, generation.pad_token_id, config.get_text_config().pad_token_id)
    pad_token = next((token for token in candidates if token is not None and token not in ending_ids), None)
    if not writes:
        return pad_token
    if backbone.is_adapter:
        _write_adapter(folder, score)
        return pad_token
    _write_weights(folder, score, output_layer=_output_layer_name(backbone.causal_lm))
    _write_config(type(config).from_pretrained(folder), folder, pad_token)
    return pad_token


def _write_adapter(folder: Path, score: Tensor) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), SCORE[1]: score}, path, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_config(config: PretrainedConfig, folder: Path, pad_token: int | None) -> None:
    config.architectures = [_classifier(config).__name__]
    config.num_labels = 1
    config.get_text_config().pad_token_id = pad_token
    config.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # it generates no more


def _write_weights(folder: Path, score: Tensor, *, output_layer: str) -> None:
    """Leave the output layer out and put the score in, in one file or in shards with their index."""
    files = tensor_files(folder)
    leaving = {name for name in files if name.startswith(f"{output_layer}.")}
    target = files[min(leaving)] if leaving else next(iter(files.values()))  # so that no shard is left empty
    removed: list[Tensor] = []
    for path in {target, *(files[name] for name in leaving)}:
        tensors = load_file(path)
        removed += [tensors.pop(name) for name in leaving & tensors.keys()]
        if path == target:
            tensors[SCORE[0]] = score
        save_file(tensors, path, metadata={"format": "pt"})
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text())
        places = {name: file for name, file in index["weight_map"].items() if name not in leaving}
        index["weight_map"] = dict(sorted({**places, SCORE[0]: target.name}.items()))
        totals = index["metadata"]
        totals["total_size"] += score.nbytes - sum(tensor.nbytes for tensor in removed)
        if "total_parameters" in totals:
            totals["total_parameters"] += score.numel() - sum(tensor.numel() for tensor in removed)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
