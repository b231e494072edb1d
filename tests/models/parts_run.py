"""Reads models in parts, trains, saves and loads them on two ranks, which test_parts.py forks.

Writes <folder>/<case>.<rank>.pt for every case, and <folder>/<case>/ as a checkpoint.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lf_lightning import BackboneSpec
from lf_lightning.models import Backbone, Freeze, Full, LoRA, ValueHeadSpec, load_backbone
from lf_lightning.models.export import load_weights, save_named_weights, save_weights, unnamed_weights
from lf_lightning.models.probe import check_output_layer
from lf_lightning.models.sharding import check_sharded, clip_gradients, cut_again, shard
from lf_lightning.models.value_head import add_value_head
from lf_lightning.models.value_head_files import save_value_head
from lf_lightning.optim.state_files import load_rows, save_rows
from lf_lightning.types import InputError
from tests.models.sharding_run import full, loss_of

WORDS = 41  # odd: the ranks' parts of the embedding differ
CASES: dict[str, dict[str, Any]] = {
    "full": {"base": "untied"},
    "tied": {"base": "tied"},
    "half": {"base": "half"},
    "freeze": {"base": "half", "tuning": Freeze(num_layers=1)},
    "lora": {"base": "tied", "tuning": LoRA(rank=2)},
    "half-lora": {"base": "half", "tuning": LoRA(rank=3)},
    "head": {"base": "untied", "head": True},
    "head-lora": {"base": "untied", "head": True, "tuning": LoRA(rank=2)},
    "experts": {"base": "experts"},
}


def is_mapped(address: int) -> bool:
    """Whether memory at an address is a window on a file of weights."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(".safetensors"):
            start, _, end = line.split()[0].partition("-")
            if int(start, 16) <= address < int(end, 16):
                return True
    return False


class Storages(TorchDispatchMode):
    """Bytes of the memory of what operations gave while this was on: more than what lived at once.

    A window on a file that is mapped is no memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.found: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and not isinstance(each, DTensor) and each.device.type == "cpu":
                storage = each.untyped_storage()
                if storage.data_ptr() not in self.found:
                    self.kept.append(each)  # so that no address is used twice
                    self.found[storage.data_ptr()] = 0 if is_mapped(storage.data_ptr()) else storage.nbytes()
        return found

    def sizes(self) -> list[int]:
        """Bytes of each, largest first."""
        return sorted(self.found.values(), reverse=True)


def load(case: dict[str, Any], folder: Path, mesh: DeviceMesh | None) -> Backbone:
    """The model of a case: whole, or cut over the ranks of a mesh."""
    tuning = case.get("tuning", Full())
    spec = BackboneSpec(path=str(folder / case["base"]), tokenizer="bytes")
    parts = mesh["data_parallel"] if mesh is not None else None
    backbone = load_backbone(spec, tuning, vocab_size=WORDS, seed=3, mesh=parts)
    if case.get("head"):
        add_value_head(backbone, ValueHeadSpec(init="new"), tuning=tuning, path=None, seed=4, keeps_output_layer=True)
    if mesh is not None:
        shard(backbone, mesh)
    return backbone


def values(backbone: Backbone) -> dict[str, Tensor]:
    """Every parameter, whole."""
    cut_again(backbone)
    return {name: full(parameter) for name, parameter in backbone.named_parameters()}


def step(backbone: Backbone, optimizer: torch.optim.Optimizer, ranks: list[int]) -> None:
    """A step of AdamW on the mean of both ranks' losses."""
    for rank in ranks:
        (loss_of(backbone, rank) / len(ranks)).backward()
    clip_gradients([each for each in backbone.parameters() if each.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adamw(backbone: Backbone) -> torch.optim.AdamW:
    """An optimizer of what trains, made as strategies do: when nothing is left whole of a forward."""
    cut_again(backbone)
    return torch.optim.AdamW([each for each in backbone.parameters() if each.requires_grad], lr=1e-2, eps=1e-3)


def save(backbone: Backbone, optimizer: torch.optim.Optimizer, folder: Path, rank: int) -> None:
    """A checkpoint of weights, head and optimizer."""
    if rank == 0:
        (folder / "trainer_state").mkdir(parents=True)
    distributed.barrier()
    save_weights(backbone, folder, base="base", writes=rank == 0)
    names = [unnamed_weights(backbone, folder) if rank == 0 else []]
    distributed.broadcast_object_list(names)
    save_named_weights(backbone, names[0], folder, writes=rank == 0)
    if backbone.value_head is not None:
        save_value_head(backbone, folder, writes=rank == 0)
    light = save_rows([optimizer.state_dict()], folder / "trainer_state")
    if rank == 0:
        torch.save(light, folder / "trainer_state" / "state.ckpt")
    distributed.barrier()


def late(backbone: Backbone) -> str:
    """What the guard says of a parameter that came after the model was cut."""
    check_sharded(backbone)
    backbone.late = nn.Linear(2, 2)
    try:
        check_sharded(backbone)
    except InputError as error:
        return str(error)
    finally:
        del backbone.late
    return ""


def seen(name: str, case: dict[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    """What this rank sees of a case."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    one = load(case, folder, None)
    found: dict[str, Any] = {"bytes": sum(each.nbytes for each in one.parameters()), "plain": values(one)}
    with Storages() as storages:
        cut = load(case, folder, mesh)
    found["storages"], found["cut"] = storages.sizes(), values(cut)
    found["local"] = sum(each.to_local().nbytes for each in cut.parameters() if isinstance(each, DTensor))
    found["whole"] = [key for key, each in cut.named_parameters() if not isinstance(each, DTensor)]
    found["buffers"] = [dict(each.named_buffers()) for each in (one, cut)]
    check_output_layer(cut)
    found["late"] = late(cut)
    optimizers = adamw(one), adamw(cut)
    for _ in range(2):
        step(one, optimizers[0], [0, 1])
        step(cut, optimizers[1], [rank])
    found["plain after"], found["cut after"] = values(one), values(cut)
    found["plain state"] = copy.deepcopy(optimizers[0].state_dict())
    save(cut, optimizers[1], folder / name, rank)
    again = load(case, folder, mesh)
    load_weights(again, folder / name)
    found["loaded"] = values(again)
    optimizer = adamw(again)
    load_rows([optimizer], torch.load(folder / name / "trainer_state" / "state.ckpt"), folder / name / "trainer_state")
    step(cut, optimizers[1], [rank])
    step(again, optimizer, [rank])
    found["third"], found["third again"] = values(cut), values(again)
    whole = load(case, folder, mesh)
    load_weights(whole, folder / name)
    optimizer = adamw(whole)
    load_rows([optimizer], [copy.deepcopy(found["plain state"])], folder)
    step(whole, optimizer, [rank])
    found["third from whole"] = values(whole)
    return found


def run(folder: Path, rank: int) -> None:
    """Run every case on this rank."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for name, case in CASES.items():
        torch.save(seen(name, case, folder, rank), folder / f"{name}.{rank}.pt")
        print(name, "done", flush=True)
    distributed.destroy_process_group()
