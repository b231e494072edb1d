"""Our losses against TRL's own trainers: one model, one batch of theirs, the loss and the gradient of every weight."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lf_lightning.data.tokenizer import byte_tokenizer
from lf_lightning.losses.kto import KTO_LOSSES, kl_estimate
from lf_lightning.losses.log_probs import (
    TokenStatistics,
    front_sums,
    length_desensitized,
    sequence_lengths,
    sequence_sums,
    token_statistics,
)
from lf_lightning.losses.preference import PREFERENCE_LOSSES, LogRatios, PreferenceConstants, preference_rewards
from lf_lightning.losses.reward import centering_penalty, reward_loss
from lf_lightning.types import IGNORE, OutputLayer

trl = pytest.importorskip("trl")
trl_cpo, trl_orpo = (pytest.importorskip(f"trl.experimental.{name}") for name in ("cpo", "orpo"))
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENIZER = byte_tokenizer()
PAIRS = Dataset.from_list(
    [
        {"prompt": "Say hi.", "chosen": " Hi!", "rejected": " No, I would rather not.", "margin": 0.5},
        {"prompt": "2+2?", "chosen": " That is four.", "rejected": " 5", "margin": 0.0},
        {"prompt": "Colour?", "chosen": " Green", "rejected": " Grey.", "margin": 1.25},
    ]
)
FEEDBACK = Dataset.from_list(
    [
        {"prompt": "Say hi.", "completion": " Hi!", "label": True},
        {"prompt": "2+2?", "completion": " That is four.", "label": True},
        {"prompt": "Colour?", "completion": " Grey, or not at all.", "label": False},
    ]
)


def tiny(seed: int, kind: type[Any] = LlamaForCausalLM, **options: Any) -> Any:
    """A model whose predictions are far from uniform, so that no term of a loss is near its start."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(TOKENIZER), pad_token_id=0, initializer_range=0.3, **sizes, **options)
    return kind(config)


def trainer_of(
    kind: type[Any], config: type[Any], folder: Path, rows: Dataset, *models: nn.Module, **options: Any
) -> Any:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    plain = {"per_device_train_batch_size": 3, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    arguments = config(output_dir=str(folder), **quiet, **plain, **options)
    return kind(*models, args=arguments, train_dataset=rows, processing_class=TOKENIZER)


def batch_of(trainer: Any) -> dict[str, Tensor]:
    """The one batch of its training set, in an order of its own where it shuffles."""
    return dict(next(iter(trainer.get_train_dataloader())))


class Sequences(NamedTuple):
    """Rows of a batch of theirs in our terms; row i is sequence i."""

    statistics: TokenStatistics
    sequences: Tensor
    sums: Tensor
    lengths: Tensor


def sequences_of(model: Any, input_ids: Tensor, mask: Tensor, is_response: Tensor) -> Sequences:
    """What our kernel makes of a batch; all arguments (S, T)."""
    hidden = model.model(input_ids=input_ids, attention_mask=mask).last_hidden_state[:, :-1]
    is_counted = is_response[:, 1:].bool()
    targets = input_ids[:, 1:].where(is_counted, IGNORE)
    sequences = torch.arange(len(input_ids)).unsqueeze(1).where(is_counted, len(input_ids))
    statistics = token_statistics(hidden, OutputLayer(model.lm_head.weight), targets, with_entropy=True, chunk_size=7)
    sums = sequence_sums(statistics.log_probs, sequences, len(input_ids))
    return Sequences(statistics, sequences, sums, sequence_lengths(sequences, len(input_ids)))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_agree(model: nn.Module, loss: Tensor, trainer: Any, batch: dict[str, Tensor]) -> None:
    """Loss to 1e-5 of its size, and gradients to 1e-5 of the largest entry of their tensor."""
    expected = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(model, loss), gradients(trainer.model, expected)
    assert found.keys() == wanted.keys()
    assert len(found) >= 10
    for name, grad in wanted.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5 * float(grad.abs().max()), msg=name)


