"""Rows without padding: every document gives what it gives alone, to 1e-6 per token, with each family's extras."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lf_lightning.losses.log_probs import token_log_probs
from lf_lightning.models import Backbone, Full, load_backbone
from lf_lightning.models.attention import eager_document_attention, sdpa_document_attention
from lf_lightning.models.generation import GenerationSpec, TransformersEngine
from lf_lightning.types import BackboneSpec, Document, PromptBatch, TokenBatch

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8},
    "gpt_oss": {"head_dim": 8, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61, "initializer_range": 0.2}
CASES = [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("mistral", "eager"), ("gemma2", "eager")]
CASES += [("gpt_oss", "eager")]
LENGTHS = (5, 9, 12)


def build(family: str, attention: str, **changes: Any) -> Backbone:
    architecture = {"model_type": family, **(GPT2 if family == "gpt2" else {**BASE, **FAMILIES[family]}), **changes}
    spec = BackboneSpec(architecture=architecture, tokenizer="bytes", attention=attention, dtype="float64")
    backbone = load_backbone(spec, Full(), vocab_size=0, seed=0).eval()
    if family == "gpt_oss":
        backbone.causal_lm.set_experts_implementation("eager")  # grouped_mm knows no float64
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.named_parameters():
        if name.endswith("sinks"):  # transformers leaves them as they lie in memory
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return backbone


def documents(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 61, (length,), generator=generator) for length in LENGTHS]


def one_row(parts: list[Tensor], *, padding_free: bool) -> TokenBatch:
    """All parts in one row, positions restarted; without `padding_free` an isolated pack of the padded layout."""
    targets = [torch.cat([part[1:], torch.tensor([-100])]) for part in parts]
    return TokenBatch(
        input_ids=torch.cat(parts)[None],
        targets=torch.cat(targets)[None],
        positions=torch.cat([torch.arange(len(part)) for part in parts])[None],
        documents=tuple(Document(len(part)) for part in parts) if padding_free else None,
        num_units=len(parts),
        num_tokens=sum(len(part) for part in parts),
    )


def padded_rows(parts: list[Tensor]) -> TokenBatch:
    input_ids = torch.zeros(len(parts), max(LENGTHS), dtype=torch.int64)
    targets = torch.full_like(input_ids, -100)
    for index, part in enumerate(parts):
        input_ids[index, : len(part)] = part
        targets[index, : len(part) - 1] = part[1:]
    return TokenBatch(input_ids, targets, None, None, len(parts), sum(LENGTHS))


def counted(backbone: Backbone, batch: TokenBatch) -> Tensor:
    """Log-probs of all tokens that count, in order."""
    with torch.no_grad():
        log_probs = backbone(batch, kernel=token_log_probs)
    return log_probs[batch.targets != -100]


def alone(backbone: Backbone, parts: list[Tensor]) -> Tensor:
    """The same by transformers' own model, one document after the other."""
    found = []
    with torch.no_grad(), backbone.padded_attention():
        for part in parts:
            logits = backbone.causal_lm(input_ids=part[None], use_cache=False).logits[0, :-1]
            found.append(logits.log_softmax(-1).gather(1, part[1:, None]).squeeze(1))
    return torch.cat(found)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_padding_free_and_padded_rows_give_what_each_document_gives_alone(family: str, attention: str) -> None:
    backbone = build(family, attention)
    want = alone(backbone, documents())
    padded = counted(backbone, padded_rows(documents()))
    backbone.set_layout("padding_free")
    free = counted(backbone, one_row(documents(), padding_free=True))
    assert len(want) == 23
    torch.testing.assert_close(padded, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(free, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "attention"), [case for case in CASES if case[0] != "gpt_oss"])
