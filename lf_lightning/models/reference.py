"""The reference: what the policy was before training, or another model, against which it is held."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from lf_lightning.models.adapters import Adapter, Full, Tuning
from lf_lightning.models.loading import load_backbone
from lf_lightning.models.lora import LoRA
from lf_lightning.models.new_tokens import NewRows
from lf_lightning.shards import whole_tensor
from lf_lightning.types import BackboneSpec, InputError, Kernel, Quantization, TokenBatch

if TYPE_CHECKING:
    from lf_lightning.models.backbone import Backbone

WHERE = "model.init_args.reference"
IDLE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of a configuration that change no number."""
Kind = Literal["copy", "adapters_off", "snapshot", "model"]


@dataclass(frozen=True)
class ReferenceSpec:
    """What the policy is held against.

    Args:
        kind: `copy`: the backbone once more, as it is before training. `adapters_off`: the policy without its adapter.
            `snapshot`: the policy with its adapter as it is before training. `model`: another model, at `path`.
            `auto`: `model` where `path` is given; `snapshot` where an adapter is continued; `adapters_off` for a new
            adapter; else `copy`.
        path: Folder or hub name of another model, which must read the same tokens; code that comes with it is not run.
        adapter: Folder of an adapter on top of that model.
        dtype: Type of a separate reference's weights (`copy`, `model`); empty means as the policy's.
        quantization: Hold a separate reference in few bits, as the backbone's option of that name; empty means as the
            policy's for `copy`, and not for `model`.
        precompute: Compute the reference's log-probs once before training, and keep them on disk.
    """

    kind: Literal["auto", "copy", "adapters_off", "snapshot", "model"] = "auto"
    path: str | None = None
    adapter: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    quantization: Quantization | None = None
    precompute: bool = False

    def __post_init__(self) -> None:
        """Refuse options that the kind does not read.

        Raises:
            InputError: As said.
        """
        if self.kind == "model" and self.path is None:
            raise InputError(f"{WHERE}.path: must be the folder of the reference model, got none. Give it.")
        if self.path is not None and self.kind not in ("auto", "model"):
            raise InputError(f"{WHERE}.path: belongs to kind: model, got kind: {self.kind}. Remove one of the two.")
        if self.adapter is not None and self.path is None:
            raise InputError(
                f"{WHERE}.adapter: lies on top of the model at path, got no path. Give path, or remove adapter."
            )
        if self.kind in ("adapters_off", "snapshot"):
            _refuse_own_types(self, self.kind)


def resolved_kind(spec: ReferenceSpec, tuning: Tuning) -> Kind:
    """Which reference a spec means beside a tuning.

    Raises:
        InputError: The kind needs an adapter and the tuning has none, or `dtype` belongs to no separate reference.
    """
    if spec.kind in ("adapters_off", "snapshot") and not isinstance(tuning, Adapter):
        raise InputError(
            f"{WHERE}.kind: {spec.kind} needs a tuning with an adapter, got {type(tuning).__name__}. Use kind: copy."
        )
    if spec.kind == "adapters_off" and isinstance(tuning, Adapter) and tuning.shifts_base and tuning.adapter is None:
        raise InputError(
            f"{WHERE}.kind: adapters_off would leave weights without what the PiSSA adapter began with, got it beside "
            "a tuning with init: pissa. Use kind: snapshot, or kind: copy."
        )
    if spec.kind != "auto":
        return spec.kind
    if spec.path is not None:
        return "model"
    if not isinstance(tuning, Adapter):
        return "copy"
    kind: Kind = "snapshot" if tuning.adapter is not None or tuning.shifts_base else "adapters_off"
    _refuse_own_types(spec, kind)
    return kind


def _refuse_own_types(spec: ReferenceSpec, kind: str) -> None:
    for name, value in (("dtype", spec.dtype), ("quantization", spec.quantization)):
        if value is not None:
            raise InputError(
                f"{WHERE}.{name}: belongs to a reference with weights of its own, got {value} with kind: {kind}, which "
                f"runs the policy's. Remove {name}, or set kind: copy."
            )


