"""All that touches transformers and peft: loading, tuning, attention, the backbone and its export."""

from lf_lightning.models.adapters import Freeze, Full, LoRA, Tuning
from lf_lightning.models.backbone import Backbone
from lf_lightning.models.loading import load_backbone

__all__ = ["Backbone", "Freeze", "Full", "LoRA", "Tuning", "load_backbone"]
