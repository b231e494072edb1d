"""The reward that an adapter gives on the policy's base: the same scores, and a policy that never notices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lf_lightning import BackboneSpec, InputError
from lf_lightning.losses.log_probs import token_log_probs
from lf_lightning.models import (
    Backbone,
    Full,
    LoRA,
    Reference,
    ReferenceSpec,
    Reward,
    RewardAdapter,
    RewardModel,
    ValueHeadSpec,
    load_reference,
)
from lf_lightning.models.export import load_weights, save_weights
from lf_lightning.models.rewards import combined_scores
from lf_lightning.models.value_head import export_sequence_classification
from lf_lightning.types import TokenBatch, TrainingStopped
from tests.models.reward_folders import ROWS, batch_of, loaded, perturb, prepared, save_base, save_judge, with_head

NUM_BASE = 2 * 261 * 16 + 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16) + 16
NUM_OF_A_RANK = 2 * (
    2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24)
)  # every linear layer of both blocks: inputs + outputs
NUM_HEAD = 16 + 1
IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 4, 8]])
BATCH = TokenBatch(IDS, torch.cat([IDS[:, 1:], torch.tensor([[-100]])], dim=1), None, None, 1, 8)


def policy_of(base: Path, **options: Any) -> Backbone:
    return perturb(loaded(base, LoRA(**{"rank": 3, "dropout": 0.4, **options})), seed=11)


def scored(*rewards: Reward, rows: Sequence[Sequence[int]] = ROWS) -> Tensor:
    text = ("",) * len(rows)
    return combined_scores(rewards, text, text, batch_of(rows))


def refusal(reward: Reward, policy: Backbone) -> str:
    with pytest.raises(InputError) as caught:
        prepared(reward, policy)
    message = str(caught.value)
    assert message.startswith("model.init_args.rewards: RewardAdapter"), message
    assert "\n" not in message
    return message


def log_probs(model: Backbone | Reference) -> Tensor:
    with torch.no_grad():
        if isinstance(model, Reference):
            found: Tensor = model.forward(BATCH, kernel=token_log_probs)
            return found
        was_training = model.training
        with model.padded_attention():
            found = model.eval()(BATCH, kernel=token_log_probs)
        model.train(was_training)
    return found


def look(policy: Backbone) -> dict[str, Any]:
    """Everything of a policy that scoring might leave changed."""
    return {
        "weights": {name: parameter.detach().clone() for name, parameter in policy.named_parameters()},
        "trains": {name: parameter.requires_grad for name, parameter in policy.named_parameters()},
        "modes": [module.training for module in policy.modules()],
        "active": (policy.model.active_adapter, list(policy.model.active_adapters)),
        "layers": [module.active_adapters for module in policy.modules() if "lora_A" in dir(module)],
        "layout": policy.is_padding_free,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
    for key in ("trains", "modes", "active", "layers", "layout"):
        assert before[key] == after[key], key
    assert before["layers"], "no layer has an adapter"


def tensors_of(*owners: Any) -> dict[int, Tensor]:
    """Every tensor that modules, and rewards through their attributes, hold."""
    found: dict[int, Tensor] = {}
    for owner in owners:
        modules = [owner] if isinstance(owner, nn.Module) else list(vars(owner).values())
        for module in modules:
            if isinstance(module, nn.Module):
                found |= {tensor.data_ptr(): tensor for tensor in module.parameters()}
            elif isinstance(module, Tensor):
                found[module.data_ptr()] = module
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(with_head(base, LoRA(rank=2)), tmp_path_factory.mktemp("judge"), base)


@pytest.fixture(scope="module")
def second(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = with_head(base, LoRA(rank=5, target=["q_proj", "v_proj"]), seed=8)
    return save_judge(backbone, tmp_path_factory.mktemp("second"), base)


# ---------------------------------------------------------------------- what it scores


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_score_is_that_of_the_same_folder_as_a_reward_model(
    base: Path, folder: Path, layout: Any, batch_size: int
) -> None:
    policy = policy_of(base)
    policy.set_layout(layout)
    adapter = prepared(RewardAdapter(str(folder), batch_size=batch_size), policy)
    want = scored(prepared(RewardModel(str(folder)), policy))
    assert want.unique().numel() == len(ROWS)
    torch.testing.assert_close(scored(adapter), want, rtol=0, atol=1e-6)
    perturb(policy)  # training goes on
    torch.testing.assert_close(scored(adapter), want, rtol=0, atol=1e-6)


def test_an_adapter_saved_for_sequence_classification_scores_the_same(base: Path, tmp_path: Path) -> None:
    backbone = with_head(base, LoRA(rank=2), ValueHeadSpec(save_as="sequence_classification"))
    save_weights(backbone, tmp_path, base=str(base), writes=True)
    export_sequence_classification(backbone, tmp_path, writes=True, ending_ids=(2,), pad_id=0)
    policy = policy_of(base)
    got = scored(prepared(RewardAdapter(str(tmp_path)), policy), prepared(RewardModel(str(tmp_path)), policy))
    torch.testing.assert_close(got[:, 0], got[:, 1], rtol=0, atol=1e-6)
    assert set(policy.model.peft_config) == {"default", "reward_1"}
    assert not [name for name, _ in policy.named_parameters() if "score" in name]


@pytest.mark.parametrize("order", ["first, second", "second, first"])
def test_two_adapters_at_once_keep_apart(base: Path, folder: Path, second: Path, order: str) -> None:
    folders = [folder, second] if order == "first, second" else [second, folder]
    policy = policy_of(base)
    want = scored(*(prepared(RewardModel(str(each)), policy) for each in folders))
    rewards = [prepared(RewardAdapter(str(each)), policy) for each in folders]
    before = look(policy)
    for _ in range(2):
        torch.testing.assert_close(scored(*rewards), want, rtol=0, atol=1e-6)
    assert (want[:, 0] - want[:, 1]).abs().min() > 1e-3
    assert_same(before, look(policy))


def test_an_adapter_of_a_tuned_output_layer_in_the_policy_does_not_matter(base: Path, folder: Path) -> None:
    policy = policy_of(base, target=["q_proj", "lm_head"], dropout=0.0)
    got = scored(prepared(RewardAdapter(str(folder)), policy), prepared(RewardModel(str(folder)), policy))
    torch.testing.assert_close(got[:, 0], got[:, 1], rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- the policy does not notice


def test_loading_a_reward_adapter_leaves_the_policy_as_it_was(base: Path, folder: Path, second: Path) -> None:
    policy = policy_of(base)
    before, want = look(policy), log_probs(policy)
    for each in (folder, second):
        prepared(RewardAdapter(str(each)), policy)
    after = look(policy)
    assert after["active"] == before["active"]
    assert {name for name, trains in after["trains"].items() if trains} == {
        name for name, trains in before["trains"].items() if trains
    }
    assert all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
    added = set(after["trains"]) - set(before["trains"])
    assert {name.split(".")[-2] for name in added} == {"reward_1", "reward_2"}
    assert torch.equal(log_probs(policy), want)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_scoring_leaves_the_policy_as_it_was_bit_by_bit(base: Path, folder: Path, mode: str, layout: Any) -> None:
    policy = policy_of(base)
    policy.set_layout(layout)
    reward = prepared(RewardAdapter(str(folder)), policy)
    policy.train(mode == "train")
    frozen = next(parameter for name, parameter in policy.named_parameters() if "layers.1" in name and "lora_A" in name)
    frozen.requires_grad_(False)  # peft would thaw it
    before, want, random = look(policy), log_probs(policy), torch.random.get_rng_state()
    scores = [scored(reward) for _ in range(2)]
    assert torch.equal(*scores)
    assert torch.equal(torch.random.get_rng_state(), random), "dropout was drawn"
    assert_same(before, look(policy))
    assert torch.equal(log_probs(policy), want)


@pytest.mark.parametrize("rows", [((5, 9), (7, 100_000)), ((5, 9), ())], ids=["no such word", "empty"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_error_while_scoring_leaves_the_policy_as_it_was_too(base: Path, folder: Path, mode: str, rows: Any) -> None:
    policy = policy_of(base)
    policy.set_layout("padding_free")
    reward = prepared(RewardAdapter(str(folder), batch_size=1), policy)
    policy.train(mode == "train")
    before, want = look(policy), scored(reward)
    with pytest.raises(TrainingStopped):
        scored(reward, rows=rows)
    assert_same(before, look(policy))
    assert torch.equal(scored(reward), want)


def test_only_the_policys_adapter_gets_gradients_and_the_next_step_trains(base: Path, folder: Path) -> None:
    policy = policy_of(base)
    reward = prepared(RewardAdapter(str(folder)), policy)
    scored(reward)
    policy(BATCH, kernel=token_log_probs).sum().backward()
    grads = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert grads == {name for name, _ in policy.named_parameters() if ".default." in name}
    assert len(grads) == 2 * 2 * 7  # A and B of seven linear layers in two blocks


def test_the_reference_without_adapters_is_the_base_beside_a_reward_adapter(base: Path, folder: Path) -> None:
    policy = policy_of(base)
    reward = prepared(RewardAdapter(str(folder)), policy)
    spec, tuning = BackboneSpec(path=str(base), tokenizer="bytes"), LoRA(rank=3, dropout=0.4)
    off = load_reference(ReferenceSpec(kind="adapters_off"), policy, spec, tuning, vocab_size=0, seed=0)
    want = log_probs(loaded(base, Full()))
    assert (log_probs(policy) - want).abs().max() > 1e-3
    scores, before = scored(reward), look(policy)
    for _ in range(2):
        torch.testing.assert_close(log_probs(off), want, rtol=0, atol=1e-6)
        assert torch.equal(scored(reward), scores)
    assert_same(before, look(policy))


# ---------------------------------------------------------------------- what is held and saved


def test_one_base_and_the_adapters_are_all_that_is_held(base: Path, folder: Path, second: Path) -> None:
    policy = policy_of(base)
    assert sum(tensor.numel() for tensor in tensors_of(policy).values()) == NUM_BASE + 3 * NUM_OF_A_RANK
    rewards = [prepared(RewardAdapter(str(folder)), policy)]
    held = tensors_of(policy, *rewards)
    want = NUM_BASE + (3 + 2) * NUM_OF_A_RANK + NUM_HEAD
    assert sum(tensor.numel() * tensor.element_size() for tensor in held.values()) == 8 * want
    rewards.append(prepared(RewardAdapter(str(second)), policy))
    scored(*rewards)
    held = tensors_of(policy, *rewards)
    want += 5 * 2 * ((16 + 16) + (16 + 8)) + NUM_HEAD  # q_proj and v_proj of both blocks
    assert sum(tensor.numel() * tensor.element_size() for tensor in held.values()) == 8 * want


def test_the_policys_folder_holds_the_trained_adapter_alone_and_loads_again(
    base: Path, folder: Path, second: Path, tmp_path: Path
) -> None:
    plain, beside = (policy_of(base) for _ in range(2))
    rewards = [prepared(RewardAdapter(str(each)), beside) for each in (folder, second)]
    scores = scored(*rewards)
    folders = [tmp_path / name for name in ("plain", "beside")]
    for policy, each in zip((plain, beside), folders, strict=True):
        each.mkdir()
        save_weights(policy, each, base=str(base), writes=True)
    names = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in folders]
    assert names[0] == names[1] == ["adapter_config.json", "adapter_model.safetensors"]
    stored = [load_file(each / "adapter_model.safetensors") for each in folders]
    assert stored[0].keys() == stored[1].keys()
    assert all(torch.equal(tensor, stored[1][name]) for name, tensor in stored[0].items())
    config = json.loads((folders[1] / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (3, str(base))
    want = log_probs(beside)
    perturb(beside)
    assert not torch.equal(log_probs(beside), want)
    load_weights(beside, folders[1])
    assert torch.equal(log_probs(beside), want)
    assert torch.equal(scored(*rewards), scores)
    before = look(beside)
    load_weights(beside, folders[0])
    assert_same(before, look(beside))


# ---------------------------------------------------------------------- refusals


def test_a_policy_without_an_adapter_is_refused(base: Path, folder: Path) -> None:
    assert RewardAdapter.needs_adapter
    message = refusal(RewardAdapter(str(folder)), loaded(base, Full()))
    assert "RewardAdapter: needs a policy tuned with LoRA, got another tuning. Use RewardModel." in message


def spoilt(folder: Path, copy: Path, spoil: Callable[[dict[str, Tensor]], Any]) -> Path:
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    spoil(tensors)
    save_file(tensors, copy / "adapter_model.safetensors")
    return copy


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(base: Path, folder: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / name).unlink()
    message = refusal(RewardAdapter(str(copy)), policy_of(base))
    assert f"path: must {'hold' if 'head' in name else 'be a folder with'} {name}, got {copy}" in message


def test_an_adapter_that_is_not_whole_or_holds_more_is_refused(base: Path, folder: Path, tmp_path: Path) -> None:
    less = spoilt(folder, tmp_path / "less", lambda tensors: tensors.pop(next(iter(tensors))))
    more = spoilt(folder, tmp_path / "more", lambda tensors: tensors.update({"base_model.model.x": torch.zeros(1)}))
    for each in (less, more):
        assert f"path: {each} must fit the policy's base, got " in refusal(RewardAdapter(str(each)), policy_of(base))


def test_an_adapter_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    message = refusal(RewardAdapter(str(folder)), policy_of(save_base(tmp_path, intermediate_size=32)))
    assert f"path: {folder} must fit the policy's base, got " in message


def test_a_base_of_another_name_is_pointed_out(
    base: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared(RewardAdapter(str(folder)), policy_of(base))
    assert "they must be one model" not in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    prepared(RewardAdapter(str(folder)), policy_of(copy))
    said = f"RewardAdapter: {folder} was trained on {base}, the policy's base is {copy}: they must be one model"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises(InputError, match=rf"RewardAdapter\.batch_size: must be at least 1, got {batch_size}\."):
        RewardAdapter("judge", batch_size=batch_size)
