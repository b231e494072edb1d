"""A reward that an adapter gives on the policy's own base: policy, reference, reward and critic share one model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lf_lightning.console import say
from lf_lightning.models.backbone import Backbone
from lf_lightning.models.reward_model import base_of, head_scores, loaded_head, right_padded
from lf_lightning.models.rewards import WHERE, Reward, RewardBatch, RewardSetting, check_weight
from lf_lightning.models.tensor_files import refuse_pickles
from lf_lightning.models.value_head import ValueHead
from lf_lightning.models.value_head_files import SCORE, find_value_head
from lf_lightning.types import InputError

_ADAPTER = f"{WHERE}: RewardAdapter"


@dataclass(eq=False)
class RewardAdapter(Reward):
    """A LoRA reward model whose adapter lies beside the policy's on one base, and acts only while it scores.

    Args:
        path: Folder of the adapter with value_head.safetensors or value_head.bin: what our rm stage and LlamaFactory's
            write with LoRA. Its base must be the policy's.
        batch_size: Responses that are scored together, > 0.
        weight: Its part in the sum of all rewards.
    """

    path: str
    batch_size: int = 8
    weight: float = 1.0
    needs_adapter = True
    _policy: Backbone | None = field(init=False, repr=False, default=None)
    _head: ValueHead | None = field(init=False, repr=False, default=None)
    _adapter: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_weight(self)
        if self.batch_size < 1:
            raise InputError(f"{_ADAPTER}.batch_size: must be at least 1, got {self.batch_size}. Raise it.")

    def prepare(self, setting: RewardSetting) -> None:
        """Load the adapter into the policy's model, frozen and idle, and its head beside it.

        Raises:
            InputError: The folder holds no adapter with a head, or the adapter does not fit the policy.
        """
        folder, policy = Path(self.path).expanduser(), setting.policy
        if not policy.is_adapter:
            raise InputError(f"{_ADAPTER}: needs a policy tuned with LoRA, got another tuning. Use RewardModel.")
        if setting.policy.start or setting.policy.is_merged:
            raise InputError(
                f"{_ADAPTER}: runs on the original weights, got a policy whose own have changed before training. "
                "Use RewardModel."
            )
        refuse_pickles(folder, f"{_ADAPTER}.path")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"{_ADAPTER}.path: must be a folder with {name}, got {self.path}. Give an adapter's.")
        head = find_value_head(str(folder), revision=None)
        if head is None:
            raise InputError(
                f"{_ADAPTER}.path: must hold value_head.safetensors, got {self.path} without. Give an rm run's."
            )
        named, own = base_of(folder), str(policy.causal_lm.config.name_or_path)
        if os.path.realpath(named) != os.path.realpath(own):
            say(f"{self.name}: {self.path} was trained on {named}, the policy's base is {own}: they must be one model")
        self._head = loaded_head(policy, head).to(setting.device)
        model: Any = policy.model
        self._adapter = f"reward_{len(model.peft_config)}"
        _add_adapter(model, folder, self._adapter, self.path)
        self._policy = policy

    def score(self, prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch) -> Tensor:
        """The head's value at the last token of each response; (B,)."""
        assert self._policy is not None, "prepare comes first"
        assert self._head is not None
        rows = [[*prompt, *ids] for prompt, ids in zip(batch.prompt_ids, batch.response_ids, strict=True)]
        device, found = self._head.summary.weight.device, []
        with _switched(self._policy, self._adapter):
            for start in range(0, len(rows), self.batch_size):
                ids, mask = right_padded(rows[start : start + self.batch_size], device)
                found.append(head_scores(self._policy, self._head, ids, mask).double())
        return torch.cat(found)


@contextmanager
def _switched(policy: Backbone, adapter: str) -> Iterator[None]:
    """Another adapter for a while, in evaluation mode; peft freezes and thaws on the way, which is put back."""
    model: Any = policy.model
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    was_training, active = policy.training, model.active_adapter
    policy.eval()
    try:
        model.set_adapter(adapter)
        with torch.no_grad(), policy.padded_attention():
            yield
    finally:
        model.set_adapter(active)
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
        policy.train(was_training)


def _add_adapter(model: Any, folder: Path, adapter: str, path: str) -> None:
    """Put a saved adapter beside the others, frozen."""
    from peft import PeftConfig, set_peft_model_state_dict

    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors.pop(SCORE[1], None)
        model.add_adapter(adapter, config)
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=adapter)
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise InputError(
            f"{_ADAPTER}.path: {path} must fit the policy's base, got {reason} Use its own base."
        ) from error
    missing = [key for key in result.missing_keys if adapter in key.split(".")]
    if missing or result.unexpected_keys:
        culprit = (missing or result.unexpected_keys)[0]
        raise InputError(
            f"{_ADAPTER}.path: {path} must fit the policy's base, got {culprit} left over. Use its own base."
        )
    for name, parameter in model.named_parameters():
        if adapter in name.split("."):
            parameter.requires_grad_(False)
    for parameter, trains in trained:
        parameter.requires_grad_(trains)