def our_ratios(name: str, policy: Sequences, reference: Sequences, *, ld_alpha: float = 1.0) -> LogRatios:
    """Their batches hold all chosen responses first."""

    def log_probs(side: Sequences) -> Tensor:
        shorter = torch.minimum(*side.lengths.chunk(2)).repeat(2)
        front = front_sums(side.statistics.log_probs, side.sequences, shorter)
        whole = length_desensitized(side.sums, front, ld_alpha=ld_alpha)
        return whole / side.lengths if PREFERENCE_LOSSES[name].uses_means else whole

    return LogRatios(*(log_probs(policy) - log_probs(reference)).chunk(2))


DPO_CASES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "robust": {"label_smoothing": 0.2},
    "exo_pair": {"label_smoothing": 0.15},
    "nca_pair": {},
    "bco_pair": {},
    "sppo_hard": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.4},
    "sigmoid_norm": {"beta": 2.0},
}


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("name", DPO_CASES)
def test_the_loss_and_its_gradients_are_those_of_the_dpo_trainer(name: str, ld_alpha: float | None, tmp_path: Path):
    options = {"beta": 0.05, **DPO_CASES[name]}
    policy, reference = tiny(1), tiny(2)
    ours = copy.deepcopy(policy)
    trainer = trainer_of(
        trl.DPOTrainer, trl.DPOConfig, tmp_path, PAIRS, policy, reference, loss_type=name, ld_alpha=ld_alpha, **options
    )
    batch = batch_of(trainer)
    inputs = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    with torch.no_grad():
        frozen = sequences_of(reference, *inputs)
    ratios = our_ratios(name, sequences_of(ours, *inputs), frozen, ld_alpha=1.0 if ld_alpha is None else ld_alpha)
    beta = options.pop("beta")
    loss = PREFERENCE_LOSSES[name].function(ratios, beta=beta, constants=PreferenceConstants(**options), kl=None)
    assert loss.shape == (3,)
    assert_agree(ours, loss.mean(), trainer, batch)


def test_the_metrics_of_a_batch_are_those_of_the_dpo_trainer(tmp_path: Path):
    policy, reference = tiny(1), tiny(2)
    ours = copy.deepcopy(policy)
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, tmp_path, PAIRS, policy, reference, beta=0.05)
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, dict(batch))
    logged: dict[str, float] = {}
    trainer.log(logged)
    inputs = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    sides = sequences_of(ours, *inputs)
    ratios = our_ratios("sigmoid", sides, sequences_of(reference, *inputs))
    rewards = preference_rewards(ratios, beta=0.05)
    entropy = sides.statistics.entropy
    assert entropy is not None
    assert logged["entropy"] == pytest.approx(float(entropy.sum() / sides.lengths.sum()), rel=1e-5)
    correct = sequence_sums(sides.statistics.is_correct.float(), sides.sequences, 6)[:3].sum()
    assert logged["mean_token_accuracy"] == pytest.approx(float(correct / sides.lengths[:3].sum()), rel=1e-5)
    assert logged["rewards/chosen"] == pytest.approx(rewards.chosen.mean().item(), rel=1e-5)
    assert logged["rewards/rejected"] == pytest.approx(rewards.rejected.mean().item(), rel=1e-5)


def reference_free(batch: dict[str, Tensor], model: Any) -> tuple[Sequences, Sequences]:
    """Chosen and rejected of a batch of the CPO and ORPO trainers, whose labels hide the prompt."""
    sides = []
    for side in ("chosen", "rejected"):
        mask = batch[f"{side}_attention_mask"]
        is_response = (batch[f"{side}_labels"] != IGNORE).long()
        sides.append(sequences_of(model, batch[f"{side}_input_ids"], mask, is_response))
    return sides[0], sides[1]


def mean_log_probs(sides: tuple[Sequences, Sequences]) -> LogRatios:
    return LogRatios(*(side.sums / side.lengths for side in sides))


REFERENCE_FREE_OPTIONS = {"max_length": 64, "generate_during_eval": False, "remove_unused_columns": False}


def test_simpo_and_its_gradients_are_those_of_the_cpo_trainer(tmp_path: Path):
    policy = tiny(1)
    ours = copy.deepcopy(policy)
    options = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7, **REFERENCE_FREE_OPTIONS}
    trainer = trainer_of(trl_cpo.CPOTrainer, trl_cpo.CPOConfig, tmp_path, PAIRS, policy, **options)
    batch = batch_of(trainer)
    means = mean_log_probs(reference_free(batch, ours))
    loss = PREFERENCE_LOSSES["simpo"].function(means, beta=2.0, constants=PreferenceConstants(simpo_gamma=0.7), kl=None)
    assert_agree(ours, loss.mean(), trainer, batch)


