"""LLM post-training on PyTorch Lightning: the public names, each imported when it is first used."""

from pkgutil import resolve_name
from typing import Any

__version__ = "0.1.0"

PUBLIC = {
    "APOLLO": "lf_lightning.optim.apollo",
    "Adafactor": "lf_lightning.optim.adafactor",
    "AdamMini": "lf_lightning.optim.adam_mini",
    "AdamW": "lf_lightning.optim.adamw",
    "AdamW8bit": "lf_lightning.optim.quantized",
    "BAdam": "lf_lightning.optim.badam",
    "BAdamRatio": "lf_lightning.optim.badam",
    "BackboneSpec": "lf_lightning.types",
    "DPO": "lf_lightning.stages.dpo",
    "DataModule": "lf_lightning.data.datamodule",
    "Freeze": "lf_lightning.models.freeze",
    "Full": "lf_lightning.models.adapters",
    "GaLore": "lf_lightning.optim.galore",
    "GRPO": "lf_lightning.stages.grpo",
    "GRPOConstants": "lf_lightning.losses.grpo",
    "GenerationEngine": "lf_lightning.models.generation",
    "GenerationSpec": "lf_lightning.models.generation",
    "InputError": "lf_lightning.types",
    "KTO": "lf_lightning.stages.kto",
    "LoRA": "lf_lightning.models.lora",
    "LoRAPlus": "lf_lightning.optim.adamw",
    "Muon": "lf_lightning.optim.muon",
    "OFT": "lf_lightning.models.oft",
    "PPO": "lf_lightning.stages.ppo",
    "PPOConstants": "lf_lightning.losses.ppo",
    "PT": "lf_lightning.stages.pt",
    "PagedAdamW": "lf_lightning.optim.quantized",
    "PreferenceConstants": "lf_lightning.losses.preference",
    "RM": "lf_lightning.stages.rm",
    "ReferenceSpec": "lf_lightning.models.reference",
    "Reward": "lf_lightning.models.rewards",
    "RewardAdapter": "lf_lightning.models.reward_adapter",
    "RewardBatch": "lf_lightning.models.rewards",
    "RewardFunction": "lf_lightning.models.reward_function",
    "RewardModel": "lf_lightning.models.reward_model",
    "RewardService": "lf_lightning.models.reward_service",
    "RunCheckpoint": "lf_lightning.callbacks.checkpoint",
    "SFT": "lf_lightning.stages.sft",
    "SamplingSpec": "lf_lightning.models.generation",
    "ScheduleSpec": "lf_lightning.optim.schedules",
    "TransformersEngine": "lf_lightning.models.generation",
    "ValueHeadSpec": "lf_lightning.models.value_head",
}
"""Public name -> the module that defines it, loaded on first use: the names bring torch, the package must not."""

__all__ = ["PUBLIC", "__version__", *PUBLIC]


def __getattr__(name: str) -> Any:
    """The public class of this name, imported now.

    Raises:
        AttributeError: The package has no such name.
    """
    if name not in PUBLIC:
        raise AttributeError(f"module 'lf_lightning' has no attribute {name!r}")
    return resolve_name(f"{PUBLIC[name]}:{name}")


def __dir__() -> list[str]:
    """Every public name, loaded or not."""
    return sorted({*globals(), *PUBLIC})
