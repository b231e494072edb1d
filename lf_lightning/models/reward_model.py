"""A reward that a model gives: one with a value head, or any of transformers' sequence classifiers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lf_lightning.console import say
from lf_lightning.models.adapters import Full, Tuning
from lf_lightning.models.backbone import Backbone, embedding_rows
from lf_lightning.models.loading import load_backbone
from lf_lightning.models.lora import LoRA
from lf_lightning.models.quantization import loader_options
from lf_lightning.models.rewards import WHERE, Reward, RewardBatch, RewardSetting, check_weight
from lf_lightning.models.tensor_files import refuse_pickles
from lf_lightning.models.value_head import ValueHead, last_counted, load_value_head
from lf_lightning.models.value_head_files import find_value_head
from lf_lightning.types import (
    IGNORE,
    BackboneSpec,
    InputError,
    OutputLayer,
    Quantization,
    TokenBatch,
    TrainingStopped,
    torch_dtype,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_MODEL = f"{WHERE}: RewardModel"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class Scorer(NamedTuple):
    """A loaded reward model."""

    score: Callable[[Tensor, Tensor], Tensor]  # from ids (B, T), padded on the right, and their mask to (B,)
    num_words: int  # that it can read
    num_positions: int | None  # most tokens that it can read; None where its configuration names no limit


@dataclass(eq=False)
class RewardModel(Reward):
    """A frozen reward model beside the policy.

    It reads prompt and response as the policy's template renders them. Where its own tokenizer has other words than the
    policy's, the text is decoded and encoded again, with the special tokens that its tokenizer puts around any text.

    Args:
        path: Folder or hub name: a whole model with value_head.safetensors or value_head.bin (ours, LlamaFactory's);
            the folder of an adapter with one; or any AutoModelForSequenceClassification with one label.
        base: Folder or hub name of the model under an adapter; empty means what adapter_config.json says.
        dtype: Type in which it computes, whatever the trainer's precision is; `auto` is the type in the folder. The
            head is float32 at least.
        quantization: Hold its linear layers in few bits, as the backbone's option of that name.
        batch_size: Responses that are scored together, > 0.
        weight: Its part in the sum of all rewards.
    """

    path: str
    base: str | None = None
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    batch_size: int = 8
    weight: float = 1.0
    _scorer: Scorer | None = field(init=False, repr=False, default=None)
    _tokenizer: PreTrainedTokenizerBase | None = field(init=False, repr=False, default=None)
    _device: torch.device = field(init=False, repr=False, default=torch.device("cpu"))
    _has_said: bool = field(init=False, repr=False, default=False)

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            InputError: As said.
        """
        check_weight(self)
        if self.batch_size < 1:
            raise InputError(f"{_MODEL}.batch_size: must be at least 1, got {self.batch_size}. Raise it.")

    def prepare(self, setting: RewardSetting) -> None:
        """Load the model and its tokenizer.

        Raises:
            InputError: The folder holds no reward model, or its embedding is too small for the tokenizer.
        """
        own = _own_tokenizer(self.path)
        words = len(setting.tokenizer if own is None else own)
        self._scorer, self._device = self._loaded(words, setting.device), setting.device
        if self._scorer.num_words < words:
            raise InputError(
                f"{_MODEL}.path: {self.path} must read the {words} words of the {'policy' if own is None else 'own'} "
                f"tokenizer, got {self._scorer.num_words}. Put the reward model's own tokenizer into its folder."
            )
        if own is not None and not _reads_same(own, setting.tokenizer):
            self._tokenizer = own
            say(f"{self.name}: {self.path} has another tokenizer; texts are decoded and encoded again")

    def score(self, prompts: Sequence[str], responses: Sequence[str], batch: RewardBatch) -> Tensor:
        """What the model gives; (B,)."""
        assert self._scorer is not None, "prepare comes first"
        rows = [[*prompt, *ids] for prompt, ids in zip(batch.prompt_ids, batch.response_ids, strict=True)]
        if self._tokenizer is not None:
            rows = _encoded_again(rows, batch.tokenizer, self._tokenizer)
        rows = self._that_fit(rows, self._scorer.num_positions)
        found = []
        with torch.autocast(self._device.type, enabled=False):  # that of the trainer's precision: `dtype` alone decides
            for start in range(0, len(rows), self.batch_size):
                ids, mask = right_padded(rows[start : start + self.batch_size], self._device)
                found.append(self._scorer.score(ids, mask).double())
        return torch.cat(found)

    def _that_fit(self, rows: list[list[int]], most: int | None) -> list[list[int]]:
        long = [row for row in rows if most is not None and len(row) > most]
        if long and not self._has_said:
            self._has_said = True
            say(f"{self.name}: {self.path} reads {most} tokens; longer texts lose their beginning")
        return [row[-most:] if most is not None else row for row in rows]

    def _loaded(self, words: int, device: torch.device) -> Scorer:
        folder = Path(self.path).expanduser()
        if (folder / "adapter_config.json").is_file():
            tuning: Tuning = LoRA(adapter=str(folder))
            return self._with_head(self.base or base_of(folder), tuning, words, device)
        if self.base is not None:
            raise InputError(f"{_MODEL}.base: belongs to an adapter, got {self.path}, which is none. Remove base.")
        if _is_classifier(self.path):
            return _classifier(self.path, self.dtype, self.quantization, device)
        return self._with_head(self.path, Full(), words, device)

    def _with_head(self, base: str, tuning: Tuning, words: int, device: torch.device) -> Scorer:
        """A causal language model with a value head."""
        folder = find_value_head(self.path, revision=None)
        if folder is None:
            raise InputError(
                f"{_MODEL}.path: must hold value_head.safetensors or value_head.bin, or a model for sequence "
                f"classification, got {self.path}, which holds neither. Give a reward model's folder."
            )
        spec = BackboneSpec(
            path=str(Path(base).expanduser()) if Path(base).expanduser().exists() else base,
            dtype=self.dtype,
            quantization=self.quantization,
        )
        try:
            backbone = load_backbone(spec, tuning, vocab_size=0, seed=0, trains=False, device=_on_gpu(device)).eval()
        except InputError as error:
            message = str(error).replace("model.init_args.tuning.init_args.adapter", f"{_MODEL}.path")
            raise InputError(message.replace("model.init_args.backbone", _MODEL)) from error
        head = loaded_head(backbone, folder)
        backbone.to(device), head.to(device)
        return Scorer(
            lambda ids, mask: head_scores(backbone, head, ids, mask),
            backbone.vocabulary,
            _positions(backbone.causal_lm.config),
        )


def loaded_head(backbone: Backbone, folder: Path) -> ValueHead:
    """The frozen value head of a folder, outside of the backbone's modules."""
    like = backbone.causal_lm.get_input_embeddings().weight
    assert isinstance(like, Tensor)
    head = ValueHead(_hidden_size(backbone), bias=True, dropout=0.0, like=like)
    load_value_head(head, folder)
    return head.requires_grad_(False).eval()


def _hidden_size(backbone: Backbone) -> int:
    return int(backbone.output_layer.weight.shape[1])


def head_scores(backbone: Backbone, head: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The head's value at the last token that is not padding; (B,) of ids and mask (B, T), padded on the right."""
    ends = last_counted(mask)

    def kernel(hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> Tensor:
        values: Tensor = head(hidden[torch.arange(len(ends), device=ends.device), ends])
        return values

    batch = TokenBatch(
        input_ids=ids,
        targets=torch.full_like(ids, IGNORE),
        positions=None,
        documents=None,
        num_units=len(ids),
        num_tokens=int(mask.sum()),
    )
    scores: Tensor = backbone(batch, kernel=kernel)
    return scores


def right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token rows as ids and mask, (B, T) int64 each; word 0 pads, since nothing looks at it.

    Raises:
        TrainingStopped: A row is empty.
    """
    longest = max(len(row) for row in rows)
    if not min(len(row) for row in rows):
        raise TrainingStopped(f"{WHERE}: must have tokens to score, got an empty text. Use a template that adds some.")
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device) < lengths[:, None]).long()


# ---------------------------------------------------------------------- sequence classification


def _is_classifier(path: str) -> bool:
    from transformers import AutoConfig

    refuse_pickles(Path(path).expanduser(), f"{_MODEL}.path")
    try:
        config = AutoConfig.from_pretrained(Path(path).expanduser() if Path(path).expanduser().exists() else path)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{_MODEL}.path: must be a model's folder or hub name, got {path}: {reason}. Correct it."
        ) from error
    return any("ForSequenceClassification" in name for name in config.architectures or ())


def _on_gpu(device: torch.device) -> torch.device | None:
    """Where weights are quantized; None for the CPU."""
    return device if device.type == "cuda" else None


def _classifier(path: str, dtype: Dtype, quantization: Quantization | None, device: torch.device) -> Scorer:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        place = Path(path).expanduser() if Path(path).expanduser().exists() else path
        config = AutoConfig.from_pretrained(place)
        bits = loader_options(quantization, double=True, dtype=dtype, config=config, device=_on_gpu(device))
        answer: Any = AutoModelForSequenceClassification.from_pretrained(
            place,
            dtype="auto" if dtype == "auto" else torch_dtype(dtype),
            output_loading_info=True,
            use_safetensors=True,
            **bits,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{_MODEL}.path: {path} cannot be loaded, got {reason}. Use a folder that is whole."
        ) from error
    model, report = answer
    if report["missing_keys"]:
        missing = sorted(map(str, report["missing_keys"]))[0]
        raise InputError(f"{_MODEL}.path: {path} lacks the weight {missing}. Use a folder that is whole.")
    if model.config.num_labels != 1:
        raise InputError(
            f"{_MODEL}.path: must have one label, the score, got {model.config.num_labels} in {path}. Use a "
            "reward model."
        )
    model.requires_grad_(False).eval().to(device)
    head: Any = dict(model.named_children()).get("score")  # decoders: transformers would look for the end by pad tokens

    def score(ids: Tensor, mask: Tensor) -> Tensor:
        if not isinstance(head, nn.Linear):
            logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
            return logits.squeeze(-1)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=ids.device), last_counted(mask)]
        exact = torch.promote_types(last.dtype, torch.float32)  # close scores must not become equal
        values: Tensor = head.weight.to(exact) @ last.to(exact).T + (0 if head.bias is None else head.bias.to(exact))
        return values.squeeze(0)

    return Scorer(score, embedding_rows(model), _positions(model.config))


def _positions(config: PretrainedConfig) -> int | None:
    """Most tokens that a model reads, by whichever name its family has for it; None where it names none."""
    most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)  # not every family has it
    return most


# ---------------------------------------------------------------------- tokenizers


def base_of(folder: Path) -> str:
    """The base model that the folder of an adapter names.

    Raises:
        InputError: It names none.
    """
    try:
        found = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    except (json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{folder}/adapter_config.json: must hold JSON, got a broken file. Give another.") from error
    if not found:
        raise InputError(f"{_MODEL}.base: must be given where adapter_config.json names no base, got none. Give it.")
    return str(found)


def _own_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the folder of a reward model; None where there is none."""
    from transformers import AutoTokenizer

    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.startswith((".", "/", "~")) or path.count("/") != 1):
        raise InputError(f"{_MODEL}.path: must be a folder or a hub name, got {path}, which is neither. Correct it.")
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder if folder.is_dir() else path)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"{_MODEL}.path: no tokenizer can be read from {path}: {reason}. Give another folder."
        ) from error
    return tokenizer


def _reads_same(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether all words of the other tokenizer have the same ids here."""
    words = own.get_vocab()
    return all(words.get(word) == number for word, number in other.get_vocab().items())


def _encoded_again(
    rows: list[list[int]], policy: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The rows in the words of another tokenizer; a text that begins with its own BOS gets no second one."""
    texts = policy.batch_decode(rows, skip_special_tokens=False)
    found: list[list[int]] = own(texts, add_special_tokens=True, verbose=False)["input_ids"]
    bos = own.bos_token_id
    return [row[1:] if bos is not None and row[:2] == [bos, bos] else row for row in found]
