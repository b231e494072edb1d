"""BAdam: Adam on one block of parameters at a time, or on a share of the entries of each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lf_lightning.optim.exact import ExactOptimizer, adam_direction, drawn
from lf_lightning.optim.parameters import Trained, decay_groups, trained_parameters
from lf_lightning.optim.spec import WHERE, OptimizerSpec, adam_rules, check_options
from lf_lightning.types import InputError

SMALL = 100
"""Tensors with fewer entries train whole."""


@dataclass(frozen=True)
class BAdam(OptimizerSpec):
    """Adam on one decoder block at a time (Luo et al. 2024, arXiv:2404.02827), for Full and Freeze, on one device.

    Embeddings, last norm and output layer stay as they are. With `backbone.dtype: bfloat16` and Full the weights stay
    so, and the block that trains has a float32 copy. Our own: badam 1.4 keeps neither the block nor its float32 copy in
    a checkpoint, and decays norms.

    Args:
        lr: Largest learning rate of the schedule, > 0.
        switch_interval: Steps that a block trains before the next one does, > 0; its moments then start anew.
        switch_mode: Order of the blocks: `ascending`, `descending`, `random` (each once, then again), or `fixed` for
            the same one all the time.
        start_block: Number of the first block, from 0; empty means the last one for `descending`, else the first.
        betas: Decay of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: As in AdamW, >= 0; never of biases and norms.
    """

    strategies: ClassVar[tuple[str, ...]] = ("auto",)
    tunings: ClassVar[tuple[str, ...]] = ("Full", "Freeze")

    lr: float = 5e-5
    switch_interval: int = 50
    switch_mode: Literal["ascending", "descending", "random", "fixed"] = "ascending"
    start_block: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        starts = self.start_block is None or self.start_block >= 0
        check_options(
            self,
            switch_interval=(self.switch_interval > 0, "positive"),
            start_block=(starts and (self.start_block is None or self.switch_mode != "random"), START),
            **adam_rules(self.lr, self.betas, self.eps, self.weight_decay),
        )

    @property
    def keeps_bfloat16(self) -> bool:
        """Always."""
        return True

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> Optimizer:
        """Groups of the parameters of all blocks, decayed and not.

        Raises:
            InputError: No parameter of a block trains, or there is no such block.
        """
        blocks: dict[int, set[nn.Parameter]] = {}
        for each in trained:
            if each.block is not None:
                blocks.setdefault(each.block, set()).add(each.parameter)
        if not blocks:
            raise InputError(f"{WHERE}.class_path: BAdam trains decoder blocks, got none that train. Use BAdamRatio.")
        if self.start_block is not None and self.start_block >= len(blocks):
            raise InputError(
                f"{WHERE}.init_args.start_block: must be 0 to {len(blocks) - 1} for this model, "
                f"got {self.start_block}. Choose a number in that range."
            )
        groups = decay_groups([each for each in trained if each.block is not None], self.weight_decay)
        everything = [each.parameter for each in trained]
        ordered = [blocks[index] for index in sorted(blocks)]
        return BlockOptimizer(groups, spec=self, blocks=ordered, everything=everything, seed=seed)


START = "null or 0 and more, and null with switch_mode: random"


@dataclass(frozen=True)
class BAdamRatio(OptimizerSpec):
    """Adam on a share of the entries of each parameter at a time (BAdam, arXiv:2404.02827), for Full and Freeze.

    Embeddings and output layer stay as they are. Moments are held of that share alone, and so is a float32 copy where
    weights stay in bfloat16; gradients are whole until the step. On one device.

    Args:
        lr: Largest learning rate of the schedule, > 0.
        update_ratio: Share of the entries of a tensor that train at a time, in (0, 1]; tensors of less than 100 entries
            train whole.
        mask_mode: `adjacent` entries, or entries that `scatter` over the tensor at random.
        switch_interval: Steps before the next share trains, > 0; moments then start anew.
        betas: Decay of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the root of the second moment, > 0.
        weight_decay: As in AdamW, >= 0, of the entries that train; never of biases and norms.
    """

    strategies: ClassVar[tuple[str, ...]] = ("auto",)
    tunings: ClassVar[tuple[str, ...]] = ("Full", "Freeze")

    lr: float = 5e-5
    update_ratio: float = 0.05
    mask_mode: Literal["adjacent", "scatter"] = "adjacent"
    switch_interval: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_options(
            self,
            update_ratio=(0 < self.update_ratio <= 1, "in (0, 1]"),
            switch_interval=(self.switch_interval > 0, "positive"),
            **adam_rules(self.lr, self.betas, self.eps, self.weight_decay),
        )

    @property
    def keeps_bfloat16(self) -> bool:
        """Always."""
        return True

    def build(self, trained: Sequence[Trained], *, seed: int = 0) -> Optimizer:
        """Groups of all parameters but embeddings and heads, decayed and not."""
        inside = [each for each in trained if each.role not in ("embedding", "head")]
        if not inside:
            raise InputError(f"{WHERE}.class_path: BAdamRatio trains no embeddings, got nothing else. Use AdamW.")
        groups = decay_groups(inside, self.weight_decay)
        return RatioOptimizer(groups, spec=self, everything=[each.parameter for each in trained], seed=seed)


class PartialOptimizer(ExactOptimizer):
    """Adam on a part of the weights, which changes every `switch_interval` steps; moments then start anew.

    Which part it is follows from the number of steps, which the state of the first parameter holds.

    Args:
        groups: Parameter groups of AdamW.
        everything: All parameters of the model that would train under another optimizer.
        interval: Steps between two switches.
        seed: Of what is drawn.
        defaults: Options of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        everything: Sequence[nn.Parameter],
        interval: int,
        seed: int,
        **defaults: Any,
    ) -> None:
        super().__init__(groups, defaults)
        self._everything, self._interval, self.seed = list(everything), interval, seed

    @property
    def num_steps(self) -> int:
        """Steps made so far."""
        return int(self.state[trained_parameters(self)[0]].get("num_steps", 0))

    @property
    def num_switches(self) -> int:
        """How often another part has begun to train."""
        return self.num_steps // self._interval

    @abstractmethod
    def active(self) -> set[nn.Parameter]:
        """The parameters of which something trains in the step to come."""

    @contextmanager
    def only_active(self) -> Iterator[None]:
        """Let gradients reach the active parameters alone for a while; the backward is then cheaper."""
        active = self.active()
        try:
            for parameter in self._everything:
                parameter.requires_grad_(parameter in active)
            yield
        finally:
            for parameter in self._everything:
                parameter.requires_grad_(True)

    def update(self) -> None:
        """Make a step, and let the next part train where it is due."""
        active, num_steps = self.active(), self.num_steps + 1
        parameters = trained_parameters(self)
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in active:
                    self._update_one(parameter, parameter.grad, group, numbers[parameter])
        if num_steps % self._interval == 0 and self.changes(num_steps // self._interval):
            self.state.clear()
        self.state[parameters[0]]["num_steps"] = num_steps

    def changes(self, switch: int) -> bool:
        """Whether this switch brings another part."""
        return True

    @abstractmethod
    def _update_one(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], number: int) -> None: ...

    def _moved(self, values: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What AdamW makes of values; of bfloat16 ones it keeps the float32 form in `master`."""
        direction = adam_direction(state, gradient.float(), betas=group["betas"], eps=group["eps"])
        if values.dtype != torch.float32:
            values = state.setdefault("master", values.float())
        moved: Tensor = values * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * direction
        if "master" in state:
            state["master"] = moved
        return moved


class BlockOptimizer(PartialOptimizer):
    """Adam on one block at a time.

    Args:
        groups: Parameter groups of AdamW.
        spec: The constants.
        blocks: The parameters of each block.
        everything: All parameters that would train under another optimizer.
        seed: Of a random order.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        spec: BAdam,
        blocks: list[set[nn.Parameter]],
        everything: Sequence[nn.Parameter],
        seed: int,
    ) -> None:
        adam: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}
        super().__init__(groups, everything=everything, interval=spec.switch_interval, seed=seed, **adam)
        self.spec, self._blocks = spec, blocks

    def active(self) -> set[nn.Parameter]:
        """The parameters of the block whose turn it is."""
        return self._blocks[self.block_after(self.num_switches)]

    def changes(self, switch: int) -> bool:
        """Not where the order is fixed, nor where there is one block."""
        return self.block_after(switch) != self.block_after(switch - 1)

    def block_after(self, switch: int) -> int:
        """Number of the block that trains after so many switches."""
        mode, num_blocks = self.spec.switch_mode, len(self._blocks)
        if mode == "random":
            turn, place = divmod(switch, num_blocks)
            return int(torch.randperm(num_blocks, generator=drawn(torch.device("cpu"), self.seed, turn))[place])
        last = num_blocks - 1 if mode == "descending" else 0
        start = last if self.spec.start_block is None else self.spec.start_block
        return (start + {"ascending": 1, "descending": -1, "fixed": 0}[mode] * switch) % num_blocks

    def _update_one(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], number: int) -> None:
        parameter.copy_(self._moved(parameter.detach(), gradient, self.state[parameter], group))


