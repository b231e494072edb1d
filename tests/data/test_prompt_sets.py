"""Prompts of every kind of row, their limits and splits, and what rollouts refuse of the data's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lf_lightning import DataModule, InputError
from tests.data.test_rollouts import BACKBONE

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Well?"}]
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}, {"from": "human", "value": "Well?"}]


def data_of(records: list[dict[str, Any]], source: dict[str, Any] | None = None, **options: Any) -> DataModule:
    given = {"max_length": 128, "seed": 5, "global_batch_size": 4, "cache_dir": None}
    return DataModule(BACKBONE, "ppo", datasets=[{"records": records, **(source or {})}], **{**given, **options})


def asked(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


WELL = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n" + asked("Well?")
RANKED = {"ranking": True, "columns": {"prompt": "instruction", "chosen": "good", "rejected": "bad"}}
LIKED = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "liked"}}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {  # row, entry, prompt, reference
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Ho"}, {}, asked("Hi"), "Ho"),
    "alpaca without answer": ({"instruction": "Hi"}, {}, asked("Hi"), ""),
    "openai": ({"messages": [*CHAT, {"role": "assistant", "content": "So"}]}, {"formatting": "openai"}, WELL, "So"),
    "openai without answer": ({"messages": CHAT}, {"formatting": "openai"}, WELL, ""),
    "sharegpt": ({"conversations": [*TURNS, {"from": "gpt", "value": "So"}]}, {"formatting": "sharegpt"}, WELL, "So"),
    "sharegpt without answer": ({"conversations": TURNS}, {"formatting": "sharegpt"}, WELL, ""),
    "ranked": ({"instruction": "Hi", "good": "Ho", "bad": "No"}, RANKED, asked("Hi"), "Ho"),
    "liked": ({"instruction": "Hi", "output": "Ho", "liked": False}, LIKED, asked("Hi"), "Ho"),
}


@pytest.mark.parametrize("name", KINDS)
def test_any_row_gives_its_prompt_and_its_answer_as_reference(name: str):
    record, source, prompt, reference = KINDS[name]
    (found,) = data_of([record], source).prompts("train")
    assert (found.text, found.reference) == (prompt, reference)


def test_plain_texts_are_refused():
    source = {"formatting": "text", "columns": {"text": "text"}}
    with pytest.raises(InputError, match=r"holds plain texts \(formatting: text\), ppo wants prompts\."):
        data_of([{"text": "Once"}], source).prompts("train")


def records(number: int) -> list[dict[str, Any]]:
    return [{"instruction": "a" * i, "output": "b"} for i in range(1, number + 1)]


def test_a_prompt_leaves_the_rest_of_max_length_to_its_response():
    data = data_of(records(3))
    lengths = [len(prompt.ids) for prompt in data.prompts("train")]
    assert lengths == [lengths[0], lengths[0] + 1, lengths[0] + 2]
    (batch,) = list(data.prompt_loader("train", batch_size=8))
    assert batch.limits == tuple(128 - length for length in reversed(lengths))  # longest first


def test_a_prompt_one_short_of_the_limit_may_be_answered_by_one_token():
    longest = len(data_of(records(3)).prompts("train")[-1].ids)
    (batch,) = list(data_of(records(3), max_length=longest + 1).prompt_loader("train", batch_size=8))
    assert batch.limits == (1, 2, 3)


def test_a_prompt_at_the_limit_is_refused_by_its_row_or_dropped_and_counted(capsys: pytest.CaptureFixture[str]):
    longest = len(data_of(records(3)).prompts("train")[-1].ids)
    says = rf"row 3: the prompt has {longest} tokens and leaves no room in data\.max_length {longest}"
    with pytest.raises(InputError, match=says):
        data_of(records(3), max_length=longest).prompts("train")
    kept = data_of(records(3), max_length=longest, invalid_rows="skip").prompts("train")
    assert [prompt.row for prompt in kept] == [1, 2]
    assert "1 of 3 prompts dropped (row 3: the prompt has" in capsys.readouterr().err


def test_other_tasks_answer_up_to_their_generation_spec():
    data = DataModule(BACKBONE, "sft", datasets=[{"records": records(2)}], max_length=64, seed=1, cache_dir=None)
    (batch,) = list(data.prompt_loader("train", batch_size=8))
    assert batch.limits == ()


def test_an_empty_set_is_refused():
    with pytest.raises(InputError, match="the train set must hold prompts, got none"):
        data_of(records(2), max_length=5, invalid_rows="skip").prompts("train")


@pytest.mark.parametrize("val_size", [3, 0.25])
def test_a_share_of_the_prompts_validates_and_does_not_train(val_size: float):
    data = data_of(records(12), val_size=val_size)
    train, val = ([prompt.row for prompt in data.prompts(split)] for split in ("train", "val"))  # type: ignore[arg-type]
    assert len(val) == 3
    assert sorted(train + val) == list(range(1, 13))
    again = data_of(records(12), val_size=val_size)
    assert [prompt.row for prompt in again.prompts("val")] == val
    assert data.prompts("predict") == data.prompts("val")
    assert data.sets.lines("train") == ["records: 12 prompts (longest 31 tokens)"]


def test_a_split_that_leaves_one_side_empty_is_refused():
    with pytest.raises(InputError, match=r"data\.val_size: must leave rows on both sides, got 2 of 2 rows\."):
        data_of(records(2), val_size=2).prompts("train")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rollout_size": 0}, r"data\.rollout_size: must be at least 1, got 0\."),
        ({"rollout_size": 3}, r"data\.rollout_size: must be at least data\.global_batch_size, 4, got 3\."),
        ({"packing": "knapsack"}, r"data\.packing: must be none for ppo, which learns its own responses alone"),
        ({"train_on_prompt": True}, r"data\.train_on_prompt: must be false for ppo"),
        ({"mask_history": True}, r"data\.mask_history: must be false for ppo"),
        ({"history": "whole"}, r"data\.history: must be per_turn for ppo"),
        ({"share_prompt": True}, r"data\.share_prompt: is of rm, dpo and kto only, got true with ppo\."),
        ({"kl_pairs": "dataset"}, r"data\.kl_pairs: is of kto only"),
        ({"isolate_documents": True}, r"data\.isolate_documents: asks about packs"),
        ({"num_workers": 2}, r"data\.num_workers: prompts are encoded in this process with ppo, got 2\."),
        ({"eval_micro_batch_size": 2}, r"data\.eval_micro_batch_size: validation answers model\.init_args\.generation"),
        ({"eval_micro_batch_tokens": 64}, r"data\.eval_micro_batch_tokens: validation answers"),
    ],
)
def test_an_option_that_rollouts_would_not_read_is_refused(options: dict[str, Any], says: str):
    with pytest.raises(InputError, match=rf"^{says}") as caught:
        data_of(records(2), **options)
    assert "\n" not in str(caught.value)


def test_a_rollout_is_of_ppo_and_grpo_only(tmp_path: Path):
    with pytest.raises(InputError, match=r"data\.rollout_size: is of ppo and grpo only, got 8 with sft\."):
        DataModule(BACKBONE, "sft", datasets=[{"records": records(2)}], rollout_size=8)