class Reference:
    """A frozen model that runs in evaluation mode. Not a module: its weights are in no checkpoint and no optimizer.

    Args:
        backbone: The one that runs; the policy itself where the reference is made of its weights.
        is_separate: Whether `backbone` is not the policy.
        snapshot: Name of a parameter of `backbone.model` -> what it is held at while the reference runs.
        with_adapters: Whether the adapters of `backbone` belong to the reference.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        is_separate: bool,
        snapshot: dict[str, Tensor] | None = None,
        with_adapters: bool = True,
    ) -> None:
        self.backbone, self.is_separate = backbone, is_separate
        self._snapshot, self._with_adapters = snapshot or {}, with_adapters
        self._switched: Callable[[], AbstractContextManager[None]] = nullcontext
        if not with_adapters:
            self._switched = partial(_adapters_off, backbone)
        elif self._snapshot:
            self._switched = self._held

    def forward(self, batch: TokenBatch, *, kernel: Kernel) -> Any:
        """What `kernel` makes of the reference's hidden states: no dropout, no gradient, the policy left as it was.

        Args:
            batch: Tokens, (B, T).
            kernel: As `Backbone.forward` takes it.
        """
        was_training = self.backbone.training
        self.backbone.eval()
        try:
            with torch.no_grad(), self._switched():
                return self.backbone(batch, kernel=kernel)
        finally:
            self.backbone.train(was_training)

    def to(self, device: torch.device) -> None:
        """Move what the reference holds beside the policy."""
        if self.is_separate:
            self.backbone.to(device)
        self._snapshot = {name: tensor.to(device) for name, tensor in self._snapshot.items()}

    def fingerprint(self) -> str:
        """SHA-256 over the reference's weights and what its configuration computes with them, in hex.

        The same whatever run holds them.

        Where the weights are sharded, every rank must call.
        """
        config = self.backbone.causal_lm.config.to_dict()
        acts = {name: value for name, value in config.items() if name not in IDLE and "drop" not in name}
        digest = hashlib.sha256(json.dumps(acts, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._weights()):
            whole = whole_tensor(tensor)
            data = whole.cpu().contiguous().reshape(-1)
            digest.update(f"{name} {data.dtype} {tuple(whole.shape)}\n".encode())
            digest.update(data.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that act, by their names without an adapter's wrapping; and how strongly adapters act."""
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper

        model = self.backbone.causal_lm
        prefix = next(name for name, module in self.backbone.model.named_modules() if module is model)
        copied = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
        idle = ".modules_to_save." if not self._with_adapters else ".original_module."
        for name, tensor in model.state_dict().items():
            is_adapter = ".lora_" in name or ".oft_R." in name
            if not (is_adapter and not self._with_adapters) and not (name.startswith(copied) and idle in name):
                plain = name.replace(".base_layer", "").replace(".original_module", "")
                plain = plain.replace(".modules_to_save.default", "")
                yield plain, self._snapshot.get(f"{prefix}.{name}".removeprefix("."), tensor)
        for name, module in model.named_modules() if self._with_adapters else ():
            if isinstance(module, LoraLayer):
                yield f"{name}.scaling", torch.tensor([module.scaling[each] for each in module.active_adapters])

    @contextmanager
    def _held(self) -> Iterator[None]:
        """The adapter as it was, for a while; bit by bit back afterwards."""
        parameters = dict(self.backbone.model.named_parameters())
        now = {}
        for name, then in self._snapshot.items():
            data = parameters[name].data  # writing to it is not seen by autograd, whose graph is whole again afterwards
            if isinstance(data, DTensor) and not isinstance(then, DTensor):  # sharded since the snapshot was taken
                then = self._snapshot[name] = distribute_tensor(then, data.device_mesh, data.placements)
            now[name] = data.clone()
            data.copy_(then)
        try:
            yield
        finally:
            for name, tensor in now.items():
                parameters[name].data.copy_(tensor)