def test_an_isolated_pack_of_the_padded_layout_equals_its_documents_alone(family: str, attention: str) -> None:
    # gpt_oss builds its masks without positions: see test_probe.py
    backbone = build(family, attention)
    got = counted(backbone, one_row(documents(), padding_free=False))
    torch.testing.assert_close(got, alone(backbone, documents()), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_a_changed_token_changes_no_logit_of_another_document(family: str, attention: str) -> None:
    backbone = build(family, attention)
    backbone.set_layout("padding_free")
    parts = documents()
    before = counted(backbone, one_row(parts, padding_free=True))
    parts[1] = parts[1].clone()
    parts[1][3] = (parts[1][3] + 1) % 61
    after = counted(backbone, one_row(parts, padding_free=True))
    moved = ((before - after).abs() > 1e-9).nonzero().flatten().tolist()
    assert moved, "the change must show inside its own document"
    assert set(moved) <= set(range(4, 12)), "counted tokens 4 to 11 are those of the second document"


@pytest.mark.parametrize(
    ("family", "attention", "without"),
    [
        ("mistral", "sdpa", {"sliding_window": 100}),
        ("mistral", "eager", {"sliding_window": 100}),
        ("gemma2", "eager", {"sliding_window": 100}),
        ("gemma2", "eager", {"attn_logit_softcapping": 1000.0}),
        ("gpt_oss", "eager", {"sliding_window": 100}),
    ],
)
def test_windows_and_softcaps_are_honoured(family: str, attention: str, without: dict[str, Any]) -> None:
    found = []
    for backbone in (build(family, attention), build(family, attention, **without)):
        backbone.set_layout("padding_free")
        found.append(counted(backbone, one_row(documents(), padding_free=True)))
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_sinks_are_honoured() -> None:
    backbone = build("gpt_oss", "eager")
    backbone.set_layout("padding_free")
    before = counted(backbone, one_row(documents(), padding_free=True))
    for layer in backbone.causal_lm.model.layers:
        layer.self_attn.sinks.data.add_(2.0)
    after = counted(backbone, one_row(documents(), padding_free=True))
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, alone(backbone, documents()), rtol=0, atol=1e-6)


