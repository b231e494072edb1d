"""The nouns of the house: what one room hands to another. This floor imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position where nothing is predicted."""

Role = Literal["system", "user", "assistant", "tool"]


class InputError(ValueError):
    """Something that the user gave is wrong, in one line: what, where, got, do this. The gate then exits with 2."""


class TrainingStopped(RuntimeError):
    """Training cannot go on although the input was accepted. One line, as InputError; the gate exits with 1."""


class Message(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()  # each {"name": str, "arguments": dict}; assistant turns only


class Conversation(NamedTuple):
    """One row of a dataset, whatever its format was: its turns, with an assistant's last where there is an answer."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()


class Segment(NamedTuple):
    """A piece of rendered text that is tokenized on its own."""

    text: str
    learn: bool


class Span(NamedTuple):
    """Tokens `start` to `end` (exclusive) of document `document` of a token store."""

    document: int
    start: int
    end: int


class Unit(NamedTuple):
    """What counts as one towards the global batch size: a sequence, a pack, a pair, or a feedback row."""

    spans: tuple[Span, ...]
    partner: int | None = None  # feedback: the document whose response is this unit's KL partner, if any

    @property
    def num_tokens(self) -> int:
        """Tokens of all spans together."""
        return sum(span.end - span.start for span in self.spans)


class Document(NamedTuple):
    """A stretch of tokens that attend to each other, and to nothing else of their row.

    The tokens of each branch follow the trunk and see it, but not one another: two responses to one prompt.
    """

    trunk: int  # tokens; 0 where nothing is shared
    branches: tuple[int, ...] = ()  # tokens of each branch, in order

    @property
    def num_tokens(self) -> int:
        """Tokens of trunk and branches together."""
        return self.trunk + sum(self.branches)


class TokenBatch(NamedTuple):
    """Tokens of one micro-batch. B rows, T tokens a row; `padding_free` batches have one row that holds all units.

    S *sequences* are told apart where a stage needs a number for each: a response with its prompt. A sequence without
    any counted token is allowed; its sums are zero.
    """

    input_ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64: the token to predict at each position (already shifted), IGNORE where none counts
    positions: Tensor | None  # (B, T) int64, restarting at 0 with each document; None where every row is one document
    documents: tuple[Document, ...] | None  # documents of the one row, in order; None in the padded layout
    num_units: int  # units in this micro-batch; 0 for a filler
    num_tokens: int  # tokens that are not padding; 0 for a filler
    sequences: Tensor | None = None  # (B, T) int64: the sequence whose token is predicted, S where nothing counts
    num_sequences: int = 0  # S


class PreferenceBatch(NamedTuple):
    """P pairs of one micro-batch. Sequence 2 i is the chosen response of pair i, sequence 2 i + 1 the rejected one."""

    tokens: TokenBatch
    rows: Tensor  # (P,) int64: document of each pair in its store, by which reference log-probs are kept
    margins: Tensor  # (P,) float64: how much better the chosen response is; 0 where the data does not say
    reference: Tensor | None = None  # (P, 2, 2) reference log-probs: chosen, rejected x whole, front; no gradient

    @property
    def num_units(self) -> int:
        """Pairs in this micro-batch; 0 for a filler."""
        return self.tokens.num_units

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding; a shared prompt counts once."""
        return self.tokens.num_tokens


class FeedbackBatch(NamedTuple):
    """U feedback rows of one micro-batch, each with a partner: another row's response to this row's prompt."""

    responses: TokenBatch  # sequence i is the response of unit i
    mismatched: TokenBatch  # sequence i is the partner's response, to the prompt of unit i; empty where there is none
    both: TokenBatch  # sequence 2 i is the response of unit i, 2 i + 1 the partner's: prompts shared where allowed
    rows: Tensor  # (U,) int64: document of each unit in its store
    is_desirable: Tensor  # (U,) bool
    has_partner: Tensor  # (U,) bool
    reference: Tensor | None = None  # (U, 2) sums of reference log-probs: response, partner's; no gradient
    kl_log_ratios: Tensor | None = None  # (U,) log policy - log reference of the partner's response; no gradient

    @property
    def num_units(self) -> int:
        """Feedback rows in this micro-batch; 0 for a filler."""
        return self.responses.num_units

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding, the partners' responses not counted."""
        return self.responses.num_tokens


class RolloutBatch(NamedTuple):
    """Responses of a rollout with their prompts, as one micro-batch of U units."""

    tokens: TokenBatch  # sequence i is the response of unit i
    rows: Tensor  # (U,) int64: place of each response in its rollout
    places: Tensor  # (B, T) int64: place of the token to predict in the rollout's responses laid end to end; -1: none

    @property
    def num_units(self) -> int:
        """Responses in this micro-batch; 0 for a filler."""
        return self.tokens.num_units

    @property
    def num_tokens(self) -> int:
        """Tokens of prompts and responses that are not padding."""
        return self.tokens.num_tokens


MicroBatch = TokenBatch | PreferenceBatch | FeedbackBatch | RolloutBatch


class UnitId(NamedTuple):
    """A row of the data, as a person looks it up."""

    dataset: str
    row: int  # 1-based


class StepBatch(NamedTuple):
    """One optimizer step on one rank: its micro-batches, at least one. In validation it holds exactly one."""

    micro_batches: tuple[Any, ...]  # of one kind, as the task wants
    rows: Callable[[], tuple[UnitId, ...]] = tuple  # the rows of its units, looked up when they are asked for


class LossSums(NamedTuple):
    """What a stage computes from one micro-batch: sums, never means."""

    terms: dict[str, Tensor]  # loss term -> scalar sum, with gradient
    metrics: dict[str, Tensor]  # metric -> scalar sum, without gradient; divided by the count of the same name


class Answer(NamedTuple):
    """A generated answer beside the prompt and the answer that the data gives."""

    row: int  # position in its set
    prompt: str
    predict: str
    label: str


class PairScore(NamedTuple):
    """What a reward model gives the two responses of a pair."""

    row: int  # position in its set
    chosen: float
    rejected: float


class PromptBatch(NamedTuple):
    """Prompts to answer, padded on the left. B prompts, T tokens."""

    input_ids: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) int64, 1 where the token is not padding
    rows: tuple[int, ...]  # position of each prompt in its set; -1 for a filler
    prompts: tuple[str, ...]  # the text of each prompt, as rendered
    references: tuple[str, ...]  # the answer that the data gives, "" where it gives none
    limits: tuple[int, ...] = ()  # most new tokens of each answer; empty where only the generation spec limits them


