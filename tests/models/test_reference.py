"""The reference stays what the policy was, to the last bit, and leaves the policy as it found it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lf_lightning import BackboneSpec, InputError
from lf_lightning.losses.log_probs import token_log_probs
from lf_lightning.models import (
    Backbone,
    Freeze,
    Full,
    LoRA,
    Reference,
    ReferenceSpec,
    Tuning,
    load_backbone,
    load_reference,
    without_dropout,
)
from lf_lightning.models.export import save_weights
from lf_lightning.models.reference import resolved_kind
from lf_lightning.types import TokenBatch

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 4, 8]])
BATCH = TokenBatch(IDS, torch.cat([IDS[:, 1:], torch.tensor([[-100]])], dim=1), None, None, 1, 8)


def perturb(backbone: Backbone) -> Backbone:
    """Stand in for training: move every trained weight."""
    generator = torch.Generator().manual_seed(5)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


def loaded(spec: BackboneSpec, tuning: Tuning) -> Backbone:
    return load_backbone(spec, tuning, vocab_size=0, seed=0)


def folder_spec(folder: Path, **options: Any) -> BackboneSpec:
    return BackboneSpec(path=str(folder), tokenizer="bytes", **options)


def reference_of(spec: ReferenceSpec, policy: Backbone, backbone: BackboneSpec, tuning: Tuning) -> Reference:
    return load_reference(spec, policy, backbone, tuning, vocab_size=0, seed=0)


def log_probs(backbone: Backbone) -> Tensor:
    with torch.no_grad():
        found: Tensor = backbone.eval()(BATCH, kernel=token_log_probs)
    backbone.train()
    return found


def state(backbone: Backbone) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    scratch = BackboneSpec(architecture={**LLAMA, "attention_dropout": 0.3}, tokenizer="bytes")
    save_weights(loaded(scratch, Full()), folder, base=None, writes=True)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained = perturb(loaded(folder_spec(base), LoRA(rank=2, target=["q_proj", "lm_head"])))
    save_weights(trained, folder, base=str(base), writes=True)
    return folder


def tuning_of(kind: str, adapter: Path) -> Tuning:
    dropped = LoRA(rank=2, dropout=0.4)
    tunings = {"copy": Full(), "freeze": Freeze(num_layers=1), "adapters_off": dropped, "copy of LoRA": dropped}
    return tunings.get(kind, LoRA(adapter=str(adapter)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["copy", "freeze", "adapters_off", "copy of LoRA", "snapshot"])
def test_the_reference_is_the_untrained_policy_to_the_last_bit_and_stays_it(
    base: Path, adapter: Path, kind: str, dtype: str
) -> None:
    tuning, backbone = tuning_of(kind, adapter), folder_spec(base, dtype=dtype)
    policy = loaded(backbone, tuning)
    want = log_probs(policy)
    spec = ReferenceSpec(kind="copy") if kind == "copy of LoRA" else ReferenceSpec()
    reference = reference_of(spec, policy, backbone, tuning)
    assert reference.is_separate is (kind in ("copy", "freeze", "copy of LoRA"))
    assert torch.equal(reference.forward(BATCH, kernel=token_log_probs), want)
    perturb(policy)
    torch.manual_seed(0)
    random = torch.random.get_rng_state()
    got = reference.forward(BATCH, kernel=token_log_probs)
    assert torch.equal(got, want), "training moved the reference"
    assert not got.requires_grad
    assert torch.equal(torch.random.get_rng_state(), random), "dropout was drawn"
    assert (log_probs(policy) - want).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["copy", "adapters_off", "snapshot"])
def test_the_policy_is_left_as_it_was(base: Path, adapter: Path, kind: str) -> None:
    tuning = tuning_of(kind, adapter)
    policy = loaded(folder_spec(base), tuning)
    reference = reference_of(ReferenceSpec(), policy, folder_spec(base), tuning)
    perturb(policy)
    policy.causal_lm.model.layers[1].requires_grad_(False)  # peft would thaw what it finds
    policy.causal_lm.model.layers[0].eval()
    policy.train()
    before, trains = state(policy), [parameter.requires_grad for parameter in policy.parameters()]
    for _ in range(2):
        reference.forward(BATCH, kernel=token_log_probs)
    after = state(policy)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [parameter.requires_grad for parameter in policy.parameters()] == trains
    assert any(trains)
    assert all(module.training for module in policy.modules())
    assert not any(parameter.requires_grad for parameter in reference.backbone.parameters()) or kind != "copy"


@pytest.mark.parametrize("kind", ["adapters_off", "snapshot"])
def test_the_policy_is_left_as_it_was_by_an_error_too(base: Path, adapter: Path, kind: str) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    tuning = tuning_of(kind, adapter)
    policy = perturb(loaded(folder_spec(base), tuning))
    reference = reference_of(ReferenceSpec(), policy, folder_spec(base), tuning)
    perturb(policy)
    want, trains = log_probs(policy), [parameter.requires_grad for parameter in policy.parameters()]
    with pytest.raises(RuntimeError, match="broken"):
        reference.forward(BATCH, kernel=broken)
    assert torch.equal(log_probs(policy), want)
    assert [parameter.requires_grad for parameter in policy.parameters()] == trains
    assert policy.training


@pytest.mark.parametrize("kind", ["adapters_off", "snapshot"])
def test_a_reference_between_forward_and_backward_changes_no_gradient(base: Path, adapter: Path, kind: str) -> None:
    tuning = LoRA(rank=2) if kind == "adapters_off" else LoRA(adapter=str(adapter))
    found = []
    for between in (False, True):
        policy = loaded(folder_spec(base), tuning)
        reference = reference_of(ReferenceSpec(), policy, folder_spec(base), tuning)
        without_dropout(policy)
        perturb(policy)
        loss = policy(BATCH, kernel=token_log_probs).sum()
        if between:
            reference.forward(BATCH, kernel=token_log_probs)
        loss.backward()
        found.append([parameter.grad for parameter in policy.parameters() if parameter.requires_grad])
    assert len(found[0]) == (28 if kind == "adapters_off" else 6)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_adapters_off_also_on_the_output_layer(base: Path) -> None:
    tuning = LoRA(rank=2, target=["lm_head"])
    policy = perturb(loaded(folder_spec(base), tuning))
    reference = reference_of(ReferenceSpec(), policy, folder_spec(base), tuning)
    want = log_probs(loaded(folder_spec(base), Full()))
    assert torch.equal(reference.forward(BATCH, kernel=token_log_probs), want)
    assert not torch.equal(log_probs(policy), want)


def test_adapters_off_under_a_continued_adapter_is_the_base(base: Path, adapter: Path) -> None:
    tuning = LoRA(adapter=str(adapter))
    policy = loaded(folder_spec(base), tuning)
    off = reference_of(ReferenceSpec(kind="adapters_off"), policy, folder_spec(base), tuning)
    want = log_probs(loaded(folder_spec(base), Full()))
    assert torch.equal(off.forward(BATCH, kernel=token_log_probs), want)
    assert (log_probs(policy) - want).abs().max() > 1e-3


@pytest.mark.parametrize("tuning", [Full(), LoRA(rank=2)])
def test_another_model_and_an_adapter_on_it(base: Path, adapter: Path, tmp_path: Path, tuning: Tuning) -> None:
    other = perturb(loaded(folder_spec(base), Full()))
    save_weights(other, tmp_path, base=None, writes=True)
    policy = loaded(folder_spec(base), tuning)
    reference = reference_of(ReferenceSpec(path=str(tmp_path)), policy, folder_spec(base), tuning)
    assert torch.equal(reference.forward(BATCH, kernel=token_log_probs), log_probs(other))
    adapted = loaded(folder_spec(base), LoRA(adapter=str(adapter)))
    spec = ReferenceSpec(path=str(base), adapter=str(adapter))
    reference = reference_of(spec, policy, folder_spec(base), tuning)
    assert torch.equal(reference.forward(BATCH, kernel=token_log_probs), log_probs(adapted))


@pytest.mark.parametrize("tuning", [Full(), Freeze(num_layers=1), LoRA(rank=2)])
def test_a_separate_reference_may_have_its_own_type(base: Path, tuning: Tuning) -> None:
    policy = loaded(folder_spec(base), tuning)
    spec = ReferenceSpec(kind="copy", dtype="bfloat16")
    reference = reference_of(spec, policy, folder_spec(base), tuning)
    names = {name: p.dtype for name, p in reference.backbone.named_parameters() if "lora_" not in name}
    assert set(names.values()) == {torch.bfloat16}
    got = reference.forward(BATCH, kernel=token_log_probs)
    difference = (got - log_probs(policy)).abs().max().item()
    assert 0 < difference < 0.2


def test_layout_and_device_are_passed_on(base: Path) -> None:
    policy = loaded(folder_spec(base), Full())
    reference = reference_of(ReferenceSpec(), policy, folder_spec(base), Full())
    reference.to(torch.device("cpu"))
    reference.backbone.set_layout("padding_free")
    assert reference.backbone.is_padding_free
    assert not policy.is_padding_free


# ---------------------------------------------------------------------- fingerprint


def test_the_same_weights_have_one_fingerprint_whatever_holds_them(base: Path, adapter: Path) -> None:
    spec = folder_spec(base)
    full, off, continued = loaded(spec, Full()), loaded(spec, LoRA(rank=2)), loaded(spec, LoRA(adapter=str(adapter)))
    references = [
        reference_of(ReferenceSpec(), full, spec, Full()),
        reference_of(ReferenceSpec(kind="adapters_off"), off, spec, LoRA(rank=2)),
        reference_of(ReferenceSpec(kind="adapters_off"), continued, spec, LoRA(adapter=str(adapter))),
        reference_of(ReferenceSpec(path=str(base)), off, spec, LoRA(rank=2)),
    ]
    found = [reference.fingerprint() for reference in references]
    assert len(found[0]) == 64
    assert set(found) == {found[0]}
    for policy in (full, off, continued):
        perturb(policy)
    assert {reference.fingerprint() for reference in references} == {found[0]}


def test_a_snapshot_has_the_fingerprint_of_base_and_adapter_before_training(base: Path, adapter: Path) -> None:
    spec, tuning = folder_spec(base), LoRA(adapter=str(adapter))
    policy = loaded(spec, tuning)
    snapshot = reference_of(ReferenceSpec(), policy, spec, tuning)
    before = snapshot.fingerprint()
    perturb(policy)
    assert snapshot.fingerprint() == before
    model = reference_of(ReferenceSpec(path=str(base), adapter=str(adapter)), policy, spec, tuning)
    assert model.fingerprint() == before
    assert reference_of(ReferenceSpec(), policy, spec, tuning).fingerprint() != before
    off = reference_of(ReferenceSpec(kind="adapters_off"), policy, spec, tuning)
    assert off.fingerprint() != before


def test_a_fingerprint_sees_every_weight_and_the_type(base: Path) -> None:
    spec = folder_spec(base)
    reference = reference_of(ReferenceSpec(), loaded(spec, Full()), spec, Full())
    before = reference.fingerprint()
    weight = reference.backbone.causal_lm.model.norm.weight
    weight[3] += 1e-6
    assert reference.fingerprint() != before
    weight[3] = 1.0
    assert reference.fingerprint() == before
    half = reference_of(ReferenceSpec(dtype="bfloat16"), reference.backbone, spec, Full())
    assert half.fingerprint() != before


# ---------------------------------------------------------------------- the spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "model"}, r"reference\.path: must be the folder of the reference model, got none"),
        ({"kind": "copy", "path": "x"}, r"reference\.path: belongs to kind: model, got kind: copy"),
        ({"adapter": "x"}, r"reference\.adapter: lies on top of the model at path, got no path"),
        ({"kind": "snapshot", "dtype": "bfloat16"}, r"reference\.dtype: belongs to .*got bfloat16 with kind: snapshot"),
        ({"kind": "adapters_off", "dtype": "float32"}, r"reference\.dtype: belongs to .* with kind: adapters_off"),
    ],
)
def test_options_that_a_kind_does_not_read_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ReferenceSpec(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "tuning", "want"),
    [
        ({}, Full(), "copy"),
        ({}, Freeze(), "copy"),
        ({}, LoRA(), "adapters_off"),
        ({}, LoRA(adapter="a"), "snapshot"),
        ({"path": "x"}, LoRA(adapter="a"), "model"),
        ({"kind": "adapters_off"}, LoRA(adapter="a"), "adapters_off"),
        ({"kind": "snapshot"}, LoRA(), "snapshot"),
        ({"kind": "copy", "dtype": "bfloat16"}, LoRA(), "copy"),
    ],
)
def test_auto_chooses_by_what_trains(options: dict[str, Any], tuning: Tuning, want: str) -> None:
    assert resolved_kind(ReferenceSpec(**options), tuning) == want


@pytest.mark.parametrize("kind", ["adapters_off", "snapshot"])
def test_a_reference_of_adapters_needs_one(kind: Any) -> None:
    with pytest.raises(InputError, match=rf"reference\.kind: {kind} needs a tuning with an adapter, got Full"):
        resolved_kind(ReferenceSpec(kind=kind), Full())


def test_a_type_needs_a_reference_of_its_own() -> None:
    with pytest.raises(InputError, match=r"reference\.dtype: .* got bfloat16 with kind: adapters_off"):
        resolved_kind(ReferenceSpec(dtype="bfloat16"), LoRA())


def test_a_reference_that_cannot_be_loaded_is_named_as_such(base: Path, tmp_path: Path) -> None:
    policy = loaded(folder_spec(base), LoRA())
    for options, where in (
        ({"path": str(tmp_path / "none")}, r"model\.init_args\.reference\.path"),
        ({"path": str(base), "adapter": str(tmp_path)}, r"model\.init_args\.reference\.adapter"),
    ):
        with pytest.raises(InputError, match=rf"^{where}: must be a folder with"):
            reference_of(ReferenceSpec(**options), policy, folder_spec(base), LoRA())
