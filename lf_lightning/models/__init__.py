"""All that touches transformers and peft: loading, tuning, attention, backbone, heads, reference, rewards, export."""

from lf_lightning.models.adapters import Adapter, Full, Tuning
from lf_lightning.models.backbone import Backbone
from lf_lightning.models.dropout import without_dropout
from lf_lightning.models.freeze import Freeze
from lf_lightning.models.generation import GenerationEngine, GenerationSpec, SamplingSpec, TransformersEngine
from lf_lightning.models.loading import load_backbone
from lf_lightning.models.lora import LoRA
from lf_lightning.models.oft import OFT
from lf_lightning.models.reference import Reference, ReferenceSpec, load_reference
from lf_lightning.models.reward_adapter import RewardAdapter
from lf_lightning.models.reward_function import RewardFunction
from lf_lightning.models.reward_model import RewardModel
from lf_lightning.models.reward_service import RewardService
from lf_lightning.models.rewards import Reward
from lf_lightning.models.value_head import ValueHead, ValueHeadSpec, add_value_head, score_kernel

__all__ = [
    "OFT",
    "Adapter",
    "Backbone",
    "Freeze",
    "Full",
    "GenerationEngine",
    "GenerationSpec",
    "LoRA",
    "Reference",
    "ReferenceSpec",
    "Reward",
    "RewardAdapter",
    "RewardFunction",
    "RewardModel",
    "RewardService",
    "SamplingSpec",
    "TransformersEngine",
    "Tuning",
    "ValueHead",
    "ValueHeadSpec",
    "add_value_head",
    "load_backbone",
    "load_reference",
    "score_kernel",
    "without_dropout",
]
