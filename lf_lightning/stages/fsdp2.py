"""The strategy `fsdp2`: Lightning's ModelParallelStrategy over all ranks, with checkpoints that any strategy reads."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from lf_lightning.lightning_private import share_over_all_ranks
from lf_lightning.optim.state_files import load_rows
from lf_lightning.stages.row_files import SavesRows
from lf_lightning.types import InputError

NAME = "fsdp2"
WHERE = "trainer.strategy.init_args"


class FSDP2Strategy(SavesRows, ModelParallelStrategy):
    """Weights, gradients and moments of optimizers are cut over all ranks; each computes its own micro-batches.

    A checkpoint is the same as without it, but for the optimizer, of which each rank writes its part.

    Args:
        replicate: Copies of the model, > 0: so many groups of ranks hold one each, cut over the ranks of the group.
            It divides the number of ranks. With as many as nodes, weights are gathered within nodes only.
        tensor_parallel: Ranks that compute each layer together, > 0: they get the same micro-batches. It divides the
            number of ranks.
        timeout_seconds: How long a rank waits for the others, > 0.
        process_group_backend: `nccl`, `gloo` or another one of torch; empty means what the device asks for.
    """

    strategy_name = NAME

    def __init__(
        self,
        replicate: int = 1,
        tensor_parallel: int = 1,
        timeout_seconds: float = 1800.0,
        process_group_backend: str | None = None,
    ) -> None:
        for name, value in (("replicate", replicate), ("tensor_parallel", tensor_parallel)):
            if value < 1:
                raise InputError(f"{WHERE}.{name}: must be at least 1, got {value}. Leave it out for 1.")
        if replicate > 1 and tensor_parallel > 1:
            raise InputError(
                f"{WHERE}: replicate and tensor_parallel exclude each other, got {replicate} and {tensor_parallel}. "
                "Remove one of them."
            )
        if not timeout_seconds > 0:
            raise InputError(f"{WHERE}.timeout_seconds: must be positive, got {timeout_seconds}. Leave it out.")
        self.replicate, self.tensor_parallel = replicate, tensor_parallel
        self._replicas: DeviceMesh | None = None
        timeout = timedelta(seconds=timeout_seconds)
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, save_distributed_checkpoint=False
        )

    def check_ranks(self) -> None:
        """Refuse numbers of groups that the ranks cannot form; before any of them starts.

        Raises:
            InputError: As said.
        """
        ranks = self.num_nodes * self.num_processes
        for name, value in (("replicate", self.replicate), ("tensor_parallel", self.tensor_parallel)):
            if ranks % value:
                raise InputError(
                    f"{WHERE}.{name}: must divide the number of ranks, {ranks}, got {value}. "
                    "Change it, or trainer.devices and trainer.num_nodes."
                )

    def setup_environment(self) -> None:
        """Start the ranks, and let them find their groups."""
        self.check_ranks()
        share_over_all_ranks(self, self.tensor_parallel)
        super().setup_environment()
        if self.replicate > 1:
            shape = (self.replicate, self.world_size // self.replicate)
            names = ("replicas", "shards")
            self._replicas = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    @property
    def sharing_mesh(self) -> DeviceMesh:
        """The ranks that share the model, as `lf_lightning.shards` names the dimensions."""
        return self.device_mesh if self._replicas is None else self._replicas

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Tensor:
        """Reduce over the ranks that compute different micro-batches, unless a group is given."""
        if group is None and self.tensor_parallel > 1:
            group = self.device_mesh["data_parallel"].get_group()
        return super().reduce(tensor, group, reduce_op)

    # ------------------------------------------------------------------ checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As the optimizer has it: this rank's rows of what is cut."""
        inner: Any = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = inner.state_dict()
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each optimizer this rank's rows, whoever wrote them."""
        load_rows(self.optimizers, checkpoint["optimizer_states"], self._state_folder)


StrategyRegistry.register(
    NAME, FSDP2Strategy, description="PyTorch's FSDP2: weights, gradients and optimizer cut over all ranks"
)