@contextmanager
def _adapters_off(policy: Backbone) -> Iterator[None]:
    """The policy without its adapter, for a while; peft freezes parameters on the way, which are thawed again."""
    model: Any = policy.model
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trains in trained:
            parameter.requires_grad_(trains)


def load_reference(
    spec: ReferenceSpec,
    policy: Backbone,
    backbone_spec: BackboneSpec,
    tuning: Tuning,
    *,
    vocab_size: int,
    seed: int,
    device: torch.device | None = None,
    mesh: DeviceMesh | None = None,
    new_rows: NewRows | None = None,
    keeps_bfloat16: bool = False,
) -> Reference:
    """Make the reference that a spec asks for, before the policy trains or is sharded.

    Args:
        spec: Which reference.
        policy: As `load_backbone` made it, with the weights that training starts from.
        backbone_spec: What the policy was loaded from.
        tuning: How the policy is tuned.
        vocab_size: Words of the tokenizer.
        seed: As the policy was loaded with.
        device: Where weights of the reference's own are quantized, as `load_backbone` takes it.
        mesh: Ranks that will share a model of the reference's own, as `load_backbone` takes it.
        new_rows: Words that are new to the policy. Another model at `path` must know them.
        keeps_bfloat16: Whether the policy's trained weights stay bfloat16; a copy of it then does too.

    Raises:
        InputError: The kind does not fit the tuning, or the reference model cannot be loaded.
    """
    kind = resolved_kind(spec, tuning)
    if kind == "adapters_off":
        return Reference(policy, is_separate=False, with_adapters=False)
    if kind == "snapshot":
        trained = {
            name: parameter.detach().clone()
            for name, parameter in policy.model.named_parameters()
            if parameter.requires_grad
        }
        return Reference(policy, is_separate=False, snapshot=trained)
    rows = new_rows if kind == "copy" else None
    options: dict[str, Any] = {"vocab_size": vocab_size, "seed": seed, "device": device, "mesh": mesh, "new_rows": rows}
    options["keeps_bfloat16"] = keeps_bfloat16 and kind == "copy"
    own = _load_own(spec, kind, backbone_spec, tuning, **options)
    own.requires_grad_(False)
    return Reference(own.eval(), is_separate=True)


def _load_own(spec: ReferenceSpec, kind: Kind, backbone_spec: BackboneSpec, tuning: Tuning, **options: Any) -> Backbone:
    """A model beside the policy, in the policy's types or in those of the spec."""
    own_types = spec.dtype is not None or spec.quantization is not None
    upcasts = not own_types and not isinstance(tuning, Adapter)  # as a policy does whose own weights train
    if isinstance(tuning, Adapter) and tuning.adapter is None:  # a new one changes nothing
        tuning = Full()
    backbone_spec = replace(backbone_spec, gradient_checkpointing=False)
    if spec.dtype is not None:
        backbone_spec = replace(backbone_spec, dtype=spec.dtype)
    if spec.quantization is not None or kind == "model":
        backbone_spec = replace(backbone_spec, quantization=spec.quantization, double_quantization=True)
    if own_types:
        tuning = tuning if isinstance(tuning, Adapter) else Full()  # Freeze casts between types, which are all one here
    if kind == "model":
        # its author is not the policy's, and the policy's options say nothing of it
        backbone_spec = replace(backbone_spec, path=spec.path, architecture=None, revision=None)
        backbone_spec = replace(
            backbone_spec,
            trust_remote_code=False,
            merge_adapters=(),
            new_tokens=(),
            new_special_tokens=(),
            new_token_noise=None,
        )
        tuning = LoRA(adapter=spec.adapter) if spec.adapter else Full() if isinstance(tuning, Adapter) else tuning
    try:
        return load_backbone(backbone_spec, tuning, trains=upcasts, **options)
    except InputError as error:
        if kind == "copy":
            raise
        message = str(error).replace("model.init_args.tuning.init_args.adapter", f"{WHERE}.adapter")
        raise InputError(message.replace("model.init_args.backbone", WHERE)) from error
