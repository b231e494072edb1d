"""From a backbone spec to a model, ready to train."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lf_lightning.models.adapters import Adapter, Full, Tuning, merge_adapters, upcast_trainable
from lf_lightning.models.backbone import Backbone, embedding_rows
from lf_lightning.models.casts import cast_around_copies
from lf_lightning.models.new_tokens import NewRows, add_rows, vocabulary_modules
from lf_lightning.models.parts import read_parts, take_parts
from lf_lightning.models.pissa import start_of
from lf_lightning.models.quantization import check_folder, check_quantized, loader_options
from lf_lightning.models.tensor_files import refuse_pickles
from lf_lightning.types import BackboneSpec, InputError, torch_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WHERE = "model.init_args.backbone"


def load_backbone(
    spec: BackboneSpec,
    tuning: Tuning,
    *,
    vocab_size: int,
    seed: int,
    device: torch.device | None = None,
    mesh: DeviceMesh | None = None,
    trains: bool = True,
    keeps_bfloat16: bool = False,
    new_rows: NewRows | None = None,
) -> Backbone:
    """Load or build the model, apply the tuning, and leave it in train mode.

    Args:
        spec: Which model.
        tuning: Which parameters train; those are float32 at least, unless `keeps_bfloat16`.
        vocab_size: Words of the tokenizer: size of a scratch model's embedding, and a lower bound for any other's.
        seed: Seed of new weights (scratch models, adapters).
        device: Where to build; `meta` builds shapes without weights.
        mesh: Ranks that will share the model, one dimension: each reads its rows of the files, which `shard` puts in.
        trains: Otherwise everything is frozen, and stays in the type of the spec.
        keeps_bfloat16: Whether what trains keeps the type of the spec too: the optimizer knows how to step it.
        new_rows: Words of the tokenizer that are new to the model.

    Raises:
        InputError: The folder cannot be read, or model and tokenizer or tuning do not fit.
    """
    check_quantized(spec, tuning, trains=trains)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        needs_whole = tuning.needs_whole_weights or bool(new_rows or spec.merge_adapters)
        config = read_config(spec, vocab_size)
        check_folder(spec, tuning, config, trains=trains, is_cut=mesh is not None)
        model = _build(spec, config, device, None if needs_whole else mesh)
        if new_rows:
            add_rows(model, vocab_size, new_rows, noise=spec.new_token_noise)
        _check_vocabulary(model, vocab_size)
        model = merge_adapters(model, spec.merge_adapters)
        parts = take_parts(model) if any(isinstance(each, DTensor) for each in model.parameters()) else {}
        if spec.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if trains or not isinstance(tuning, Full):  # weights in few bits cannot even be asked to train
            tuned = tuning.apply(model, vocabulary=vocabulary_modules(model) if new_rows else ())
        else:
            tuned = model
    if not trains:
        tuned.requires_grad_(False)
    if not keeps_bfloat16:
        _widen(tuned)
    backbone = Backbone(tuned)
    backbone.parts, backbone.is_merged = parts, bool(spec.merge_adapters)
    if isinstance(tuning, Adapter) and tuning.shifts_base and tuning.adapter is None:
        backbone.start = start_of(tuned)
    if spec.path is None and backbone.is_adapter:
        raise InputError(
            f"{WHERE}: an adapter needs a base that others can load, got a model from architecture. "
            "Set path, or use Full tuning."
        )
    return backbone.train()


def _widen(tuned: nn.Module) -> None:
    """Hold what trains in float32 at least, and cast where it meets what stays in half precision."""
    half = next(tuned.parameters()).dtype
    upcast_trainable(tuned)
    if half in (torch.bfloat16, torch.float16):
        cast_around_copies(tuned, half)


def _build(
    spec: BackboneSpec, config: PretrainedConfig, device: torch.device | None, mesh: DeviceMesh | None
) -> PreTrainedModel:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not spec.trust_remote_code:
        raise InputError(f"{WHERE}: must be a causal language model, got {config.model_type}. Choose another model.")
    attention = None if spec.attention == "auto" else spec.attention
    dtype = "auto" if spec.dtype == "auto" else torch_dtype(spec.dtype)
    try:
        if spec.path is None or (device is not None and device.type == "meta"):
            with device or torch.device("cpu"):
                scratch_dtype = config.dtype or torch.float32 if dtype == "auto" else dtype
                model = AutoModelForCausalLM.from_config(config, dtype=scratch_dtype, attn_implementation=attention)
        else:
            options: dict[str, Any] = {
                "dtype": dtype,
                "attn_implementation": attention,
                "trust_remote_code": spec.trust_remote_code,
                "revision": spec.revision,
                "ignore_mismatched_sizes": True,  # _check_complete refuses them, by name
                **loader_options(
                    spec.quantization,
                    double=spec.double_quantization,
                    dtype=spec.dtype,
                    config=config,
                    device=device,
                ),
            }
            model, report = _read(spec.path, config, mesh, options)
            _check_complete(spec.path, report)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"{WHERE}: the model needs a package that is missing, got {_first_line(error)} Install it."
        ) from error
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as error:
        raise InputError(
            f"{WHERE}: the model cannot be loaded, got {_first_line(error)} Check path and attention."
        ) from error
    loaded: PreTrainedModel = model
    return loaded


def _read(
    path: str, config: PretrainedConfig, mesh: DeviceMesh | None, options: dict[str, Any]
) -> tuple[PreTrainedModel, Any]:
    """A model from files, whole or this rank's rows, and transformers' report of its weights."""
    if mesh is not None:
        return read_parts(path, config, mesh, **options)
    from transformers import AutoModelForCausalLM

    answer: Any = AutoModelForCausalLM.from_pretrained(
        path, config=config, output_loading_info=True, use_safetensors=True, **options
    )
    model, report = answer
    return model, report


def _check_complete(path: str, report: Any) -> None:
    """Refuse weights that do not fill the model: transformers would draw the missing ones at random."""
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{WHERE}.path: {path} lacks the weight {missing[0]}{more}. Use a folder that is whole.")
    for name, got, want in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{WHERE}.path: weight {name} of {path} must have shape {tuple(want)}, as its config.json says, "
            f"got {tuple(got)}. Use a folder that is whole."
        )


def read_config(spec: BackboneSpec, vocab_size: int) -> PretrainedConfig:
    """The configuration of a model, before its weights are read.

    Raises:
        InputError: It cannot be read.
    """
    from transformers import AutoConfig

    if spec.architecture is not None:
        return _scratch_config(spec.architecture, vocab_size)
    assert spec.path is not None
    refuse_pickles(Path(spec.path), f"{WHERE}.path")
    looks_local = spec.path.startswith((".", "/", "~")) or spec.path.count("/") != 1
    if looks_local and not (Path(spec.path) / "config.json").is_file():
        raise InputError(
            f"{WHERE}.path: must be a folder with config.json or a hub name, got {spec.path}. Correct the path."
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            spec.path, trust_remote_code=spec.trust_remote_code, revision=spec.revision
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{WHERE}.path: {spec.path} cannot be read, got {_first_line(error)} Correct the path."
        ) from error
    return config


def _scratch_config(architecture: dict[str, Any], vocab_size: int) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    values = {"vocab_size": vocab_size, **architecture}
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{WHERE}.architecture.model_type: must be one that transformers knows, got {model_type}. Try llama."
        )
    kind = CONFIG_MAPPING[model_type]
    known = {*kind().to_dict(), *kind.attribute_map, "rope_theta", "head_dim"}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Remove it."
            raise InputError(f"{WHERE}.architecture.{key}: {model_type} has no such option. {hint}")
    if "pad_token_id" in known:  # a family's own may lie beyond a small vocabulary
        values.setdefault("pad_token_id", None)
    try:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"{WHERE}.architecture: cannot be built, got {_first_line(error)} Correct it.") from error
    return config


def _check_vocabulary(model: PreTrainedModel, vocab_size: int) -> None:
    rows = embedding_rows(model)
    if rows < vocab_size:
        raise InputError(
            f"{WHERE}: the embedding must cover the tokenizer's {vocab_size} words, got {rows} rows. "
            "Use the tokenizer that belongs to the model."
        )


def _first_line(error: Exception) -> str:
    """A library's message as one line that ends in a full stop; its first two lines, where it is long."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2])
    return (text if len(text) <= 200 else text[:197] + "...").rstrip(".") + "."
