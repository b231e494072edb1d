"""A model without dropout: what it trains is then what it computes."""

from __future__ import annotations

from typing import Any

from torch import nn

LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def without_dropout(model: nn.Module, *, adapters: bool = False) -> None:
    """Switch dropout off in every layer of a model and in its configuration.

    Args:
        model: The model.
        adapters: Switch it off in adapters too; otherwise they keep what their tuning says.

    Attention reads its probability from a number on the layer, such as `attention_dropout`; some families (falcon) read
    it from the configuration at every call, so what is saved says 0 too.
    """
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if {"lora_dropout", "oft_dropout"} & {*name.split(".")} and not adapters:
            continue
        if isinstance(module, LAYERS):
            module.p = 0.0
        _clear(vars(module))
        if isinstance(module, PreTrainedModel):
            _clear(vars(module.config))
            _clear(vars(module.config.get_text_config()))


def _clear(attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop")):
            attributes[name] = 0.0
