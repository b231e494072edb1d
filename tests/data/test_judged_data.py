"""The DataModule on judged answers: partners, steps, stored reference log-probs, predict, and the real demo sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lf_lightning import BackboneSpec, DataModule
from lf_lightning.types import FeedbackBatch, InputError, Isolation, PreferenceBatch, PromptBatch, StepBatch, Task

SPEC = BackboneSpec(architecture={"model_type": "llama"}, tokenizer="bytes")
ALL = Isolation(padded=True, padding_free=True, branches=True)


def pairs(count: int) -> dict[str, Any]:
    records = [{"q": "a" * number, "c": "b" * number, "r": "c"} for number in range(1, count + 1)]
    return {"records": records, "ranking": True, "columns": {"prompt": "q", "chosen": "c", "rejected": "r"}}


def tags(count: int) -> dict[str, Any]:
    records = [{"q": "a" * number, "a": "b", "good": number % 3 == 0} for number in range(1, count + 1)]
    return {"records": records, "columns": {"prompt": "q", "response": "a", "kto_tag": "good"}}


def data(task: Task, dataset: dict[str, Any], **options: Any) -> DataModule:
    given = {"template": "empty", "cache_dir": None, "global_batch_size": 4, "shuffle": False, **options}
    return DataModule(SPEC, task, datasets=[dataset], **given)


def partners(module: DataModule, split: Any = "train", epoch: int = 0) -> list[tuple[int, int | None]]:
    return [(unit.spans[0].document, unit.partner) for unit in module.units(split, epoch)]


def flat(batches: Any) -> list[Any]:
    return [micro_batch for step in batches for micro_batch in step.micro_batches]


def test_partners_are_of_the_same_step_and_a_last_step_of_one_unit_has_none() -> None:
    assert partners(data("kto", tags(5))) == [(0, 1), (1, 2), (2, 3), (3, 0), (4, None)]


def test_partners_follow_the_order_of_each_epoch() -> None:
    module = data("kto", tags(8), shuffle=True, seed=3)
    first, second = (partners(module, epoch=epoch) for epoch in (0, 1))
    assert dict(first) != dict(second)
    for epoch in (first, second):
        order = [document for document, _ in epoch]
        assert [partner for _, partner in epoch] == [*order[1:4], order[0], *order[5:], order[4]]


def test_fixed_partners_are_the_rows_before_in_every_epoch() -> None:
    module = data("kto", tags(5), shuffle=True, seed=3, kl_pairs="dataset")
    expected = {0: 4, 1: 0, 2: 1, 3: 2, 4: 3}
    assert dict(partners(module)) == dict(partners(module, epoch=1)) == expected


def test_validation_rows_take_the_next_of_their_set_whatever_the_step_is() -> None:
    module = data("kto", tags(8), val_size=5, seed=0, global_batch_size=2)
    order = [document for document, _ in partners(module, "val")]
    assert len(order) == 5
    assert partners(module, "val") == list(zip(order, [*order[1:], order[0]], strict=True))
    assert not set(order) & {document for document, _ in partners(module)}


def test_pairs_and_conversations_have_no_partner() -> None:
    assert {unit.partner for unit in data("dpo", pairs(5)).units("train")} == {None}


@pytest.mark.parametrize("task", ["rm", "dpo"])
def test_steps_of_pairs_hold_every_pair_once(task: Task) -> None:
    module = data(task, pairs(10), micro_batch_size=3)
    steps = list(module.train_dataloader())
    assert [sum(batch.num_units for batch in step.micro_batches) for step in steps] == [4, 4, 2]
    assert all(isinstance(batch, PreferenceBatch) for batch in flat(steps))
    rows = [sorted(row for batch in step.micro_batches for row in batch.rows.tolist()) for step in steps]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_token_budget_counts_what_the_layout_takes() -> None:
    # the longest pair: prompt 10, answers 11 and 2 tokens; padded 2 x 21, side by side 33, over one prompt 24
    module = data("dpo", pairs(10), micro_batch_tokens=42, global_batch_size=10)
    (step,) = module.train_dataloader()
    assert step.micro_batches[0].tokens.input_ids.numel() == 42
    assert all(batch.tokens.input_ids.numel() <= 42 for batch in step.micro_batches)
    module.resolve_layout(ALL._replace(branches=False))
    (free,) = module.train_dataloader()
    assert (module.layout, module.share_prompt) == ("padding_free", False)
    module.resolve_layout(ALL)
    (shared,) = module.train_dataloader()
    assert (module.layout, module.share_prompt) == ("padding_free", True)
    assert len(step.micro_batches) > len(free.micro_batches) > len(shared.micro_batches)
    for batches in (free, shared):
        assert all(batch.num_tokens <= 42 for batch in batches.micro_batches)


def test_the_probe_and_the_option_decide_whether_prompts_are_shared() -> None:
    module = data("dpo", pairs(2), share_prompt=False)
    assert (module.resolve_layout(ALL), module.share_prompt) == ("padding_free", False)
    module = data("kto", tags(2), layout="padded")
    assert (module.resolve_layout(ALL), module.share_prompt) == ("padded", False)
    module = data("rm", pairs(2), share_prompt=True)
    assert not module.share_prompt
    assert (module.resolve_layout(ALL), module.share_prompt) == ("padding_free", True)
    for verdict in (ALL._replace(branches=False), ALL._replace(padding_free=False)):
        with pytest.raises(InputError, match=r"data\.share_prompt: true needs a model whose responses"):
            data("rm", pairs(2), share_prompt=True).resolve_layout(verdict)
    conversations = data("sft", {"records": [{"instruction": "a", "output": "b"}]})
    assert (conversations.resolve_layout(ALL), conversations.share_prompt) == ("padding_free", False)


def test_reference_batches_hold_every_unit_with_its_partner_and_nothing_stored() -> None:
    module = data("kto", tags(9), shuffle=True, seed=1, eval_micro_batch_size=4)
    module.stored_reference["train", 1] = np.zeros((9, 2))
    loader = module.reference_batches("train", 1)
    batches = flat(loader)
    assert len(loader) == len(batches) == 3
    assert all(isinstance(batch, FeedbackBatch) and batch.reference is None for batch in batches)
    assert sorted(row for batch in batches for row in batch.rows.tolist()) == list(range(9))
    alone = {document for document, partner in partners(module, epoch=1) if partner is None}
    assert {
        int(row) for batch in batches for row, has in zip(batch.rows, batch.has_partner, strict=True) if not has
    } == alone
    assert len(alone) == 1


def test_stored_reference_log_probs_of_pairs_serve_every_epoch_and_each_split_its_own() -> None:
    module = data("dpo", pairs(6), val_size=2, seed=0, shuffle=True)
    table = np.arange(24.0).reshape(6, 2, 2)
    module.stored_reference[module.reference_key("train", 7)] = table
    loader = module.train_dataloader()
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in flat(loader):
            assert batch.reference.tolist() == table[batch.rows].tolist()
    (val,) = flat(module.val_dataloader())
    assert val.reference is None
    module.stored_reference[module.reference_key("val")] = table + 100
    (val,) = flat(module.val_dataloader())
    assert val.reference.tolist() == (table + 100)[val.rows].tolist()


def test_stored_reference_log_probs_of_feedback_belong_to_their_epoch() -> None:
    module = data("kto", tags(8), shuffle=True)
    assert module.reference_key("train", 2) == ("train", 2)
    assert module.reference_key("val", 2) == ("val", 0)
    assert data("kto", tags(8), kl_pairs="dataset").reference_key("train", 2) == ("train", 0)
    module.stored_reference["train", 1] = np.arange(16.0).reshape(8, 2)
    loader = module.train_dataloader()
    assert all(batch.reference is None for batch in flat(loader))
    loader.set_epoch(1)
    for batch in flat(loader):
        assert batch.reference[:, 0].tolist() == (2 * batch.rows).tolist()


def test_a_loader_whose_length_was_asked_for_follows_what_is_settled_later() -> None:
    module = data("dpo", pairs(6), val_size=2, seed=0)
    loaders = [module.val_dataloader(), module.reference_batches("val"), module.train_dataloader()]
    assert [len(loader) for loader in loaders] == [1, 1, 1]  # type: ignore[arg-type]  # there is a validation set
    module.resolve_layout(ALL)
    module.stored_reference["val", 0] = np.zeros((6, 2, 2))
    (val,), (computed,), (train,) = map(flat, loaders)
    for batch in (val, computed, train):
        assert batch.tokens.documents is not None
        assert any(document.branches for document in batch.tokens.documents)
    assert (val.reference is None, computed.reference, train.reference) == (False, None, None)


def test_liked_rows_are_counted_in_each_set() -> None:
    assert data("kto", tags(8)).num_desirable("train") == (2, 6)
    module = data("kto", tags(8), val_size=3, seed=0)
    train, val = module.num_desirable("train"), module.num_desirable("val")
    assert (sum(train), sum(val), train[0] + val[0]) == (5, 3, 2)


def test_predict_scores_the_pairs_of_rm(capsys: pytest.CaptureFixture[str]) -> None:
    twice = [pairs(3)["records"][0], {"q": "a", "c": "b", "r": "b"}, pairs(3)["records"][2]]
    module = data("rm", pairs(6), val_size=2, predict_datasets=[{**pairs(3), "records": twice}], invalid_rows="skip")
    module.setup("predict")
    line = "records: 3 rows, 2 kept, 0 cut, 1 dropped (row 2: columns 'c' and 'r' are equal)"
    assert capsys.readouterr().err.splitlines() == [line]
    (step,) = module.predict_dataloader()
    assert isinstance(step, StepBatch)
    assert sorted(step.micro_batches[0].rows.tolist()) == [0, 1]
    validation = data("rm", pairs(6), val_size=2, seed=0)
    (batch,) = flat(validation.predict_dataloader())
    assert sorted(batch.rows.tolist()) == validation.sets["val"].documents.tolist()
    with pytest.raises(InputError, match=r"data\.predict_datasets: must name at least one dataset"):
        data("rm", pairs(6)).setup("predict")


@pytest.mark.parametrize(("task", "dataset", "answer"), [("dpo", pairs(2), "bb"), ("kto", tags(2), "b")])
def test_predict_answers_the_prompts_of_judged_rows_and_of_conversations(
    task: Task, dataset: dict[str, Any], answer: str
) -> None:
    plain = {"records": [{"instruction": "zzz", "output": "y"}], "name": "plain"}
    module = data(task, dataset, predict_datasets=[dataset, plain])
    (batch,) = module.predict_dataloader()
    assert isinstance(batch, PromptBatch)
    assert dict(zip(batch.prompts, batch.references, strict=True)) == {"a": "b", "aa": answer, "zzz": "y"}


def test_errors_of_inline_records_name_the_row() -> None:
    dataset = pairs(3)
    dataset["records"][2]["r"] = dataset["records"][2]["c"]
    with pytest.raises(InputError) as error:
        data("dpo", dataset).units("train")
    assert str(error.value) == (
        "records, row 3: columns 'c' and 'r' are equal. Fix the row, or set data.invalid_rows: skip."
    )


def test_a_tag_of_a_csv_file_is_refused_with_its_row(tmp_path: Path) -> None:
    (tmp_path / "tags.csv").write_text("q,a,good\nx,y,true\n")
    dataset = {"path": str(tmp_path / "tags.csv"), "columns": tags(1)["columns"]}
    with pytest.raises(InputError) as error:
        data("kto", dataset).units("train")
    assert str(error.value).startswith(
        "tags.csv, row 1: column 'good' must be true or false without quotes, got 'true'. Fix the row"
    )


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_facts_come_back_from_the_cache(task: Task, tmp_path: Path) -> None:
    dataset = pairs(5) if task == "dpo" else tags(5)
    fresh = data(task, dataset).sets["train"].store
    kept = data(task, dataset, cache_dir=str(tmp_path)).sets["train"].store
    again = data(task, dataset, cache_dir=str(tmp_path)).sets["train"].store
    assert fresh.facts
    assert list(fresh.facts) == list(data(task, dataset).sets["train"].store.facts)
    for store in (kept, again):
        assert isinstance(store.input_ids, np.memmap)
        assert sorted(store.facts) == sorted(fresh.facts)
        for name, values in fresh.facts.items():
            assert np.array_equal(store.facts[name], values)
            assert store.facts[name].dtype == values.dtype
            assert len(values) == 5


def test_other_records_are_other_content(tmp_path: Path) -> None:
    for dataset in (pairs(3), pairs(4), pairs(4)):
        data("dpo", dataset, cache_dir=str(tmp_path)).units("train")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("task", ["pt", "sft"])
def test_other_tasks_keep_no_facts(task: Task) -> None:
    record = {"text": "ab"} if task == "pt" else {"instruction": "ab", "output": "c"}
    dataset = {"records": [record], **({"formatting": "text"} if task == "pt" else {})}
    assert data(task, dataset).sets["train"].store.facts == {}


@pytest.mark.parametrize("template", ["auto", "qwen"])
@pytest.mark.parametrize(("task", "name"), [("rm", "dpo_en_demo"), ("dpo", "dpo_en_demo"), ("kto", "kto_en_demo")])
def test_the_demo_sets_are_kept_whole(task: Task, name: str, template: str, shared: Path) -> None:
    spec = BackboneSpec(path=str(shared / "parity" / "model"))
    options: dict[str, Any] = {"max_length": 512, "global_batch_size": 8, "cache_dir": None, "micro_batch_tokens": 4096}
    module = DataModule(spec, task, datasets=[name], dataset_dir=str(shared / "data"), template=template, **options)
    module.resolve_layout(ALL)
    assert module.sets.lines("train")[0].startswith(f"{name}: 300 rows, 300 kept, ")
    batches = flat(module.train_dataloader())
    assert sum(batch.num_units for batch in batches) == 300
    for batch in batches:
        tokens = batch.tokens if isinstance(batch, PreferenceBatch) else batch.both
        assert tokens.num_tokens <= 4096
        counts = np.bincount(tokens.sequences.flatten().numpy(), minlength=tokens.num_sequences)[: tokens.num_sequences]
        assert (counts > 0).all()
        assert counts.max() < 512
    if task == "kto":
        labels = [row["label"] for row in json.loads((shared / "data" / "kto_en_demo.json").read_text())]
        assert module.num_desirable("train") == (labels.count(True), labels.count(False)) == (150, 150)


def test_a_fingerprint_is_of_what_the_documents_hold() -> None:
    first, same, longer = (data("dpo", pairs(count)).sets["train"].store.fingerprint for count in (3, 3, 4))
    assert first == same != longer
    other = pairs(3)
    other["records"][2]["r"] = "d"
    assert data("dpo", other).sets["train"].store.fingerprint != first