def written_out(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """Attention token by token: softmax of q.k / sqrt(D) over the tokens that may be seen; (T, heads, D)."""
    start_of = [sum(lengths[:index]) for index, length in enumerate(lengths) for _ in range(length)]
    rows = []
    for token, start in enumerate(start_of):
        first = start if window is None else max(start, token - window + 1)
        heads = []
        for head in range(query.shape[1]):
            kv_head = head // (query.shape[1] // key.shape[1])
            seen = slice(first, token + 1)
            scores = key[0, kv_head, seen] @ query[0, head, token] / query.shape[-1] ** 0.5
            heads.append(scores.softmax(0) @ value[0, kv_head, seen])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", [sdpa_document_attention, eager_document_attention])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_both_kernels_equal_attention_written_out_token_by_token(kernel: Any, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 12, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 12, 8, generator=generator, dtype=torch.float64)
    module = torch.nn.Identity()
    got, weights = kernel(
        module, query, key, value, None, documents=(Document(5), Document(1), Document(6)), sliding_window=window
    )
    assert weights is None
    torch.testing.assert_close(got[0], written_out(query, key, value, (5, 1, 6), window), rtol=0, atol=1e-12)


def test_the_scaling_of_a_family_replaces_one_over_the_root_of_the_width() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 6, 8, generator=generator, dtype=torch.float64)
    module = torch.nn.Identity()
    for kernel in (sdpa_document_attention, eager_document_attention):
        got, _ = kernel(module, query, key, value, None, documents=(Document(6),), scaling=0.5)
        want = written_out(query * 0.5 * 8**0.5, key, value, (6,), None)
        torch.testing.assert_close(got[0], want, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- branches

TRUNK, BRANCHES, LAST = 6, (5, 7, 3), 4


def tree_row() -> tuple[Tensor, tuple[Document, ...], Tensor]:
    """A document of a trunk and three branches, and a plain one; their documents and positions."""
    length = TRUNK + sum(BRANCHES) + LAST
    ids = torch.randint(1, 61, (length,), generator=torch.Generator().manual_seed(2))
    ranges = [(0, TRUNK), *((TRUNK, TRUNK + branch) for branch in BRANCHES), (0, LAST)]
    positions = torch.cat([torch.arange(*limits) for limits in ranges])
    return ids, (Document(TRUNK, BRANCHES), Document(LAST)), positions


def sequences_of_the_tree() -> list[list[int]]:
    """Places in the row of each sequence: trunk and branch, one after the other; and the last document."""
    starts = [TRUNK, TRUNK + 5, TRUNK + 12]
    places = [[*range(TRUNK), *range(start, start + n)] for start, n in zip(starts, BRANCHES, strict=True)]
    return [*places, list(range(21, 25))]


def hidden_states(hidden: Tensor, output_layer: Any, targets: Tensor) -> Tensor:
    return hidden


def of_the_tree(backbone: Backbone, *, documents: Any = None, positions: Tensor | None = None) -> Tensor:
    """Hidden states of the row, by place."""
    ids, right_documents, right_positions = tree_row()
    backbone.set_layout("padding_free")
    found: Tensor = backbone(
        TokenBatch(
            ids[None],
            torch.full_like(ids, -100)[None],
            (right_positions if positions is None else positions)[None],
            right_documents if documents is None else documents,
            1,
            len(ids),
        ),
        kernel=hidden_states,
    )[0]
    return found


def apart(backbone: Backbone) -> list[Tensor]:
    """Hidden states of each sequence alone, by transformers' own attention."""
    ids, *_ = tree_row()
    with backbone.padded_attention():
        decoder = backbone.causal_lm.base_model
        return [
            decoder(input_ids=ids[places][None], use_cache=False).last_hidden_state[0]
            for places in sequences_of_the_tree()
        ]


def weighted(parts: list[Tensor]) -> Tensor:
    """A sum in which each sequence's every number has a weight of its own."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack(
        [(part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum() for part in parts]
    ).sum()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("family", "attention"), [*CASES, ("gpt2", "sdpa"), ("gpt2", "eager")])
def test_branches_on_one_trunk_equal_separate_sequences_gradients_too(family: str, attention: str, dtype: str) -> None:
    tolerance = {"float64": 1e-10 if family == "gpt2" else 1e-6, "float32": 1e-5}[dtype]  # the others norm in float32
    found = []
    for shared in (True, False):
        backbone = build(family, attention).to(getattr(torch, dtype))
        row = of_the_tree(backbone) if shared else None
        parts = [row[places] for places in sequences_of_the_tree()] if row is not None else apart(backbone)
        weighted([part.double() for part in parts]).backward()
        grads = [parameter.grad for parameter in backbone.parameters() if parameter.grad is not None]
        found.append(([part.detach() for part in parts], grads))
    assert len(found[0][1]) == len(found[1][1]) > 10
    for got, want in zip([*found[0][0], *found[0][1]], [*found[1][0], *found[1][1]], strict=True):
        scale = want.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_leaky_branches_and_positions_that_do_not_restart_are_seen(attention: str) -> None:
    backbone = build("llama", attention)
    with torch.no_grad():
        right = of_the_tree(backbone)
        leaky = of_the_tree(backbone, documents=(Document(TRUNK + sum(BRANCHES)), Document(LAST)))
        running = torch.cat([torch.arange(TRUNK + sum(BRANCHES)), torch.arange(LAST)])
        shifted = of_the_tree(backbone, positions=running)
    first = slice(0, TRUNK + BRANCHES[0])
    for wrong in (leaky, shifted):
        torch.testing.assert_close(wrong[first], right[first], rtol=0, atol=1e-12)
        assert (wrong[first.stop : 21] - right[first.stop : 21]).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", [sdpa_document_attention, eager_document_attention])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
def test_a_branch_sees_the_trunk_and_itself_through_the_window(kernel: Any, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 25, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 25, 8, generator=generator, dtype=torch.float64)
    documents = (Document(TRUNK, BRANCHES), Document(LAST))
    got, _ = kernel(torch.nn.Identity(), query, key, value, None, documents=documents, sliding_window=window)
    for places in sequences_of_the_tree():
        want = written_out(query[:, :, places], key[:, :, places], value[:, :, places], (len(places),), window)
        torch.testing.assert_close(got[0, places], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [sdpa_document_attention, eager_document_attention])
def test_branches_without_a_trunk_and_a_single_branch_are_documents(kernel: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 9, 8, generator=generator, dtype=torch.float64)
    module = torch.nn.Identity()
    want, _ = kernel(module, query, key, value, None, documents=(Document(4), Document(5)))
    for documents in ((Document(0, (4, 5)),), (Document(1, (3,)), Document(0, (5,))), (Document(4, ()), Document(5))):
        got, _ = kernel(module, query, key, value, None, documents=documents)
        assert torch.equal(got, want)


def test_branches_are_not_run_by_an_attention_that_would_let_them_see_each_other() -> None:
    ids, documents, positions = tree_row()
    backbone = build("llama", "sdpa")
    batch = TokenBatch(ids[None], ids[None], positions[None], documents, 1, len(ids))
    with pytest.raises(ValueError, match="only the attention of the padding-free layout keeps branches"):
        backbone(batch, kernel=hidden_states)


def test_branches_under_gradient_checkpointing_give_the_same_gradients() -> None:
    found = []
    for checkpointed in (False, True):
        backbone = build("llama", "sdpa").train()
        if checkpointed:
            backbone.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        weighted([of_the_tree(backbone)]).backward()
        found.append([parameter.grad for parameter in backbone.parameters() if parameter.grad is not None])
    assert len(found[0]) == 20
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------------- layouts


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_mask_raises_instead_of_being_ignored(attention: str) -> None:
    backbone = build("llama", attention)
    backbone.set_layout("padding_free")
    input_ids = torch.ones(2, 4, dtype=torch.int64)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for arguments in ({"attention_mask": mask}, {}):
        with pytest.raises(ValueError, match="document attention was called without document lengths or with a mask"):
            backbone.causal_lm(input_ids=input_ids, use_cache=False, **arguments)


def test_document_lengths_must_fill_the_row() -> None:
    query = torch.zeros(1, 2, 6, 4)
    with pytest.raises(AssertionError, match=r"documents .*fill the"):
        sdpa_document_attention(torch.nn.Identity(), query, query, query, None, documents=(Document(3), Document(2)))


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_generation_equals_that_of_a_model_whose_layout_was_never_switched(family: str, attention: str) -> None:
    untouched, switched = build(family, attention), build(family, attention)
    switched.set_layout("padding_free")
    batch = PromptBatch(
        input_ids=torch.tensor([[0, 0, 0, 7, 8], [9, 10, 11, 12, 13]]),
        mask=torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]),
        rows=(0, 1),
        prompts=("a", "b"),
        references=("", ""),
    )
    spec = GenerationSpec(max_new_tokens=9)
    want, got = (
        TransformersEngine().generate(each, batch, spec, stop_token_ids=[60]) for each in (untouched, switched)
    )
    assert len(want) == 2
    assert all(len(answer) > 5 for answer in want)
    assert got == want
    assert switched.is_padding_free
    assert not untouched.is_padding_free


def test_left_padding_does_not_change_an_answer() -> None:
    backbone = build("llama", "sdpa")
    backbone.set_layout("padding_free")
    spec = GenerationSpec(max_new_tokens=9)
    answers = []
    for padding in (0, 3):
        ids, mask = torch.tensor([[0] * padding + [7, 8]]), torch.tensor([[0] * padding + [1, 1]])
        batch = PromptBatch(ids, mask, (0,), ("a",), ("",))
        answers.append(TransformersEngine().generate(backbone, batch, spec, stop_token_ids=[60]))
    assert answers[0] == answers[1]


def test_the_layout_comes_back_after_an_error() -> None:
    backbone = build("llama", "sdpa")
    backbone.set_layout("padding_free")

    def generate() -> None:
        with backbone.padded_attention():
            assert not backbone.is_padding_free
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        generate()
    assert backbone.is_padding_free
