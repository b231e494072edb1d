"""The value head: where it reads, where it comes from, and its files, which LlamaFactory and transformers open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lf_lightning import BackboneSpec, InputError
from lf_lightning.models import Backbone, Freeze, Full, LoRA, Tuning, load_backbone
from lf_lightning.models.export import load_weights, save_weights
from lf_lightning.models.value_head import (
    ValueHead,
    ValueHeadSpec,
    add_value_head,
    export_sequence_classification,
    last_counted,
    load_value_head,
    save_value_head,
    score_kernel,
    sequence_ends,
)
from lf_lightning.types import TokenBatch

BASE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
UNTIED = {"model_type": "llama", **BASE, "tie_word_embeddings": False}
TIED = {**UNTIED, "tie_word_embeddings": True}
MIXTRAL = {"model_type": "mixtral", **BASE, "num_local_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 61, "initializer_range": 0.2}
MODERNBERT = {name: value for name, value in BASE.items() if name not in ("num_key_value_heads", "initializer_range")}
PLAIN = ValueHeadSpec()
STANDARD = ValueHeadSpec(save_as="sequence_classification")
ROWS = torch.tensor([[5, 9, 2, 33, 17, 60], [7, 1, 44, 0, 0, 0]])  # the second has three tokens of padding
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def spec_of(source: Any, **options: Any) -> BackboneSpec:
    given = {"architecture": source} if isinstance(source, dict) else {"path": str(source)}
    return BackboneSpec(**given, tokenizer="bytes", **options)


def reward_model(
    source: Any, tuning: Tuning = Full(), head: ValueHeadSpec = PLAIN, *, seed: int = 0, **options: Any
) -> Backbone:
    spec = spec_of(source, **options)
    backbone = load_backbone(spec, tuning, vocab_size=0, seed=seed)
    add_value_head(backbone, head, tuning=tuning, path=spec.path, seed=seed)
    return backbone


def perturb(backbone: Backbone) -> Backbone:
    """Stand in for training: move every trained weight."""
    generator = torch.Generator().manual_seed(5)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone


def batch_of(rows: Tensor, mask: Tensor) -> TokenBatch:
    """Each row is a sequence, whose tokens all count but the first."""
    counts = torch.zeros_like(mask)
    counts[:, :-1] = mask[:, 1:]
    sequences = torch.where(counts == 1, torch.arange(len(rows))[:, None], len(rows))
    return TokenBatch(rows, rows, None, None, len(rows), int(mask.sum()), sequences, len(rows))


def scores(backbone: Backbone) -> Tensor:
    batch = batch_of(ROWS, MASK)
    assert backbone.value_head is not None
    assert batch.sequences is not None
    backbone.eval()
    with torch.no_grad():
        found: Tensor = backbone(batch, kernel=score_kernel(backbone.value_head, batch.sequences, 2))
    return found


def plain_scores(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=ROWS, attention_mask=MASK).logits
    assert found.shape == (2, 1)
    return found[:, 0]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_weights(load_backbone(spec_of(UNTIED), Full(), vocab_size=0, seed=0), folder, base=None, writes=True)
    return folder


# ---------------------------------------------------------------------- where it reads


def test_the_end_of_a_sequence_is_one_after_the_last_position_that_counts() -> None:
    sequences = torch.tensor([[3, 0, 0, 3, 1, 3], [3, 3, 2, 2, 2, 3]])
    assert sequence_ends(sequences, 3).tolist() == [3, 5, 11]
    assert sequence_ends(torch.tensor([[0, 0, 0]]), 0).tolist() == []


@pytest.mark.parametrize(
    ("mask", "want"),
    [
        ([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]], [2, 0, 3]),  # padded on the right
        ([[0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]], [3, 3, 3]),  # on the left
        ([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0]], [3, 0]),
    ],
)
def test_the_last_counted_token_is_found_from_the_mask(mask: list[list[int]], want: list[int]) -> None:
    assert last_counted(torch.tensor(mask)).tolist() == want
    assert last_counted(torch.tensor(mask).bool()).tolist() == want


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", [0, 44], ids=["pad", "pad is eos"])
def test_a_score_is_the_value_at_the_last_counted_token_whatever_the_padding(side: str, padding: int) -> None:
    backbone = reward_model(UNTIED, dtype="float64").eval()
    short = torch.tensor([7, 1, 44])  # its last token is the padding's where pad is eos
    fill = torch.full((3,), padding)
    row = torch.cat([short, fill] if side == "right" else [fill, short])
    mask = torch.tensor([1, 1, 1, 0, 0, 0] if side == "right" else [0, 0, 0, 1, 1, 1])
    hidden = backbone.causal_lm.base_model(input_ids=short[None]).last_hidden_state[0, -1]
    head = backbone.value_head.summary
    want = (head.weight[0] * hidden).sum() + head.bias[0]
    batch = batch_of(row[None], mask[None])
    if side == "left":
        hidden = backbone.causal_lm.base_model(input_ids=row[None], attention_mask=mask[None]).last_hidden_state
        got = score_kernel(backbone.value_head, batch.sequences, 1)(hidden, backbone.output_layer, row[None])
        assert torch.equal(hidden[0, last_counted(mask[None])[0]], hidden[0, 5])
    else:
        got = backbone(batch, kernel=score_kernel(backbone.value_head, batch.sequences, 1))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want[None], rtol=0, atol=1e-6)  # rotary angles are float32


def test_a_filler_gives_no_score_and_zero_gradients() -> None:
    backbone = reward_model(UNTIED)
    rows = torch.tensor([[5, 9]])
    batch = TokenBatch(rows, rows, None, None, 0, 0, torch.zeros_like(rows), 0)
    found = backbone(batch, kernel=score_kernel(backbone.value_head, batch.sequences, 0))
    assert found.shape == (0,)
    found.sum().backward()
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert len(trained) == 22
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)


def test_the_head_is_float32_under_autocast_and_over_half_precision(base: Path) -> None:
    backbone = reward_model(base, LoRA(), dtype="bfloat16")
    assert {parameter.dtype for parameter in backbone.value_head.parameters()} == {torch.float32}
    hidden = torch.randn(3, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = backbone.value_head(hidden)
    layer = backbone.value_head.summary
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, hidden.float() @ layer.weight[0] + layer.bias, rtol=0, atol=1e-6)


def test_the_dropout_of_the_head_acts_in_training_alone() -> None:
    hidden = torch.ones(1, 1000)
    head = ValueHead(1000, bias=False, dropout=0.5, like=hidden)
    head.summary.weight.data.fill_(1.0)
    assert head.eval()(hidden).item() == 1000.0
    torch.manual_seed(1)
    found = head.train()(hidden).item()
    assert found != 1000.0
    assert found % 2 == 0  # what is kept counts double


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_outside_its_range_is_refused(dropout: float) -> None:
    with pytest.raises(InputError, match=r"value_head\.dropout: must be in \[0, 1\), got"):
        ValueHeadSpec(dropout=dropout)


# ---------------------------------------------------------------------- where it comes from


def test_new_weights_are_drawn_from_the_seed_with_variance_one_over_the_width_plus_one() -> None:
    before = torch.random.get_rng_state()
    like = torch.zeros(1)
    wide = ValueHead(4096, bias=True, dropout=0.0, like=like, seed=0).summary
    first, second, other = (reward_model(UNTIED, seed=seed).value_head.summary for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    assert wide.weight.std().item() == pytest.approx(0.015623, rel=0.05)  # 1 / sqrt(4097)
    assert wide.bias.item() == first.bias.item() == 0.0


def test_the_output_layer_does_not_train_unless_it_is_the_embedding() -> None:
    untied, tied = reward_model(UNTIED), reward_model(TIED)
    assert not untied.causal_lm.lm_head.weight.requires_grad
    assert untied.causal_lm.model.embed_tokens.weight.requires_grad
    assert tied.causal_lm.lm_head.weight.requires_grad
    assert tied.causal_lm.lm_head.weight is tied.causal_lm.model.embed_tokens.weight


def test_every_trained_parameter_of_a_reward_model_gets_a_gradient(base: Path) -> None:
    for source, tuning in ((UNTIED, Full()), (TIED, Full()), (base, LoRA()), (base, Freeze(num_layers=1))):
        backbone = perturb(reward_model(source, tuning))
        batch = batch_of(ROWS, MASK)
        backbone(batch, kernel=score_kernel(backbone.value_head, batch.sequences, 2)).sum().backward()
        grads = {name: parameter.grad for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        assert all(grad is not None and grad.any() for grad in grads.values())
        assert {"value_head.summary.weight", "value_head.summary.bias"} <= set(grads)


def test_an_adapter_on_the_output_layer_is_refused(base: Path) -> None:
    with pytest.raises(InputError, match=r"target: must leave out the output layer.*Remove lm_head from target"):
        reward_model(base, LoRA(target=["q_proj", "lm_head"]))


def critic_of(source: Any, tuning: Tuning) -> Backbone:
    """A value head that trains beside the output layer."""
    spec = spec_of(source)
    backbone = load_backbone(spec, tuning, vocab_size=0, seed=0)
    assert not add_value_head(backbone, PLAIN, tuning=tuning, path=spec.path, seed=0, keeps_output_layer=True)
    return backbone


@pytest.mark.parametrize("tuning", [Full(), LoRA(), Freeze(num_layers=1)], ids=["full", "lora", "freeze"])
def test_a_kept_output_layer_trains_as_the_tuning_says(base: Path, tuning: Tuning) -> None:
    kept = critic_of(base, tuning)
    without = load_backbone(spec_of(base), tuning, vocab_size=0, seed=0)
    want = {name: parameter.requires_grad for name, parameter in without.named_parameters()}
    head = {"value_head.summary.weight": True, "value_head.summary.bias": True}
    assert {name: parameter.requires_grad for name, parameter in kept.named_parameters()} == {**want, **head}
    assert kept.causal_lm.lm_head.weight.requires_grad == isinstance(tuning, Full)


@pytest.mark.parametrize("source", [UNTIED, TIED], ids=["untied", "tied"])
def test_a_kept_output_layer_and_the_head_both_get_their_gradients(source: Any) -> None:
    backbone = perturb(critic_of(source, Full()))

    def gradients(*, of_values: bool, of_logits: bool) -> dict[str, Tensor]:
        def kernel(hidden: Tensor, output_layer: Any, targets: Tensor) -> Tensor:
            logits = (hidden @ output_layer.weight.T).log_softmax(-1)[..., 7].sum()
            return of_values * backbone.value_head(hidden).square().sum() + of_logits * logits

        backbone.zero_grad()
        backbone(batch_of(ROWS, MASK), kernel=kernel).backward()
        return {name: parameter.grad.clone() for name, parameter in backbone.named_parameters()}

    both = gradients(of_values=True, of_logits=True)
    values, logits = gradients(of_values=True, of_logits=False), gradients(of_values=False, of_logits=True)
    for name, grad in both.items():
        assert grad.any()
        scale = grad.abs().max().clamp(min=1.0).item()
        torch.testing.assert_close(grad, values[name] + logits[name], rtol=0, atol=1e-4 * scale)
    assert not logits["value_head.summary.weight"].any()
    assert ("model.lm_head.weight" in both) == (source is UNTIED)
    assert not (source is UNTIED and values["model.lm_head.weight"].any())


def test_an_adapter_on_a_kept_output_layer_is_accepted_and_trains(base: Path) -> None:
    tuning = LoRA(rank=2, target=["q_proj", "lm_head"])
    backbone = perturb(critic_of(base, tuning))
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    on_output = {name for name in trained if "lm_head" in name}
    assert len(on_output) == 2
    assert all("lora_" in name for name in on_output)
    assert backbone.value_head.summary.weight.shape == (1, 16)

    def kernel(hidden: Tensor, output_layer: Any, targets: Tensor) -> Tensor:
        return (hidden @ output_layer.weight.T).square().sum() + backbone.value_head(hidden).square().sum()

    backbone(batch_of(ROWS, MASK), kernel=kernel).backward()
    assert {name for name, each in backbone.named_parameters() if each.grad is not None and each.grad.any()} == trained
    with pytest.raises(InputError, match=r"target: must leave out the output layer"):
        reward_model(base, tuning)


def test_the_head_reads_what_it_reads_without_an_output_layer_and_changes_no_logits() -> None:
    kept, without = critic_of(UNTIED, Full()), reward_model(UNTIED)
    assert torch.equal(scores(kept), scores(without))
    plain = load_backbone(spec_of(UNTIED), Full(), vocab_size=0, seed=0).eval()
    assert torch.equal(kept.causal_lm(ROWS).logits, plain.causal_lm(ROWS).logits)


def test_auto_loads_the_head_of_the_backbones_folder(tmp_path: Path) -> None:
    first = perturb(reward_model(UNTIED))
    save_weights(first, tmp_path, base=None, writes=True)
    save_value_head(first, tmp_path, writes=True)
    again = reward_model(tmp_path)
    torch.testing.assert_close(scores(again), scores(first), rtol=0, atol=1e-6)
    new = reward_model(tmp_path, head=ValueHeadSpec(init="new"))
    assert not torch.equal(new.value_head.summary.weight, first.value_head.summary.weight)


def test_the_head_of_a_continued_adapter_comes_before_that_of_the_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    first = perturb(reward_model(UNTIED))
    base.mkdir()
    save_weights(first, base, base=None, writes=True)
    save_value_head(first, base, writes=True)
    second = perturb(reward_model(base, LoRA(rank=2)))
    adapter.mkdir()
    save_weights(second, adapter, base=str(base), writes=True)
    save_value_head(second, adapter, writes=True)
    third = reward_model(base, LoRA(adapter=str(adapter)), ValueHeadSpec(init="load"))
    torch.testing.assert_close(scores(third), scores(second), rtol=0, atol=1e-6)
    assert (scores(third) - scores(first)).abs().max() > 1e-2


@pytest.mark.parametrize("source", ["base", "scratch"])
def test_a_head_that_must_be_loaded_and_is_missing_is_refused(base: Path, source: str) -> None:
    where = str(base) if source == "base" else r"backbone\.path"
    message = rf"value_head\.init: load needs value_head\.safetensors or value_head\.bin in {where}, got neither"
    with pytest.raises(InputError, match=message):
        reward_model(base if source == "base" else UNTIED, head=ValueHeadSpec(init="load"))


# ---------------------------------------------------------------------- value_head.safetensors and value_head.bin


def test_the_file_has_llamafactorys_names(tmp_path: Path) -> None:
    backbone = perturb(reward_model(UNTIED))
    save_value_head(backbone, tmp_path, writes=False)
    assert not list(tmp_path.iterdir())
    save_value_head(backbone, tmp_path, writes=True)
    tensors = load_file(tmp_path / "value_head.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "v_head.summary.weight": (1, 16),
        "v_head.summary.bias": (1,),
    }
    assert torch.equal(tensors["v_head.summary.weight"], backbone.value_head.summary.weight)
    assert tensors["v_head.summary.bias"].item() != 0.0


def test_a_bin_file_is_read_too(tmp_path: Path) -> None:
    weight = torch.arange(16.0)[None]
    torch.save(
        {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.5])}, tmp_path / "value_head.bin"
    )
    head = ValueHead(16, bias=True, dropout=0.0, like=weight)
    load_value_head(head, tmp_path)
    assert head(torch.ones(16)).item() == 120.5


def test_a_head_recorded_from_llamafactory_is_read(parity: Path) -> None:
    if not (parity / "model-vh").is_dir():
        pytest.skip("needs ../shared/parity/model-vh, which is absent")
    backbone = reward_model(parity / "model-vh", head=ValueHeadSpec(init="load"))
    stored = load_file(parity / "model-vh" / "value_head.safetensors")
    assert torch.equal(backbone.value_head.summary.weight, stored["v_head.summary.weight"])
    assert scores(backbone).isfinite().all()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"v_head.summary.weight": torch.zeros(1, 8)}, r"weight must have shape \(1, 16\), got \(1, 8\)"),
        ({"v_head.summary.weight": torch.full((1, 16), torch.nan)}, "weight must be finite"),
        ({"summary.weight": torch.zeros(1, 16)}, r"must hold v_head\.summary\.weight and v_head\.summary\.bias, got"),
        ({"v_head.summary.weight": torch.zeros(1, 16), "x": torch.zeros(1)}, r"must hold .*'x'"),
        ({"v_head.summary.weight": torch.zeros(1, 16), "v_head.summary.bias": torch.ones(2)}, r"bias must have shape"),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, form: str, tensors: Any, message: str) -> None:
    if form == "bin":
        torch.save(tensors, tmp_path / "value_head.bin")
    else:
        save_file(tensors, tmp_path / "value_head.safetensors")
    head = ValueHead(16, bias=True, dropout=0.0, like=torch.zeros(1))
    with pytest.raises(InputError, match=message):
        load_value_head(head, tmp_path)


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_a_broken_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no tensors")
    with pytest.raises(InputError, match=name):
        load_value_head(ValueHead(16, bias=True, dropout=0.0, like=torch.zeros(1)), tmp_path)


def test_a_pickle_that_holds_more_than_tensors_is_not_opened(tmp_path: Path) -> None:
    torch.save({"v_head.summary.weight": Path("x")}, tmp_path / "value_head.bin")
    with pytest.raises(InputError, match="must hold tensors alone"):
        load_value_head(ValueHead(16, bias=True, dropout=0.0, like=torch.zeros(1)), tmp_path)


@pytest.mark.parametrize("content", [torch.zeros(1, 16), {"v_head.summary.weight": "x"}])
def test_a_pickle_of_another_form_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "value_head.bin")
    with pytest.raises(InputError, match=r"must hold v_head\.summary\.weight and v_head\.summary\.bias, got"):
        load_value_head(ValueHead(16, bias=True, dropout=0.0, like=torch.zeros(1)), tmp_path)


def test_a_bias_cannot_be_exported_for_sequence_classification(tmp_path: Path) -> None:
    first = perturb(reward_model(UNTIED))
    save_weights(first, tmp_path, base=None, writes=True)
    save_value_head(first, tmp_path, writes=True)
    with pytest.raises(InputError, match=r"bias must be 0 for .*sequence_classification, which knows no bias"):
        reward_model(tmp_path, head=STANDARD)


@pytest.mark.parametrize("tuning", [Full(), LoRA(rank=2), Freeze(num_layers=1)])
def test_a_reward_model_is_a_plain_model_beside_a_head_and_comes_back(
    tmp_path: Path, base: Path, tuning: Tuning
) -> None:
    trained = perturb(reward_model(base, tuning))
    save_weights(trained, tmp_path, base=str(base), writes=True)
    other = reward_model(base, tuning, seed=1)
    with pytest.raises(InputError, match=r"reward model: .* must hold value_head\.safetensors or value_head\.bin"):
        load_weights(other, tmp_path)
    save_value_head(trained, tmp_path, writes=True)
    load_weights(other, tmp_path)
    assert torch.equal(scores(other), scores(trained))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = plain.base_model(input_ids=ROWS).last_hidden_state[[0, 1], [5, 2]]
    head = load_file(tmp_path / "value_head.safetensors")
    want = hidden @ head["v_head.summary.weight"][0] + head["v_head.summary.bias"]
    torch.testing.assert_close(scores(trained), want, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- AutoModelForSequenceClassification


def exported(backbone: Backbone, folder: Path, *, base: Path | None = None, **options: Any) -> Path:
    save_weights(backbone, folder, base=None if base is None else str(base), writes=True)
    export_sequence_classification(backbone, folder, writes=True, **{"ending_ids": (44, 60), **options})
    return folder


@pytest.mark.parametrize(
    "architecture", [UNTIED, TIED, MIXTRAL, {**GPT2, "pad_token_id": 0}], ids=["untied", "tied", "mixtral", "gpt2"]
)
def test_a_full_reward_model_opens_for_sequence_classification(tmp_path: Path, architecture: dict[str, Any]) -> None:
    trained = perturb(reward_model(architecture, head=STANDARD))
    folder = exported(trained, tmp_path)
    plain, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    torch.testing.assert_close(plain_scores(plain), scores(trained), rtol=0, atol=1e-5)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [type(plain).__name__]
    assert config["label2id"] == {"LABEL_0": 0}
    assert config["pad_token_id"] == 0
    assert config.get("problem_type") is None
    other = reward_model(architecture, head=STANDARD, seed=1)
    load_weights(other, folder)
    torch.testing.assert_close(scores(other), scores(trained), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", [UNTIED, TIED, MIXTRAL], ids=["untied", "tied", "mixtral"])
@pytest.mark.parametrize("size", ["2KB", "6KB"])
def test_shards_and_their_index_stay_right(tmp_path: Path, architecture: dict[str, Any], size: str) -> None:
    trained = perturb(reward_model(architecture, head=STANDARD))
    trained.causal_lm.save_pretrained(tmp_path, max_shard_size=size)
    export_sequence_classification(trained, tmp_path, writes=True, ending_ids=())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert index["weight_map"] == {name: file for file, tensors in shards.items() for name in tensors}
    everything = [tensor for tensors in shards.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in everything)
    assert "lm_head.weight" not in index["weight_map"]
    plain, report = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(plain_scores(plain), scores(trained), rtol=0, atol=1e-5)
    other = reward_model(architecture, head=STANDARD, seed=1)
    load_weights(other, tmp_path)
    torch.testing.assert_close(scores(other), scores(trained), rtol=0, atol=1e-6)


def test_a_frozen_half_opens_for_sequence_classification(tmp_path: Path, base: Path) -> None:
    trained = perturb(reward_model(base, Freeze(num_layers=1), STANDARD))
    plain = AutoModelForSequenceClassification.from_pretrained(exported(trained, tmp_path))
    torch.testing.assert_close(plain_scores(plain), scores(trained), rtol=0, atol=1e-5)


def test_an_adapter_opens_for_sequence_classification(tmp_path: Path, base: Path) -> None:
    trained = perturb(reward_model(base, LoRA(rank=2), STANDARD))
    folder = exported(trained, tmp_path, base=base)
    under = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    plain = PeftModel.from_pretrained(under, folder)
    torch.testing.assert_close(plain_scores(plain), scores(trained), rtol=0, atol=1e-5)
    alone = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    torch.testing.assert_close(plain_scores(alone), scores(trained), rtol=0, atol=1e-5)
    merged = plain.merge_and_unload()
    torch.testing.assert_close(plain_scores(merged), scores(trained), rtol=0, atol=1e-5)
    other = reward_model(base, LoRA(rank=2), STANDARD, seed=1)
    load_weights(other, folder)
    assert torch.equal(scores(other), scores(trained))
    continued = reward_model(base, LoRA(adapter=str(folder)), ValueHeadSpec(init="load"))
    torch.testing.assert_close(scores(continued), scores(trained), rtol=0, atol=1e-6)
    assert continued.num_parameters()[0] == trained.num_parameters()[0] + 1  # this head has a bias


def test_a_folder_for_sequence_classification_without_its_score_is_refused(tmp_path: Path) -> None:
    save_weights(reward_model(UNTIED), tmp_path, base=None, writes=True)
    with pytest.raises(InputError, match=r"reward model: .* must hold value_head\.safetensors or value_head\.bin"):
        load_weights(reward_model(UNTIED, head=STANDARD), tmp_path)


@pytest.mark.parametrize(
    ("own", "ending", "given", "want"),
    [
        (0, (44,), None, 0),
        (0, (0,), 3, 3),  # pad is eos: another is taken
        (0, (0,), None, None),
        (0, (0, 3), 3, None),
        (None, (0,), 3, 3),
        (0, (44,), 3, 3),
    ],
)
def test_a_pad_token_that_can_end_a_sequence_is_not_that_of_the_folder(
    tmp_path: Path, own: int | None, ending: tuple[int, ...], given: int | None, want: int | None
) -> None:
    backbone = reward_model({**UNTIED, "pad_token_id": own}, head=STANDARD)
    save_weights(backbone, tmp_path, base=None, writes=True)
    got = export_sequence_classification(backbone, tmp_path, writes=True, ending_ids=ending, pad_id=given)
    assert got == want
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == want


def test_unless_told_the_tokens_that_end_generation_end_a_sequence(tmp_path: Path) -> None:
    backbone = reward_model(UNTIED, head=STANDARD)
    backbone.causal_lm.generation_config.eos_token_id = [0, 7]
    backbone.causal_lm.generation_config.pad_token_id = 5
    save_weights(backbone, tmp_path, base=None, writes=True)
    assert export_sequence_classification(backbone, tmp_path, writes=True) == 5


def test_a_sequence_that_ends_in_the_old_pad_token_is_scored_at_its_end(tmp_path: Path) -> None:
    backbone = perturb(reward_model({**UNTIED, "pad_token_id": 44}, head=STANDARD))
    folder = exported(backbone, tmp_path, pad_id=0)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(plain_scores(plain), scores(backbone), rtol=0, atol=1e-5)  # the second row ends in 44


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"model_type": "granite", **BASE}, "needs a class of transformers, which has none for granite"),
        ({"model_type": "modernbert-decoder", **MODERNBERT}, "needs a class that is the decoder and one linear layer"),
    ],
)
def test_a_family_without_a_class_to_score_with_is_refused_before_training(
    architecture: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        reward_model(architecture, head=STANDARD)
    assert reward_model(architecture).value_head is not None
