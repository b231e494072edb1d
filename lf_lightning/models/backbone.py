"""The language model as the stages see it: tokens in, what the stage's kernel makes of hidden states out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lf_lightning.models import attention
from lf_lightning.models.quantization import size_of
from lf_lightning.models.tensor_parallel import local_weight
from lf_lightning.shards import whole_shape
from lf_lightning.types import InputError, Kernel, Layout, OutputLayer, TokenBatch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from lf_lightning.models.parts import Parts
    from lf_lightning.models.value_head import ValueHead


class Backbone(nn.Module):
    """A causal language model whose output layer is computed by the kernel that the caller hands in.

    The kernel is called inside `forward`, because there the weights are whole under every sharding strategy.

    Args:
        model: The model, or a peft model around it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        self.parts: Parts = {}
        """This rank's rows of parameters that have no storage yet; `shard` puts them in."""
        self.start: dict[str, Tensor] = {}
        """What an adapter began with that took it out of the weights, by names in its file; on the CPU, whole."""
        self.is_merged = False
        """Whether adapters were merged into the weights."""
        self.value_head: ValueHead | None = None
        """What turns hidden states into scores; only the backbone of a reward model has one."""
        self._padded_kernel: str = self.causal_lm.config._attn_implementation or "eager"
        config = self.causal_lm.config.to_dict()
        scale = config.get("logit_scale") or config.get("lm_head_multiplier") or 1.0  # cohere; falcon_h1
        self._logit_scale = float(scale) / (config.get("logits_scaling") or 1.0)  # granite divides
        self._softcap: float | None = config.get("final_logit_softcapping")  # gemma
        if self._decoder is self.causal_lm:
            kind = type(self.causal_lm).__name__
            raise InputError(
                f"model.init_args.backbone: {kind} has no decoder apart from its output layer, got {kind}. "
                "Use a causal language model with base_model and lm_head."
            )

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, without peft's wrapper."""
        from peft import PeftModel

        model: Any = self.model
        if isinstance(model, PeftModel):
            model = cast("Any", model.get_base_model())
        causal_lm: PreTrainedModel = model
        return causal_lm

    @property
    def is_adapter(self) -> bool:
        """Whether only an adapter is trained and saved."""
        from peft import PeftModel

        return isinstance(self.model, PeftModel)

    @property
    def _decoder(self) -> nn.Module:
        decoder: nn.Module = self.causal_lm.base_model
        return decoder

    @property
    def output_layer(self) -> OutputLayer:
        """How this family turns hidden states into logits; an adapter on the output layer is merged on the fly."""
        weight, bias = head_weights(self.causal_lm.get_output_embeddings())
        weight, bias = local_weight(weight), None if bias is None else local_weight(bias)
        return OutputLayer(weight=weight, bias=bias, scale=self._logit_scale, softcap=self._softcap)

    def forward(self, batch: TokenBatch, *, kernel: Kernel) -> Any:
        """Run the decoder on a micro-batch and the kernel on its last hidden states.

        Args:
            batch: Tokens, (B, T).
            kernel: Called as `kernel(hidden, output_layer, targets)` with hidden states (B, T, H).

        Returns:
            Whatever the kernel returns.
        """
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.positions is not None:
            arguments["position_ids"] = batch.positions
        if batch.documents is not None:
            if self.is_padding_free:
                arguments["documents"] = batch.documents
            elif any(document.branches for document in batch.documents):
                raise ValueError("only the attention of the padding-free layout keeps branches of a document apart")
        hidden: Tensor = self._decoder(**arguments).last_hidden_state
        output_layer = self.output_layer
        if output_layer.weight.dtype == torch.float32:  # a trained output layer on a half-precision model
            hidden = hidden.float()
        return kernel(hidden, output_layer, batch.targets)

    @property
    def is_padding_free(self) -> bool:
        """Whether the attention of the padding-free layout is switched on."""
        return self.causal_lm.config._attn_implementation in (attention.SDPA_DOCUMENTS, attention.EAGER_DOCUMENTS)

    def set_layout(self, layout: Layout) -> None:
        """Switch the attention kernel to the one that the layout needs.

        flash_attention_2 finds documents by their positions and serves both layouts.
        """
        name = self._padded_kernel
        if layout == "padding_free" and name in ("sdpa", "eager"):
            attention.register()
            name = attention.SDPA_DOCUMENTS if name == "sdpa" else attention.EAGER_DOCUMENTS
        self.causal_lm.set_attn_implementation(name)

    @contextmanager
    def padded_attention(self) -> Iterator[None]:
        """The model's ordinary attention for a while: generation pads on the left and keeps a cache."""
        layout: Layout = "padding_free" if self.is_padding_free else "padded"
        self.set_layout("padded")
        try:
            yield
        finally:
            self.set_layout(layout)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: words that the model can read."""
        return embedding_rows(self.causal_lm)

    def num_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters."""
        sizes = [(size_of(parameter), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def embedding_rows(causal_lm: PreTrainedModel) -> int:
    """Words that a model can read."""
    weight = causal_lm.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return whole_shape(weight)[0]


def head_weights(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, H) and bias (V,) of an output layer, with a peft adapter or a trained copy on it where they are on.

    Raises:
        InputError: The layer has another form, or dropout inside it.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.utils import ModulesToSaveWrapper

    if isinstance(head, ModulesToSaveWrapper):
        whole = head.original_module if head.disable_adapters else head.modules_to_save[head.active_adapters[0]]
        return head_weights(whole)
    if isinstance(head, LoraLinear):
        weight, bias = head_weights(head.get_base_layer())
        for name in () if head.merged or head.disable_adapters else head.active_adapters:
            if name not in head.lora_dropout:  # an adapter that leaves this layer alone
                continue
            if not isinstance(head.lora_dropout[name], nn.Identity):
                raise InputError(
                    "model.init_args.tuning.init_args.dropout: must be 0 with an adapter on the output layer, "
                    "got a positive one. Set dropout: 0.0, or leave lm_head out of target."
                )
            weight = weight + head.get_delta_weight(name).to(weight.dtype)
        return weight, bias
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"model.init_args.backbone: the output layer must be a linear layer, got {type(head).__name__}. "
            "Use another model, or leave lm_head out of the tuning's target."
        )
    return head.weight, head.bias