class RatioOptimizer(PartialOptimizer):
    """Adam on a share of the entries of each parameter at a time.

    Args:
        groups: Parameter groups of AdamW.
        spec: The constants.
        everything: All parameters that would train under another optimizer.
        seed: Of entries that scatter.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, spec: BAdamRatio, everything: Sequence[nn.Parameter], seed: int
    ) -> None:
        adam: dict[str, Any] = {"lr": spec.lr, "betas": spec.betas, "eps": spec.eps}
        super().__init__(groups, everything=everything, interval=spec.switch_interval, seed=seed, **adam)
        self.spec = spec
        self._entries: dict[nn.Parameter, tuple[int, Tensor]] = {}

    def active(self) -> set[nn.Parameter]:
        """All parameters of the groups."""
        return set(trained_parameters(self))

    def entries(self, parameter: nn.Parameter, number: int) -> Tensor:
        """Places in the flat parameter that train now; remembered until the next switch, never saved."""
        switch = self.num_switches
        if parameter not in self._entries or self._entries[parameter][0] != switch:
            size = parameter.numel()
            count = size if size < SMALL else max(int(size * self.spec.update_ratio), 1)
            places = (torch.arange(count) + switch * count) % size
            if self.spec.mask_mode == "scatter":
                places = torch.randperm(size, generator=drawn(torch.device("cpu"), self.seed + number))[places]
            self._entries[parameter] = switch, places.to(parameter.device)
        return self._entries[parameter][1]

    def _update_one(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], number: int) -> None:
        places, flat = self.entries(parameter, number), parameter.detach().view(-1)
        values = self._moved(flat[places], gradient.reshape(-1)[places], self.state[parameter], group)
        flat[places] = values.to(flat.dtype)
