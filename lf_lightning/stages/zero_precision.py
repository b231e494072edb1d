"""What precision means under DeepSpeed: the same as without it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins import DeepSpeedPrecision
from torch import nn


class ZeroPrecision(DeepSpeedPrecision):
    """Weights keep the types that they were loaded in; bf16-mixed is torch's autocast, as under every strategy.

    Lightning's own casts a frozen bfloat16 model to float32, and under bf16-mixed everything to bfloat16.

    Args:
        precision: Of the trainer.
        device_type: Where the ranks compute.
    """

    def __init__(self, precision: Any, device_type: str) -> None:
        super().__init__(precision)
        self._device_type = device_type

    def convert_module(self, module: nn.Module) -> nn.Module:
        """As it is."""
        return module

    def convert_input(self, data: Any) -> Any:
        """As it is."""
        return data

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """New tensors have torch's own type."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Autocast where it is asked for, outside the engine too."""
        return torch.autocast(self._device_type, torch.bfloat16, enabled=self.precision == "bf16-mixed")
