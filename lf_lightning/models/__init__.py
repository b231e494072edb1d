"""All that touches transformers and peft: loading, tuning, attention, the backbone, its head, reference and export."""

from lf_lightning.models.adapters import Freeze, Full, LoRA, Tuning
from lf_lightning.models.backbone import Backbone
from lf_lightning.models.dropout import without_dropout
from lf_lightning.models.loading import load_backbone
from lf_lightning.models.reference import Reference, ReferenceSpec, load_reference
from lf_lightning.models.value_head import ValueHead, ValueHeadSpec, add_value_head, score_kernel

__all__ = [
    "Backbone",
    "Freeze",
    "Full",
    "LoRA",
    "Reference",
    "ReferenceSpec",
    "Tuning",
    "ValueHead",
    "ValueHeadSpec",
    "add_value_head",
    "load_backbone",
    "load_reference",
    "score_kernel",
    "without_dropout",
]
