"""The strategies `deepspeed_1`, `deepspeed_2` and `deepspeed_3`: DeepSpeed's ZeRO, on GPUs and on CPUs."""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from lf_lightning.models.reference import resolved_kind
from lf_lightning.optim import AdamW
from lf_lightning.optim.state_files import whole_values
from lf_lightning.shards import cut, own_part, rows_of
from lf_lightning.stages.row_files import SavesRows
from lf_lightning.stages.zero_precision import ZeroPrecision
from lf_lightning.types import InputError

NAMES = ("deepspeed_1", "deepspeed_2", "deepspeed_3")
CUT = ("the optimizer", "optimizer and gradients", "optimizer, gradients and weights")
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter, entry by entry."""


def check_installed() -> None:
    """Refuse DeepSpeed where it is missing.

    Raises:
        InputError: As said.
    """
    if find_spec("deepspeed") is None:
        raise InputError(
            "trainer.strategy: deepspeed_1, deepspeed_2 and deepspeed_3 need the package deepspeed, got none. "
            "Install it with DS_BUILD_OPS=0 pip install --no-build-isolation 'lf-lightning[deepspeed]', or use fsdp2."
        )


DTYPE = "model.init_args.backbone.dtype: DeepSpeed trains weights in float32, got"


def check_stage(stage: Any, strategy: Any, *, verb: str = "fit") -> None:
    """Refuse what a stage asks for and DeepSpeed cannot do, before a model is loaded.

    Args:
        stage: The stage.
        strategy: Of its trainer; all others are let through.
        verb: What the trainer is about to do.

    Raises:
        InputError: Names the option.
    """
    if not isinstance(strategy, ZeroStrategy):
        return
    if not isinstance(stage.optimizer_spec, AdamW):
        raise InputError(
            "model.init_args.optimizer: must be AdamW under DeepSpeed, which cuts weights in the middle of their rows, "
            f"got {type(stage.optimizer_spec).__name__}. Use AdamW, or fsdp2."
        )
    if stage.optimizer_spec.is_layerwise:
        raise InputError(
            "model.init_args.optimizer.init_args.layerwise: must be false under DeepSpeed, whose engine takes the "
            "gradients itself, got true. Use one device without it."
        )
    if (bits := stage.backbone_spec.quantization) is not None:
        raise InputError(f"trainer.strategy: DeepSpeed cannot hold weights in few bits, got {bits}. Use ddp.")
    if stage.backbone_spec.dtype == "float64":
        raise InputError(f"{DTYPE} float64. Use float32, or another strategy.")
    if verb == "predict" and stage.task != "rm":
        check_generates(strategy)
    held = vars(stage).get("held")  # of the stages that have a reference
    reference = None if held is None else held.spec
    if reference is None or strategy.zero_stage < 3:
        return
    where = "model.init_args.reference"
    if reference.precompute:
        raise InputError(f"{where}.precompute: must be false under deepspeed_3, got true. Use fsdp2 or deepspeed_2.")
    if resolved_kind(reference, stage.tuning) == "snapshot":
        raise InputError(
            f"{where}.kind: deepspeed_3 cannot put an adapter back to its start, got snapshot. "
            "Use kind: copy, fsdp2 or deepspeed_2."
        )


def check_generates(strategy: Any) -> None:
    """Refuse to generate where the strategy leaves no rank the whole weights.

    Raises:
        InputError: As said.
    """
    if isinstance(strategy, ZeroStrategy) and strategy.zero_stage == 3:
        raise InputError(
            "trainer.strategy: must be another one for generating answers, which takes whole weights, got deepspeed_3. "
            "Use auto, fsdp2 or deepspeed_2."
        )


class ZeroStrategy(SavesRows, DeepSpeedStrategy):
    """DeepSpeed's ZeRO: moments, gradients and weights are cut over all ranks, one more of them with each stage.

    Checkpoints are those of the other strategies, for the optimizer those of `fsdp2`: nothing in them is DeepSpeed's.

    Args:
        stage: What each rank keeps its part of. 1: moments of the optimizer. 2: gradients too. 3: weights too.
        timeout_seconds: How long a rank waits for the others, > 0.
        process_group_backend: `nccl`, `gloo` or another one of torch; empty means what the device asks for.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        timeout_seconds: float = 1800.0,
        process_group_backend: str | None = None,
    ) -> None:
        check_installed()
        if stage not in (1, 2, 3):
            raise InputError(f"trainer.strategy.init_args.stage: must be 1, 2 or 3, got {stage}. Correct it.")
        self.zero_stage = stage
        config: dict[str, Any] = {
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own printing only
            "bf16": {"enabled": False},  # it would cast what trains to bfloat16
            "gradient_clipping": 0.0,
        }
        timeout = timedelta(seconds=timeout_seconds)
        super().__init__(config=config, timeout=timeout, process_group_backend=process_group_backend)
        self._groups: list[list[nn.Parameter]] = []
        self._drops = False

    # ------------------------------------------------------------------ ranks and engine

    def setup_environment(self) -> None:
        """Start the ranks, on CPUs too."""
        assert isinstance(self.config, dict)
        precision = self.precision_plugin.precision
        self.precision_plugin = ZeroPrecision(precision, self.root_device.type)
        if precision == "bf16-mixed":  # the engine's forward ends any autocast that is not its own
            autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            self.config["torch_autocast"] = autocast
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """Join the ranks by torch's process group, which DeepSpeed takes over.

        Raises:
            InputError: DeepSpeed has chosen another kind of device.
        """
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        super(DeepSpeedStrategy, self).setup_distributed()
        kind = self.root_device.type
        if get_accelerator().device_name() != kind:
            raise InputError(
                f"trainer.accelerator: DeepSpeed computes on {get_accelerator().device_name()} here, got {kind}. "
                f"Set the environment variable DS_ACCELERATOR={kind}."
            )
        os.environ["LOCAL_RANK"] = str(self.local_rank)  # DeepSpeed takes it from nowhere else
        # what gloo does as well, and what every rank would compile now, where there is a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        backend = torch.distributed.get_backend()
        deepspeed.init_distributed(backend, dist_init_required=False, auto_mpi_discovery=False, verbose=False)

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Models are built whole: the engine cuts them once tuning, value head and weights of a checkpoint are in."""
        yield

    def init_deepspeed(self) -> None:
        """Wrap the stage in an engine, where it trains or where its weights are cut."""
        stage: Any = self.lightning_module
        if stage.trainer.state.fn == "fit":
            self._init_training(stage)
        elif self.zero_stage == 3:
            self.model = self._engine(model_parameters=[])[0]
        else:
            self.model_to_device()

    def _init_training(self, stage: Any) -> None:
        trained = [(name, each.dtype) for name, each in stage.named_parameters() if each.requires_grad]
        for name, dtype in trained:
            if dtype != torch.float32:
                raise InputError(f"{DTYPE} {name} in {dtype}. Use another strategy.")
        self.config["gradient_clipping"] = stage.max_grad_norm or 0.0  # type: ignore[index]
        found = stage.configure_optimizers()
        optimizer = found["optimizer"]
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        engine, zero = self._engine(optimizer=optimizer, model_parameters=list(chain(*self._groups)))
        self.model, self.optimizers = engine, [zero]
        self.lr_scheduler_configs = [LRSchedulerConfig(**found["lr_scheduler"])]
        optimizer.register_step_pre_hook(self._before_inner_step)
        self._begin_states(zero, optimizer)

    def _engine(self, **options: Any) -> tuple[Any, Any]:
        import deepspeed

        engine, optimizer, _, _ = deepspeed.initialize(
            args=Namespace(device_rank=self.local_rank),
            model=self.model,
            config=self.config,
            dist_init_required=False,
            **options,
        )
        return engine, optimizer

    def _begin_states(self, zero: Any, optimizer: Optimizer) -> None:
        """Give the optimizer its moments now: DeepSpeed would after the first step, too late for a resume."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for flat in self._flat_weights:
            moments = {name: torch.zeros_like(flat) for name in MOMENTS}
            fused = bool(optimizer.defaults["fused"])
            optimizer.state[flat] = {"step": torch.zeros((), device=flat.device if fused else None), **moments}
        if self.zero_stage < 3:
            for group, flat in zip(zero.bit16_groups, self._flat_weights, strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, optimizer.state)

    @property
    def _flat_weights(self) -> list[Tensor]:
        """The weights that this rank's optimizer steps, each a long vector of many parameters' parts."""
        zero: Any = self.optimizers[0]
        flat = zero.fp32_partitioned_groups_flat if self.zero_stage == 3 else zero.single_partition_of_fp32_groups
        return list(flat)

    # ------------------------------------------------------------------ the step

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Tell the engine where an optimizer step ends, and that a backward is about to come.

        Its forward, which would tell the latter, runs once a step; ZeRO-3 would then overwrite gradients.
        """
        engine: Any = self.model
        engine.set_gradient_accumulation_boundary(is_last)
        engine.optimizer.clear_backward_seen_flag()
        return nullcontext()

    def drop_step(self) -> None:
        """Let the next optimizer step change nothing, whatever its gradient is."""
        self._drops = True

    def finish_step(self) -> float:
        """The global norm of the step just made, before clipping; 0 where it was dropped, inf where not finite."""
        dropped, self._drops = self._drops, False
        engine: Any = self.model
        norm = 0.0 if dropped else float(engine.get_global_grad_norm())
        return norm if math.isfinite(norm) else math.inf

    def _before_inner_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._drops:
            for parameter in chain(*(group["params"] for group in optimizer.param_groups)):
                parameter.grad = None

    # ------------------------------------------------------------------ checkpoints

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's rows of the moments of each parameter, numbered as torch numbers them."""
        from deepspeed.utils import safe_get_full_optimizer_state

        inner = self._inner
        step = inner.state[self._flat_weights[0]]["step"].cpu()
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        state: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(chain(*self._groups)):
            state[number] = {"step": step.clone()}
            for name in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, name)
                rows = rows_of(whole.shape[0], self.global_rank, self.world_size)
                state[number][name] = cut(whole[rows].clone(), mesh, whole)
        groups, start = [], 0
        for group, parameters in zip(inner.param_groups, self._groups, strict=True):
            numbers = list(range(start, start + len(parameters)))
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
            start += len(parameters)
        return {"state": state, "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Give the optimizer its moments back, one parameter after the other, whoever wrote them.

        Raises:
            InputError: Parameters have made different numbers of steps.
        """
        (state,) = checkpoint["optimizer_states"]
        steps = {float(each["step"]) for each in state["state"].values()} or {0.0}
        if len(steps) > 1:
            raise InputError(
                f"--ckpt_path: all parameters must have made as many steps, got {min(steps):g} to {max(steps):g}. "
                "Continue with another strategy than deepspeed."
            )
        for number, parameter in enumerate(chain(*self._groups)):
            found = whole_values(state, number, Path(self._state_folder))
            for name in MOMENTS if found else ():
                self._put(parameter, name, found[name].to(self.root_device, torch.float32))
        (step,) = steps
        for flat in self._flat_weights:
            self._inner.state[flat]["step"].fill_(step)

    def _put(self, parameter: nn.Parameter, name: str, moment: Tensor) -> None:
        """Put this rank's part of a whole moment into the optimizer."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, moment, name)
            return
        size = own_part(parameter).numel()  # equal on all ranks; the last may reach beyond the end
        flat = nn.functional.pad(moment.flatten(), (0, size * self.world_size - moment.numel()))
        safe_set_local_optimizer_state(parameter, flat[self.global_rank * size :][:size], name)

    @property
    def _inner(self) -> Optimizer:
        """Torch's optimizer, which DeepSpeed's holds."""
        zero: Any = self.optimizers[0]
        inner: Optimizer = zero.optimizer
        return inner


for number, (name, what) in enumerate(zip(NAMES, CUT, strict=True), 1):
    description = f"DeepSpeed's ZeRO: {what} cut over all ranks"
    StrategyRegistry.register(name, ZeroStrategy, description=description, stage=number)
