"""Answers: greedy, drawn, limited and stopped, whatever stands beside them in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lf_lightning import BackboneSpec, InputError
from lf_lightning.models import Backbone, Full, GenerationSpec, LoRA, SamplingSpec, TransformersEngine, load_backbone
from lf_lightning.models.sampling import RowSampler
from lf_lightning.types import PromptBatch, TrainingStopped

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    },
}
WORDS, STOP = 40, 39
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (3, 3)]
DRAWN = SamplingSpec(max_new_tokens=6, temperature=1.0, top_p=1.0, top_k=0)
GREEDY = GenerationSpec(max_new_tokens=6)


def build(family: str = "llama", tuning: Any = Full(), **options: Any) -> Backbone:
    layers = {} if family == "gpt2" else {"num_hidden_layers": 2}
    shape = {**FAMILIES[family], **layers, "vocab_size": WORDS, "initializer_range": 0.5}
    spec = BackboneSpec(architecture=shape, tokenizer="bytes", **options)
    return load_backbone(spec, tuning, vocab_size=WORDS, seed=3)


def batch_of(prompts: Sequence[tuple[int, ...]], limits: tuple[int, ...] = (), *, pad: int = 0) -> PromptBatch:
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    texts = ("",) * len(prompts)
    return PromptBatch(ids, mask, tuple(range(len(prompts))), texts, texts, limits)


def answers(backbone: Backbone, batch: PromptBatch, spec: GenerationSpec = GREEDY, **options: Any) -> list[list[int]]:
    return TransformersEngine().generate(backbone, batch, spec, **{"stop_token_ids": [STOP], **options})


@torch.no_grad()
def by_hand(backbone: Backbone, prompt: tuple[int, ...], *, most: int, stops: Sequence[int] = (STOP,)) -> list[int]:
    """The likeliest word each time, from full logits without a cache."""
    model, found = backbone.causal_lm.eval(), list[int]()
    while len(found) < most and not (found and found[-1] in stops):
        logits = model(input_ids=torch.tensor([[*prompt, *found]]), use_cache=False).logits
        found.append(int(logits[0, -1].argmax()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_greedy_answers_are_those_of_full_logits_without_a_cache(family: str, layout: Any):
    backbone = build(family)
    want = [by_hand(backbone, prompt, most=6) for prompt in PROMPTS]
    backbone.set_layout(layout)
    assert answers(backbone, batch_of(PROMPTS)) == want


def test_a_pad_word_that_stands_in_a_prompt_and_ends_answers_changes_nothing():
    backbone, prompts = build(), [(5, STOP, 7), (8,), (STOP, 9, 10, 11)]
    want = [by_hand(backbone, prompt, most=6) for prompt in prompts]
    assert answers(backbone, batch_of(prompts, pad=STOP)) == want


def test_an_answer_ends_with_the_first_of_several_stop_words():
    backbone = build()
    free = by_hand(backbone, PROMPTS[0], most=6, stops=())
    stops = [free[3], free[2]]
    assert answers(backbone, batch_of(PROMPTS[:2]), stop_token_ids=stops)[0] == free[: free.index(free[2]) + 1]
    first = by_hand(backbone, PROMPTS[1], most=1, stops=())
    assert answers(backbone, batch_of(PROMPTS[:2]), stop_token_ids=first)[1] == first


def test_limits_end_each_answer_alone():
    backbone = build()
    whole = answers(backbone, batch_of(PROMPTS), GenerationSpec(max_new_tokens=9), stop_token_ids=[WORDS - 1])
    limits = (1, 9, 3, 20)
    found = answers(backbone, batch_of(PROMPTS, limits), GenerationSpec(max_new_tokens=9))
    assert found == [answer[:limit] for answer, limit in zip(whole, limits, strict=True)]
    assert len(found[0]) == 1


def test_drawn_answers_do_not_depend_on_their_company():
    backbone, seeds = build(), [101, 102, 103, 104]
    together = answers(backbone, batch_of(PROMPTS), DRAWN, seeds=seeds)
    alone = [
        answers(backbone, batch_of([prompt]), DRAWN, seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert together == alone
    turned = answers(backbone, batch_of(PROMPTS[::-1], (1, 9, 9, 9)), DRAWN, seeds=seeds[::-1])
    assert turned[1:] == alone[::-1][1:]
    assert answers(backbone, batch_of(PROMPTS), DRAWN, seeds=[seed + 7 for seed in seeds]) != together


@torch.no_grad()
def drawn_by_hand(backbone: Backbone, prompt: tuple[int, ...], spec: SamplingSpec, seed: int) -> list[int]:
    """The words that a sampler of its own takes, from full logits without a cache."""
    model, found = backbone.causal_lm.eval(), list[int]()
    sampler = RowSampler(spec.temperature, spec.top_p, spec.top_k, [seed])
    while len(found) < spec.max_new_tokens and STOP not in found:
        ids = torch.tensor([[*prompt, *found]])
        found.append(int(sampler(ids, model(input_ids=ids, use_cache=False).logits[:, -1]).argmax()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cut", [(1.0, 1.0, 0), (0.7, 0.9, 10)], ids=["exact", "cut"])
def test_drawn_answers_are_those_of_full_logits_without_a_cache(family: str, cut: tuple[float, float, int]):
    backbone, seeds = build(family), [101, 102, 103, 104]
    spec = SamplingSpec(max_new_tokens=6, temperature=cut[0], top_p=cut[1], top_k=cut[2])
    want = [drawn_by_hand(backbone, prompt, spec, seed) for prompt, seed in zip(PROMPTS, seeds, strict=True)]
    assert answers(backbone, batch_of(PROMPTS, pad=STOP), spec, seeds=seeds) == want
    assert want != [by_hand(backbone, prompt, most=6) for prompt in PROMPTS]


def test_seeds_leave_the_global_random_state_and_greedy_answers_alone():
    backbone = build()
    before = torch.random.get_rng_state()
    answers(backbone, batch_of(PROMPTS), DRAWN, seeds=[1, 2, 3, 4])
    assert torch.equal(torch.random.get_rng_state(), before)
    greedy = SamplingSpec(max_new_tokens=6, do_sample=False)
    assert answers(backbone, batch_of(PROMPTS), greedy, seeds=[1, 2, 3, 4]) == answers(backbone, batch_of(PROMPTS))


def test_prompts_that_are_alike_are_answered_from_their_own_seeds():
    backbone = build()
    found = answers(backbone, batch_of([PROMPTS[0]] * 3), DRAWN, seeds=[5, 6, 5])
    assert found[0] == found[2] != found[1]


def test_one_new_word_is_the_first_of_many():
    backbone = build()
    many = answers(backbone, batch_of(PROMPTS))
    assert answers(backbone, batch_of(PROMPTS), GenerationSpec(max_new_tokens=1)) == [each[:1] for each in many]
    seeds = [1, 2, 3, 4]
    drawn = answers(backbone, batch_of(PROMPTS), DRAWN, seeds=seeds)
    limited = answers(backbone, batch_of(PROMPTS, (1, 1, 1, 1)), DRAWN, seeds=seeds)
    assert limited == [each[:1] for each in drawn]


def test_a_limit_of_one_beside_nine_and_a_stop_word_leave_each_answer_its_own_end():
    backbone = build()
    free = [by_hand(backbone, prompt, most=9, stops=()) for prompt in PROMPTS]
    stop = free[2][4]
    limits = (1, 9, 9, 2)
    want = [by_hand(backbone, prompt, most=most, stops=[stop]) for prompt, most in zip(PROMPTS, limits, strict=True)]
    assert len(want[0]) == 1
    assert want[2][-1] == stop
    found = answers(backbone, batch_of(PROMPTS, limits), GenerationSpec(max_new_tokens=9), stop_token_ids=[stop])
    assert found == want


def test_without_seeds_the_global_random_state_decides():
    backbone, found = build(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(answers(backbone, batch_of(PROMPTS), DRAWN))
    assert found[0] == found[1] != found[2]


def test_top_k_1_is_greedy():
    backbone, spec = build(), SamplingSpec(max_new_tokens=6, top_p=1.0, top_k=1)
    assert answers(backbone, batch_of(PROMPTS), spec, seeds=[1, 2, 3, 4]) == answers(backbone, batch_of(PROMPTS))


def test_options_that_lie_in_the_models_folder_are_not_read_and_stay():
    backbone: Any = build()
    want = answers(backbone, batch_of(PROMPTS))
    stored = GenerationConfig(
        suppress_tokens=sorted({token for answer in want for token in answer}),
        repetition_penalty=5.0,
        min_new_tokens=5,
        do_sample=True,
        top_k=2,
    )
    backbone.causal_lm.generation_config = stored
    assert answers(backbone, batch_of(PROMPTS)) == want
    assert answers(backbone, batch_of(PROMPTS), DRAWN, seeds=[1, 2, 3, 4])
    assert backbone.causal_lm.generation_config is stored


@pytest.mark.parametrize("name", ["repetition_penalty", "min_new_tokens", "suppress_tokens"])
def test_no_single_option_of_the_models_folder_changes_an_answer(name: str):
    backbone: Any = build()
    free = by_hand(backbone, PROMPTS[0], most=6, stops=())
    prompt = (*PROMPTS[0], *free[:4])
    assert free[4] in prompt, "a penalty on old words must have one to act on"
    stop = by_hand(backbone, prompt, most=2, stops=())[1]
    want = answers(backbone, batch_of([prompt, PROMPTS[1]]), stop_token_ids=[stop])
    values = {"repetition_penalty": 50.0, "min_new_tokens": len(want[0]) + 1, "suppress_tokens": want[0]}
    backbone.causal_lm.generation_config = GenerationConfig(**{name: values[name]})
    with torch.no_grad():
        ids = torch.tensor([prompt])
        bare = backbone.causal_lm.eval().generate(ids, eos_token_id=stop, pad_token_id=0, max_new_tokens=6)
    assert bare[0, len(prompt) :].tolist() != want[0], "the option acts where it is read"
    assert answers(backbone, batch_of([prompt, PROMPTS[1]]), stop_token_ids=[stop]) == want
    assert getattr(backbone.causal_lm.generation_config, name) == values[name]


def test_logits_that_are_no_numbers_stop_and_leave_mode_layout_and_options_as_they_were():
    backbone: Any = build()
    backbone.set_layout("padding_free")
    backbone.causal_lm.generation_config = stored = GenerationConfig(top_k=3)
    with torch.no_grad():
        backbone.causal_lm.lm_head.weight[7] = torch.nan
    with pytest.raises(TrainingStopped, match=r"^generation: the policy's logits must be finite"):
        answers(backbone, batch_of(PROMPTS), DRAWN, seeds=[1, 2, 3, 4])
    assert backbone.training
    assert backbone.is_padding_free
    assert backbone.causal_lm.generation_config is stored


@pytest.mark.parametrize("layout", ["padded", "padding_free"])
@pytest.mark.parametrize("trains", [True, False])
def test_mode_and_layout_are_put_back_also_after_an_error(layout: Any, trains: bool):
    backbone = build()
    backbone.set_layout(layout)
    backbone.train(trains)
    answers(backbone, batch_of(PROMPTS))
    assert (backbone.training, backbone.is_padding_free) == (trains, layout == "padding_free")
    broken = batch_of(PROMPTS)._replace(input_ids=torch.full((4, 6), WORDS + 5))
    with pytest.raises(IndexError):
        answers(backbone, broken)
    assert (backbone.training, backbone.is_padding_free) == (trains, layout == "padding_free")
    assert {module.training for module in backbone.modules()} == {trains}


def test_gradient_checkpointing_and_an_adapter_change_no_answer():
    want = answers(build(), batch_of(PROMPTS))
    assert answers(build(gradient_checkpointing=True), batch_of(PROMPTS)) == want


def test_gradient_checkpointing_is_still_on_after_an_answer():
    backbone: Any = build(gradient_checkpointing=True)
    answers(backbone, batch_of(PROMPTS))
    assert backbone.training
    runs: list[int] = []
    backbone.causal_lm.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: runs.append(1))
    backbone.causal_lm(input_ids=torch.tensor([PROMPTS[0]]), use_cache=False).logits.sum().backward()
    assert len(runs) == 2, "once in the forward pass, once more in the backward pass"


def test_an_adapter_acts_when_it_answers(tmp_path: Any):
    build().causal_lm.save_pretrained(tmp_path)
    spec = BackboneSpec(path=str(tmp_path), tokenizer="bytes")
    backbone = load_backbone(spec, LoRA(rank=2), vocab_size=WORDS, seed=3)
    before = answers(backbone, batch_of(PROMPTS))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    assert answers(backbone, batch_of(PROMPTS)) != before


@pytest.mark.parametrize(("name", "wrong"), [("num_beams", 2), ("repetition_penalty", 1.5)])
def test_a_rollout_knows_no_choice_that_a_log_prob_does_not_describe(name: str, wrong: float):
    with pytest.raises(InputError, match=rf"^model\.init_args\.generation\.{name}: must be 1 for rollouts"):
        SamplingSpec(**{name: wrong})  # type: ignore[arg-type]


def test_a_spec_says_whether_it_draws_from_what_is_trained():
    assert DRAWN.is_exact
    assert SamplingSpec(temperature=0.5, top_p=1.0, top_k=0).is_exact
    for cut in (SamplingSpec(), SamplingSpec(top_p=1.0), SamplingSpec(top_k=0), SamplingSpec(do_sample=False)):
        assert not cut.is_exact
    assert SamplingSpec(temperature=0.5).train_temperature == 0.5
    assert SamplingSpec(temperature=0.5, do_sample=False).train_temperature == 1.0