def test_orpo_and_its_gradients_are_those_of_the_orpo_trainer_but_for_the_prompt_in_its_likelihood(tmp_path: Path):
    policy = tiny(1)
    ours = copy.deepcopy(policy)
    trainer = trainer_of(
        trl_orpo.ORPOTrainer, trl_orpo.ORPOConfig, tmp_path, PAIRS, policy, beta=0.3, **REFERENCE_FREE_OPTIONS
    )
    batch = batch_of(trainer)
    means = mean_log_probs(reference_free(batch, ours))
    loss = PREFERENCE_LOSSES["orpo"].function(means, beta=0.3, constants=PreferenceConstants(), kl=None)
    ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    logits = ours(input_ids=ids, attention_mask=mask).logits[:, :-1]
    with_prompt = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].where(mask[:, 1:].bool(), IGNORE).flatten())
    assert_agree(ours, (loss + means.chosen).mean() + with_prompt, trainer, batch)


@pytest.mark.parametrize("seeds", [(1, 2), (2, 1)])  # of policy and reference
@pytest.mark.parametrize("name", KTO_LOSSES)
def test_the_loss_and_its_gradients_are_those_of_the_kto_trainer(name: str, seeds: tuple[int, int], tmp_path: Path):
    policy, reference = tiny(seeds[0]), tiny(seeds[1])
    ours = copy.deepcopy(policy)
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    trainer = trainer_of(
        trl.KTOTrainer, trl.KTOConfig, tmp_path, FEEDBACK, policy, reference, loss_type=name, beta=0.05, **weights
    )
    batch = batch_of(trainer)

    def log_ratios(prefix: str) -> Tensor:
        names = (f"{prefix}input_ids", f"{prefix}attention_mask", f"{prefix}completion_mask")
        inputs = [batch[field] for field in names]
        return sequences_of(ours, *inputs).sums - sequences_of(reference, *inputs).sums.detach()

    entry = KTO_LOSSES[name]
    kl = kl_estimate(log_ratios("KL_").sum(), 3) if entry.uses_kl else None
    loss = entry.function(log_ratios(""), batch["label"], kl=kl, beta=0.05, **weights)
    assert loss.shape == (3,)
    assert_agree(ours, loss.mean(), trainer, batch)
    if kl is not None:
        logged: dict[str, float] = {}
        trainer.log(logged)
        assert logged["kl"] == pytest.approx(kl.item(), rel=1e-5)
        assert (kl > 1).item() == (seeds == (2, 1))  # with the others the mean is below 0


@pytest.mark.parametrize("coefficient", [None, 0.3])
@pytest.mark.parametrize("with_margin", [False, True])
def test_the_loss_and_its_gradients_are_those_of_the_reward_trainer(
    with_margin: bool, coefficient: float | None, tmp_path: Path
):
    policy = tiny(1, LlamaForSequenceClassification, num_labels=1)
    ours = copy.deepcopy(policy)
    rows = PAIRS if with_margin else PAIRS.remove_columns("margin")
    trainer = trainer_of(
        trl.RewardTrainer, trl.RewardConfig, tmp_path, rows, policy, center_rewards_coefficient=coefficient
    )
    batch = batch_of(trainer)
    scores = ours(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    margin = batch["margin"].double() if with_margin else torch.zeros(3, dtype=torch.float64)
    assert with_margin == bool(margin.any())
    chosen, rejected = scores.chunk(2)
    loss = reward_loss(chosen, rejected, margin=margin) + (coefficient or 0.0) * centering_penalty(chosen, rejected)
    assert_agree(ours, loss.mean(), trainer, batch)


def test_every_loss_that_both_have_is_compared_above():
    ours_alone = {"kto_pair"}  # TRL took it out
    compared: set[str] = {*DPO_CASES, "simpo", "orpo"}
    assert compared | ours_alone == set(PREFERENCE_LOSSES)