class Response(NamedTuple):
    """A generated answer."""

    row: int  # its place in the rollout or set; -1 for a filler
    token_ids: tuple[int, ...]  # at least one; a stop token is one of them
    is_stopped: bool  # whether a stop token ended it, and not a limit
    scores: tuple[float, ...] = ()  # what each reward gives it, in their order; before weights


class OutputLayer(NamedTuple):
    """How hidden states become logits: cap(scale * (hidden @ weight.T + bias)), cap(x) = softcap tanh(x / softcap)."""

    weight: Tensor  # (V, H)
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def at_temperature(self, temperature: float) -> OutputLayer:
        """The layer whose logits are these, divided by a temperature > 0."""
        softcap = None if self.softcap is None else self.softcap / temperature
        return self._replace(scale=self.scale / temperature, softcap=softcap)


class Kernel(Protocol):
    """What a stage hands to the backbone: called inside its forward, where the output layer's weights are whole."""

    def __call__(self, hidden: Tensor, output_layer: OutputLayer, targets: Tensor) -> Any:
        """Compute what the stage needs from hidden states (B, T, H) and targets (B, T)."""


Quantization = Literal["nf4", "fp4", "int8"]


@dataclass(frozen=True)
class BackboneSpec:
    """The language model and its tokenizer.

    Args:
        path: Folder or hub name of a causal language model that transformers can load. Leave it empty to build a
            model with random weights from `architecture`.
        dtype: Type of the frozen weights; `auto` is the type in the folder. What trains is float32 at least, unless
            the optimizer keeps bfloat16.
        quantization: Hold the frozen linear layers in few bits (bitsandbytes): `nf4` or `fp4` (Dettmers et al. 2023,
            arXiv:2305.14314), or `int8` (Dettmers et al. 2022, arXiv:2208.07339). Only an adapter trains beside them.
        double_quantization: Quantize the scales of 4-bit weights too: 0.4 bits less a weight.
        attention: Attention kernel: `auto` takes transformers' choice (sdpa where the model has it).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        architecture: Configuration of a model built from scratch, for example `{model_type: llama, hidden_size: 128,
            num_hidden_layers: 2, ...}`. The vocabulary size is the tokenizer's unless given.
        tokenizer: Folder or hub name of the tokenizer, or `bytes` for one token per byte of UTF-8. Empty: `path`.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run model code that comes with the folder. Off unless you trust its author.
        merge_adapters: Folders of adapters that are merged into the model, in this order, before anything else.
        new_tokens: Words to add to the tokenizer and to the model, which trains embedding and output layer for them: a
            list, or a mapping from each to a text that describes it and whose words it then starts as.
        new_special_tokens: The same for control tokens, which decoding can leave out.
        new_token_noise: Standard deviation of the noise on the rows of new tokens, >= 0; empty means 1 / sqrt(hidden
            size), and none for tokens with a description.
    """

    path: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    quantization: Quantization | None = None
    double_quantization: bool = True
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    architecture: dict[str, Any] | None = None
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    merge_adapters: Sequence[str] = ()
    new_tokens: Sequence[str] | dict[str, str] = ()
    new_special_tokens: Sequence[str] | dict[str, str] = ()
    new_token_noise: float | None = None

    @property
    def added_tokens(self) -> list[str]:
        """New tokens, then new special tokens."""
        return [*self.new_tokens, *self.new_special_tokens]

    def __post_init__(self) -> None:
        """Refuse a spec that names no model or two.

        Raises:
            InputError: Neither or both of `path` and `architecture` are given, or a scratch model has no tokenizer.
        """
        if (self.path is None) == (self.architecture is None):
            got = "both" if self.path else "neither"
            raise InputError(
                f"model.init_args.backbone: give either path or architecture, got {got}. Set path to a model folder."
            )
        if self.architecture is not None and self.tokenizer is None:
            raise InputError(
                "model.init_args.backbone.tokenizer: a model built from architecture needs a tokenizer, got none. "
                "Set it to a folder, or to bytes."
            )
        if not self.double_quantization and self.quantization not in ("nf4", "fp4"):
            raise InputError(
                "model.init_args.backbone.double_quantization: belongs to quantization: nf4 or fp4, got "
                f"{self.quantization}. Remove it."
            )
        names = self.added_tokens
        if len({*names}) < len(names) or not all(names):
            raise InputError(f"model.init_args.backbone.new_tokens: must be words, each once, got {names}. Mend it.")
        if self.new_token_noise is not None and (self.new_token_noise < 0 or not names):
            raise InputError(
                "model.init_args.backbone.new_token_noise: must be 0 or more and beside new_tokens, got "
                f"{self.new_token_noise} with {len(names)} new tokens. Correct it, or remove it."
            )


class Isolation(NamedTuple):
    """In which layouts a model keeps the documents of one row apart, and whether also two branches of one document."""

    padded: bool
    padding_free: bool
    branches: bool = False  # padding_free only


Task = Literal["pt", "sft", "rm", "dpo", "kto", "ppo", "grpo"]
Layout = Literal["padded", "padding_free"]


def torch_dtype(name: str) -> torch.dtype:
    """The torch type of a name such as `bfloat16`."""
    dtype = getattr(torch, name)  # the names are a Literal of BackboneSpec: each is an attribute of torch
    assert isinstance(dtype, torch.dtype)
    return dtype
