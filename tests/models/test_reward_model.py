"""The reward that a model gives: known scores, every kind of folder, padding that changes nothing, and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from lf_lightning import InputError
from lf_lightning.models import Backbone, Full, LoRA, RewardModel, ValueHeadSpec
from lf_lightning.models.export import save_weights
from lf_lightning.models.value_head import export_sequence_classification, save_value_head
from lf_lightning.types import TrainingStopped
from tests.models.reward_folders import (
    LLAMA,
    POLICY,
    ROWS,
    batch_of,
    loaded,
    prepared,
    save_base,
    save_judge,
    with_head,
)

GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 261, "initializer_range": 0.2}
GPT2 |= {"pad_token_id": 2, "eos_token_id": 2, "dtype": "float64"}
BERT = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "tie_word_embeddings")}
BERT |= {"model_type": "bert", "max_position_embeddings": 64}
WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"


def scored(reward: RewardModel, rows: Sequence[Sequence[int]] = ROWS) -> Tensor:
    """Scores with gradients on, which must not reach into the reward model."""
    text = ("",) * len(rows)
    found: Tensor = reward.score(text, text, batch_of(rows))
    assert found.dtype == torch.float64
    assert not found.requires_grad
    return found


def refusal(path: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        prepared(RewardModel(str(path), **options))
    message = str(caught.value)
    assert message.startswith("model.init_args.rewards: RewardModel."), message
    assert "\n" not in message
    return message


def by_hand(decoder: Any, weight: Tensor, bias: Tensor | float, rows: Sequence[Sequence[int]] = ROWS) -> Tensor:
    """weight . hidden + bias at the last token of each row, which is run alone."""
    decoder.eval()
    with torch.no_grad():
        hidden = [decoder(input_ids=torch.tensor([list(row)])).last_hidden_state[0, -1].double() for row in rows]
    return (torch.stack(hidden) @ weight.detach().double().reshape(-1) + bias).detach()


def want_of(backbone: Backbone) -> Tensor:
    head = backbone.value_head.summary
    return by_hand(backbone.causal_lm.base_model, head.weight, head.bias.double())


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.double(), rtol=0, atol=1e-6)
    assert want.unique().numel() == want.numel(), "these rows tell nothing apart"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def classifier(architecture: dict[str, Any], folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**architecture, "num_labels": 1, **options})
    model = AutoModelForSequenceClassification.from_config(config).double().eval()
    model.get_input_embeddings().weight.data[2] = torch.linspace(-1, 1, 16)  # the pad token's, zeros until then
    model.save_pretrained(folder)
    return model


# ---------------------------------------------------------------------- a value head


def test_a_score_is_known_where_the_model_is_an_embedding(tmp_path: Path) -> None:
    backbone = loaded(LLAMA)
    with torch.no_grad():
        for name, parameter in backbone.causal_lm.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()  # blocks add nothing: hidden states are the normed embedding
        embedding = backbone.causal_lm.get_input_embeddings().weight
        embedding[5] = 1.0
        embedding[7] = torch.tensor([1.0, -1.0] * 8)
        embedding[9] = torch.tensor([-3.0] * 16)  # the norm makes it -1
    save_weights(backbone, tmp_path, base=None, writes=True)
    save_file({WEIGHT: torch.arange(16.0)[None], BIAS: torch.tensor([0.5])}, tmp_path / "value_head.safetensors")
    got = scored(prepared(RewardModel(str(tmp_path))), [[9, 7, 5], [5, 7], [5, 5, 5, 9], [5]])
    torch.testing.assert_close(got, torch.tensor([120.5, -7.5, -119.5, 120.5]).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_whole_model_with_a_value_head_scores_the_last_token(tmp_path: Path, form: str, batch_size: int) -> None:
    backbone = with_head(LLAMA)
    save_weights(backbone, tmp_path, base=None, writes=True)
    head = backbone.value_head.summary
    if form == "bin":
        torch.save({WEIGHT: head.weight.data, BIAS: head.bias.data}, tmp_path / "value_head.bin")
    else:
        save_value_head(backbone, tmp_path, writes=True)
    close(scored(prepared(RewardModel(str(tmp_path), batch_size=batch_size))), want_of(backbone))


@pytest.mark.parametrize("named", [True, False], ids=["base from adapter_config.json", "base by option"])
def test_an_adapter_with_a_value_head_is_put_on_its_base(base: Path, tmp_path: Path, named: bool) -> None:
    backbone = with_head(base, LoRA(rank=2))
    save_judge(backbone, tmp_path, base if named else "gone/elsewhere")
    got = scored(prepared(RewardModel(str(tmp_path), base=None if named else str(base))))
    close(got, want_of(backbone))
    head = backbone.value_head.summary
    plain = AutoModelForCausalLM.from_pretrained(base).model
    assert (got - by_hand(plain, head.weight, head.bias)).abs().min() > 1e-3, "the adapter does nothing"


def test_what_our_own_run_saved_for_sequence_classification_scores_the_same(base: Path, tmp_path: Path) -> None:
    for name, tuning in (("whole", Full()), ("adapter", LoRA(rank=2))):
        backbone = with_head(base, tuning, ValueHeadSpec(save_as="sequence_classification"))
        folder = tmp_path / name
        folder.mkdir()
        save_weights(backbone, folder, base=str(base), writes=True)
        export_sequence_classification(backbone, folder, writes=True, ending_ids=(2,), pad_id=0)
        want = by_hand(backbone.causal_lm.base_model, backbone.value_head.summary.weight, 0.0)
        close(scored(prepared(RewardModel(str(folder)))), want)


def test_a_score_is_that_of_evaluation(tmp_path: Path) -> None:
    save_judge(with_head(LLAMA), tmp_path, None)
    random = torch.random.get_rng_state()
    reward = prepared(RewardModel(str(tmp_path)))
    assert torch.equal(scored(reward), scored(reward))
    assert torch.equal(torch.random.get_rng_state(), random), "something was drawn"


@pytest.mark.parametrize(
    "limited",
    [
        {**LLAMA, "max_position_embeddings": 4},
        pytest.param(
            {**GPT2, "n_positions": 4},
        ),
    ],
    ids=["llama", "gpt2"],
)
def test_a_text_beyond_the_models_positions_loses_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limited: dict[str, Any]
) -> None:
    model = classifier(limited, tmp_path)
    reward = prepared(RewardModel(str(tmp_path)))
    rows = [[9, 5, 6, 7, 8], [5, 6, 7, 8], [4, 4, 5, 6, 7, 8, 9]]
    got = scored(reward, rows)
    close(got[1:], by_hand(model.base_model, model.score.weight, 0.0, [[5, 6, 7, 8], [6, 7, 8, 9]]))
    assert got[0].item() == pytest.approx(got[1].item(), abs=1e-6)
    scored(reward, rows)
    assert capsys.readouterr().err.count("reads 4 tokens; longer texts lose their beginning") == 1


# ---------------------------------------------------------------------- any sequence classifier


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_decoder_is_read_at_the_last_token_whatever_the_padding_and_the_other_rows(
    tmp_path: Path, architecture: dict[str, Any]
) -> None:
    model = classifier(architecture, tmp_path)
    want = by_hand(model.base_model, model.score.weight, 0.0)
    reward = prepared(RewardModel(str(tmp_path)))
    close(scored(reward), want)
    for row, score in zip(ROWS, want, strict=True):
        assert scored(reward, [row]).item() == pytest.approx(score.item(), abs=1e-6)
        assert scored(reward, [list(range(50, 90)), row])[1].item() == pytest.approx(score.item(), abs=1e-6)


def test_an_encoder_gives_its_own_logits(tmp_path: Path) -> None:
    model = classifier(BERT, tmp_path)
    with torch.no_grad():
        want = torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in ROWS])
    close(scored(prepared(RewardModel(str(tmp_path)))), want)
    close(scored(prepared(RewardModel(str(tmp_path), batch_size=2))), want)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_weights_have_the_type_that_was_asked_for(tmp_path: Path, dtype: str) -> None:
    model = classifier(LLAMA, tmp_path)
    want = by_hand(model.base_model, model.score.weight, 0.0)
    error = (scored(prepared(RewardModel(str(tmp_path), dtype=dtype))) - want).abs().max()
    assert error < 1e-4
    assert (error > 1e-9).item() is (dtype == "float32")


@pytest.mark.parametrize("kind", ["classifier", "value head"])
def test_the_precision_of_the_trainer_changes_no_score(tmp_path: Path, kind: str) -> None:
    if kind == "classifier":
        classifier(LLAMA, tmp_path)
    else:
        save_judge(with_head(LLAMA), tmp_path, None)
    reward = prepared(RewardModel(str(tmp_path), dtype="float32"))
    plain = scored(reward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scored(reward), plain)


def test_close_scores_of_a_classifier_in_bfloat16_stay_apart(tmp_path: Path) -> None:
    classifier(LLAMA, tmp_path)
    found = scored(prepared(RewardModel(str(tmp_path), dtype="bfloat16")))
    assert (found.to(torch.bfloat16).double() != found).any()


# ---------------------------------------------------------------------- tokenizers


def word_tokenizer(*, bos: bool) -> PreTrainedTokenizerBase:
    """Reads words of letters apart by blanks; ids are not those of the policy."""
    words = ["<unk>", "<s>", "one", "two", "three", "<|im_end|>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_a_text_is_encoded_again_for_another_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bos: bool
) -> None:
    model = classifier({**LLAMA, "vocab_size": 6}, tmp_path)
    word_tokenizer(bos=bos).save_pretrained(tmp_path)
    texts = ["one two <|im_end|>", "three", "two two four one", "<s> three one"]
    start = [1] if bos else []
    words = [[*start, 2, 3, 5], [*start, 4], [*start, 3, 3, 0, 2], [1, 4, 2]]  # the last begins with <s> itself
    reward = prepared(RewardModel(str(tmp_path)))
    assert "has another tokenizer; texts are decoded and encoded again" in capsys.readouterr().err
    got = scored(reward, [POLICY(text)["input_ids"] for text in texts])
    close(got, by_hand(model.base_model, model.score.weight, 0.0, words))


def test_for_the_same_tokenizer_ids_go_in_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier(LLAMA, tmp_path)
    POLICY.save_pretrained(tmp_path)
    rows = [[*ROWS[0], 3 + 0xFF], [3 + 0xC3, 3 + 0xC3]]  # bytes that are no text, which decoding would replace
    got = scored(prepared(RewardModel(str(tmp_path))), rows)
    close(got, by_hand(model.base_model, model.score.weight, 0.0, rows))
    assert "another tokenizer" not in capsys.readouterr().err


def test_an_embedding_that_is_too_small_for_the_tokenizer_is_refused(tmp_path: Path) -> None:
    classifier({**LLAMA, "vocab_size": 100}, tmp_path)
    assert "must read the 259 words of the policy tokenizer, got 100." in refusal(tmp_path)


def test_a_text_without_tokens_stops_training(tmp_path: Path) -> None:
    classifier(LLAMA, tmp_path)
    with pytest.raises(TrainingStopped, match=r"^model\.init_args\.rewards: must have tokens to score, got an empty"):
        scored(prepared(RewardModel(str(tmp_path))), [[5, 6], []])


# ---------------------------------------------------------------------- refusals


def test_a_classifier_of_two_labels_is_refused(tmp_path: Path) -> None:
    classifier(LLAMA, tmp_path, num_labels=2)
    assert f"path: must have one label, the score, got 2 in {tmp_path}." in refusal(tmp_path)


def test_a_folder_without_a_head_is_refused(base: Path, tmp_path: Path) -> None:
    assert (
        "path: must hold value_head.safetensors or value_head.bin, or a model for sequence classification"
        in refusal(base)
    )
    save_weights(loaded(base, LoRA(rank=2)), tmp_path, base=str(base), writes=True)
    assert f"got {tmp_path}, which holds neither" in refusal(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "gone")
    assert str(tmp_path / "gone") in message


def test_a_base_beside_a_whole_model_is_refused(base: Path, tmp_path: Path) -> None:
    classifier(LLAMA, tmp_path)
    assert "base: belongs to an adapter, got" in refusal(tmp_path, base=str(base))


@pytest.mark.parametrize("where", ["by option", "in the adapter"])
def test_a_base_that_is_not_there_is_refused(base: Path, tmp_path: Path, where: str) -> None:
    backbone = with_head(base, LoRA(rank=2))
    save_judge(backbone, tmp_path, tmp_path / "gone")
    message = refusal(tmp_path, base=str(tmp_path / "lost") if where == "by option" else None)
    assert str(tmp_path / ("lost" if where == "by option" else "gone")) in message


def test_an_adapter_that_names_no_base_or_is_broken_is_refused(base: Path, tmp_path: Path) -> None:
    save_judge(with_head(base, LoRA(rank=2)), tmp_path, base)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    assert "base: must be given where adapter_config.json names no base" in refusal(tmp_path)
    config.write_text("{")
    with pytest.raises(InputError, match=r"adapter_config\.json: must hold JSON, got a broken file"):
        prepared(RewardModel(str(tmp_path)))


def test_a_classifier_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    model = classifier(LLAMA, tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "score.weight"}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert f"path: {tmp_path} lacks the weight score.weight." in refusal(tmp_path)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size: int) -> None:
    with pytest.raises(InputError, match=rf"RewardModel\.batch_size: must be at least 1, got {batch_size}\."):
        RewardModel("judge", batch_size=batch_size)
