"""The strategy `fsdp2`: Lightning's ModelParallelStrategy over all ranks, with checkpoints that any strategy reads."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch.optim import Optimizer

from lf_lightning.lightning_private import share_over_all_ranks
from lf_lightning.optim.state_files import load_rows
from lf_lightning.stages.row_files import SavesRows

NAME = "fsdp2"


class FSDP2Strategy(SavesRows, ModelParallelStrategy):
    """Weights, gradients and moments of optimizers are cut over all ranks; each computes its own micro-batches.

    A checkpoint is the same as without it, but for the optimizer, of which each rank writes its part.

    Args:
        timeout_seconds: How long a rank waits for the others, > 0.
        process_group_backend: `nccl`, `gloo` or another one of torch; empty means what the device asks for.
    """

    strategy_name = NAME

    def __init__(self, timeout_seconds: float = 1800.0, process_group_backend: str | None = None) -> None:
        timeout = timedelta(seconds=timeout_seconds)
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, save_distributed_checkpoint=False
        )

    def setup_environment(self) -> None:
        """Start the ranks, all of which share the model."""
        share_over_all_ranks(self)
        super().setup_environment()

    # ------------------------------------------------------------------ checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: a stage writes its weights itself, beside this state."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As the optimizer has it: this rank's rows of what is cut."""
        inner: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = inner.state_dict()
        return state

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Whether weights wait for the optimizer: once the model is built they go in, as everywhere else."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls `load_optimizer_state_dict`."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer this rank's rows, whoever wrote them."""
        load_rows(self.optimizers, checkpoint["optimizer_states"], self._state_folder)


StrategyRegistry.register(
    NAME, FSDP2Strategy, description="PyTorch's FSDP2: weights, gradients and optimizer cut over all ranks"
)
