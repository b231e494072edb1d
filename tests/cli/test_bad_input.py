"""What is wrong with the input is said in one line that names the culprit, with exit code 2 and no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lf_lightning.__main__ import main
from tests.cli.runs import INIT, ROWS, build_model, config, merged, write

BACKBONE, TUNING, OPTIMIZER = f"{INIT}.backbone", f"{INIT}.tuning", f"{INIT}.optimizer"
PROMPTS = ("--data.predict_datasets", '[{"path": "rows.json"}]')
STEP = "run/checkpoints/step-00000002"


@dataclass(frozen=True)
class Bad:
    """One kind of bad input.

    Args:
        says: What the line must contain: what, where, got, do this.
        changes: Values of the configuration by dotted key; Ellipsis takes the key away.
        arguments: Further arguments.
        verb: The command.
        yaml: The whole text of the configuration instead.
        files: Name of a file -> its text, its bytes, or the value of its JSON.
        prepare: Changes the working folder further; `model` and `run` lie there where `needs` asks for them.
        needs: `model` for a copy of the tiny model; `full_run` or `lora_run` for a copy of that run.
    """

    says: tuple[str, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    verb: str = "fit"
    yaml: str | None = None
    files: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Path], Any] | None = None
    needs: tuple[str, ...] = ()


def lora(**options: Any) -> dict[str, Any]:
    return {"class_path": "LoRA", "init_args": options}


def no_option(path: str, near: str) -> tuple[str, ...]:
    return f"{path}: there is no such option", f"Did you mean {near}?"


def key(path: str, near: str, *, at: str = "") -> Bad:
    return Bad(no_option(path, near), {at or path: 3})


def value(path: str, want: str, got: Any, shown: str = "") -> Bad:
    return Bad((f"{path}: ", f"must be {want}", f"got {shown or got}"), {path: got})


KEYS = {
    "a misspelt group": Bad(
        ("chekpoint", "no such option", "Did you mean checkpoint?"), {"chekpoint.every_n_steps": 2}
    ),
    "a misspelt empty group": Bad(("chekpoint", "no such option", "Did you mean checkpoint?"), {"chekpoint": {}}),
    "a key of the trainer": key("trainer.max_stps", "max_steps"),
    "a key of the checkpoint": key("checkpoint.every_n_step", "every_n_steps"),
    "a key of the data": key("data.max_lenght", "max_length"),
    "a key of the stage": key(f"{INIT}.max_gradnorm", "max_grad_norm"),
    "a key of the backbone": key(f"{BACKBONE}.dtyp", "dtype"),
    "a key of the tuning": Bad(no_option(f"{TUNING}.init_args.rnk", "rank"), {TUNING: lora(rnk=3)}),
    "a key of the optimizer": key(f"{OPTIMIZER}.init_args.lrr", "lr"),
    "a key of the schedule": key(f"{INIT}.schedule.knd", "kind"),
    "a key of the generation": key(f"{INIT}.generation.max_tokens", "max_new_tokens"),
    "a key of a callback": Bad(
        ("trainer.callbacks", "num_row: there is no such option", "Did you mean num_rows?"),
        {"trainer.callbacks": [{"class_path": "AnswersTable", "init_args": {"num_row": 3}}]},
    ),
    "a key of the architecture": Bad(
        (f"{BACKBONE}.architecture", "llama", "hiden_size", "Did you mean hidden_size?"),
        {f"{BACKBONE}.architecture.hiden_size": 3},
    ),
    "an option of another class": Bad(
        (f"{TUNING}.init_args.rank: the class chosen has no such option", "LoRA"), {f"{TUNING}.init_args.rank": 3}
    ),
    "a key beside init_args": Bad(("model.backbone: ", "init_args"), {"model.backbone": {"path": "x"}}),
    "a key beside class_path": Bad(
        (f"{TUNING}: must hold class_path and init_args alone, got options beside them",),
        {TUNING: {"class_path": "LoRA", "rank": 3}},
    ),
    "an abbreviated option": Bad(no_option("trainer.max_step", "max_steps"), arguments=("--trainer.max_step", "3")),
    "an option without dashes": Bad(("data.max_length", "--data.max_length"), arguments=("data.max_length=3",)),
    "a stray word": Bad(("foo: must begin with two dashes",), arguments=("foo",)),
    "a linked option on the command line": Bad(
        ("data.task: ", "is taken from model.class_path"), arguments=("--data.task", "pt")
    ),
    "a linked option in the file": Bad(("data.task: ", "is taken from model.class_path"), {"data.task": "pt"}),
    "a linked group in the file": Bad(("data.backbone", f"is taken from {BACKBONE}"), {"data.backbone": {"path": "x"}}),
}
TYPES = {
    "a text for a whole number": value("data.max_length", "a whole number, got abc", "abc"),
    "a share for a whole number": value("data.global_batch_size", "a whole number", 2.5),
    "a text for a number": value(f"{OPTIMIZER}.init_args.lr", "a number, got fast", "fast"),
    "a text for a number or null": value(f"{INIT}.max_grad_norm", "a number or null", "none"),
    "a word for true or false": value("data.shuffle", "true or false, got maybe", "maybe"),
    "one name for a list": value("data.datasets", "a list", "identity"),
    "one number for a pair": value(f"{OPTIMIZER}.init_args.betas", "a list of 2", [0.9], "[0.9]"),
    "a number for a dataset": Bad(("data.datasets: must be a text or a mapping", "got 3"), {"data.datasets": [3]}),
    "a word that is no choice": Bad(
        (f"{BACKBONE}.dtype: must be one of auto, float32", "got bf16. Did you mean bfloat16?"),
        {f"{BACKBONE}.dtype": "bf16"},
    ),
    "a list for the trainer": Bad(("trainer: must hold options, got []",), {"trainer": []}),
    "a number for the data": Bad(("data: must hold options, got 3",), {"data": 3}),
    "a number for the model": Bad(("model: must be ", "got 3"), {"model": 3}),
    "a number for the tuning": Bad((f"{TUNING}: must be ", "got 3"), {TUNING: 3}),
}
CHOICES = {
    "an unknown stage": Bad(
        ("model.class_path: must name a class, got SFTT. Did you mean SFT?",), {"model.class_path": "SFTT"}
    ),
    "a stage that cannot be imported": Bad(
        ("model.class_path: ", "got mymodule.SFT"), {"model.class_path": "mymodule.SFT"}
    ),
    "a class that is no stage": Bad(
        ("model.class_path: ", "got lf_lightning.LoRA"), {"model.class_path": "lf_lightning.LoRA"}
    ),
    "an unknown tuning": Bad((f"{TUNING}.class_path: ", "got Lora", "LoRA"), {f"{TUNING}.class_path": "Lora"}),
    "an unknown optimizer": Bad(
        (f"{OPTIMIZER}.class_path: ", "got Adam. Did you mean AdamW?"), {f"{OPTIMIZER}.class_path": "Adam"}
    ),
    "an unknown callback": Bad(
        ("trainer.callbacks", "got AnswerTable. Did you mean AnswersTable?"),
        {"trainer.callbacks": [{"class_path": "AnswerTable"}]},
    ),
    "an unknown template": Bad(
        ("data.template: unknown template 'chatlm'. Did you mean 'chatml'?",), {"data.template": "chatlm"}
    ),
    "an unknown strategy": Bad(
        ("trainer.strategy: must be auto, ddp, fsdp2, deepspeed_1, ", "got dpd."), {"trainer.strategy": "dpd"}
    ),
    "an unknown architecture": Bad(
        (f"{BACKBONE}.architecture.model_type: ", "got lama. Try llama."),
        {f"{BACKBONE}.architecture.model_type": "lama"},
    ),
}
FILES = {
    "a missing configuration": Bad(
        ("--config: must be a file, got ", "nowhere.yaml"), arguments=("--config", "nowhere.yaml")
    ),
    "broken YAML": Bad(("--config: must be YAML", "at line 2, column 5"), yaml="model: [SFT\ndata: {}\n"),
    "an empty configuration": Bad(("--config: must hold options, got an empty file or a list",), yaml=""),
    "a configuration that is a list": Bad(
        ("--config: must hold options, got an empty file or a list",), yaml="- model\n- data\n"
    ),
    "no stage": Bad(("model: must say which stage runs, got nothing", "model.class_path"), {"model": ...}),
}
COMBINATIONS = {
    "path and architecture": Bad(
        (f"{BACKBONE}: give either path or architecture, got both",), {f"{BACKBONE}.path": "x"}
    ),
    "neither path nor architecture": Bad(
        (f"{BACKBONE}: give either path or architecture, got neither",), {BACKBONE: ...}
    ),
    "an architecture without a tokenizer": Bad(
        (f"{BACKBONE}.tokenizer: ", "needs a tokenizer, got none", "bytes"), {f"{BACKBONE}.tokenizer": ...}
    ),
    "two rules for micro-batches": Bad(
        ("data.micro_batch_size: excludes data.micro_batch_tokens, got 1 and 64. Remove one.",),
        {"data.micro_batch_size": 1, "data.micro_batch_tokens": 64},
    ),
    "two validation sets": Bad(
        ("data.val_size: excludes data.eval_datasets",),
        {"data.val_size": 2, "data.eval_datasets": [{"path": "rows.json"}]},
    ),
    "two masks": Bad(
        ("data.mask_history: excludes data.train_on_prompt",), {"data.mask_history": True, "data.train_on_prompt": True}
    ),
    "isolation without packs": Bad(
        ("data.isolate_documents: asks about packs", "Remove it"), {"data.isolate_documents": True}
    ),
    "two warm-ups": Bad(
        (f"{INIT}.schedule: warmup_ratio and warmup_steps exclude each other, got both. Remove one.",),
        {f"{INIT}.schedule": {"warmup_ratio": 0.1, "warmup_steps": 3}},
    ),
    "an adapter with a rank of its own": Bad(
        (f"{TUNING}.init_args: an adapter to continue brings its own rank", "Remove them"),
        {TUNING: lora(adapter="a", rank=3)},
    ),
    "LoRA on a scratch model": Bad(
        (f"{BACKBONE}: an adapter needs a base", "got a model from architecture"), {TUNING: lora()}
    ),
    "fused AdamW under 16-mixed": Bad(
        ("fused: must be false with trainer.precision: 16-mixed, got true",),
        {"trainer.precision": "16-mixed", f"{OPTIMIZER}.init_args.fused": True},
    ),
    "accumulated gradients": Bad(
        ("trainer.accumulate_grad_batches: must be 1, got 2", "data.global_batch_size"),
        {"trainer.accumulate_grad_batches": 2},
    ),
    "Lightning's clipping": Bad(
        ("trainer.gradient_clip_val: must be null, got 1.0", "max_grad_norm"), {"trainer.gradient_clip_val": 1.0}
    ),
    "true half precision": Bad(
        ("trainer.precision: must be 32-true, bf16-mixed or 16-mixed, got bf16-true", "backbone.dtype"),
        {"trainer.precision": "bf16-true"},
    ),
    "half precision that scales, without a GPU": Bad(
        ("trainer.precision: 16-mixed needs a GPU, got none", "Use bf16-mixed"), {"trainer.precision": "16-mixed"}
    ),
    "DeepSpeed": Bad(
        ("trainer.strategy: must be auto, ddp, fsdp2, ", "got deepspeed_stage_3. Lightning's own"),
        {"trainer.strategy": "deepspeed_stage_3"},
    ),
    "Lightning's own ModelParallelStrategy": Bad(
        ("trainer.strategy: must be auto, ddp, fsdp2, ", "got ModelParallelStrategy. Use fsdp2"),
        {"trainer.strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}},
    ),
    "a precision that needs another package": Bad(
        ("trainer.precision: must be 32-true, bf16-mixed or 16-mixed, got transformer-engine",),
        {"trainer.precision": "transformer-engine"},
    ),
    "a monitor without validation": Bad(
        ("checkpoint.monitor: needs a validation set, got none. Set data.val_size",), {"checkpoint.monitor": "val/loss"}
    ),
    "a monitor that is never logged": Bad(
        ("checkpoint.monitor: must be one of", "val/loss", "got val/los"),
        {"checkpoint.monitor": "val/los", "data.val_size": 2, "trainer.val_check_interval": 1},
    ),
    "nothing to train on": Bad(("data.datasets: must name at least one dataset, got none",), {"data.datasets": []}),
    "nothing to validate on": Bad(("data.eval_datasets: must name at least one dataset, got none",), verb="validate"),
    "nothing to test on": Bad(("data.test_datasets: must name at least one dataset, got none",), verb="test"),
    "nothing to predict": Bad(("data.predict_datasets: must name prompts to answer, got none",), verb="predict"),
}
RANGES = {
    "a learning rate of zero": value(f"{OPTIMIZER}.init_args.lr", "positive", 0.0),
    "a decay above one": Bad((f"{OPTIMIZER}.init_args.betas: ", "1.5"), {f"{OPTIMIZER}.init_args.betas": [0.9, 1.5]}),
    "a negative epsilon": Bad((f"{OPTIMIZER}.init_args.eps: ", "got -1.0"), {f"{OPTIMIZER}.init_args.eps": -1.0}),
    "a negative weight decay": Bad(
        (f"{OPTIMIZER}.init_args.weight_decay: ", "got -1.0"), {f"{OPTIMIZER}.init_args.weight_decay": -1.0}
    ),
    "a negative gradient norm": value(f"{INIT}.max_grad_norm", "positive or null", -1.0),
    "a warm-up longer than the run": value(f"{INIT}.schedule.warmup_ratio", "in [0, 1)", 1.5),
    "a rank of zero": Bad((f"{TUNING}.init_args.rank: must be at least 1, got 0",), {TUNING: lora(rank=0)}),
    "dropout of everything": Bad(
        (f"{TUNING}.init_args.dropout: must be in [0, 1), got 1.0",), {TUNING: lora(dropout=1.0)}
    ),
    "more blocks than the model has": Bad(
        (f"{TUNING}.init_args.num_layers: must be 1 to 2 for this model, or its negative, got 9",),
        {TUNING: {"class_path": "Freeze", "init_args": {"num_layers": 9}}},
    ),
    "a length of one": value("data.max_length", "at least 2", 1),
    "a validation set of everything": Bad(
        ("data.val_size: must leave rows on both sides, got 200 of 12 rows",), {"data.val_size": 200}
    ),
    "one and a half rows": value("data.val_size", "a whole number of rows or a share below 1", 1.5),
    "a negative seed": Bad(("seed_everything: ", "got -1"), {"seed_everything": -1}),
    "a checkpoint every zero steps": value("checkpoint.every_n_steps", "at least 1 or null", 0),
    "validation every zero steps": Bad(("trainer.val_check_interval: ", "got 0"), {"trainer.val_check_interval": 0}),
    "answers of no token": Bad(
        (f"{INIT}.generation.max_new_tokens: ", "got 0"), {f"{INIT}.generation.max_new_tokens": 0}
    ),
    "batches of no prompt": Bad((f"{INIT}.generation.batch_size: ", "got 0"), {f"{INIT}.generation.batch_size": 0}),
    "a temperature of zero": Bad(
        (f"{INIT}.generation.temperature: ", "got 0.0"), {f"{INIT}.generation.temperature": 0.0}
    ),
    "heads that do not divide": Bad(
        (f"{BACKBONE}.architecture", "16", "3"), {f"{BACKBONE}.architecture.num_attention_heads": 3}
    ),
    "a word for a size": Bad(
        (f"{BACKBONE}.architecture", "hidden_size", "big"), {f"{BACKBONE}.architecture.hidden_size": "big"}
    ),
    "fewer words than the tokenizer": Bad(
        (f"{BACKBONE}: the embedding must cover the tokenizer's 259 words, got 100 rows",),
        {f"{BACKBONE}.architecture.vocab_size": 100},
    ),
}


def info(says: tuple[str, ...], content: Any) -> Bad:
    changes = {"data.datasets": ["mine"], "data.dataset_dir": "data"}
    return Bad(says, changes, files={"data/dataset_info.json": content, "data/rows.json": ROWS})


ENTRY = "data/dataset_info.json, mine: "
INFO = {
    "no dataset_info.json": Bad(
        ("nowhere/dataset_info.json: no such file", "data.dataset_dir"),
        {"data.datasets": ["mine"], "data.dataset_dir": "nowhere"},
    ),
    "a broken dataset_info.json": info(("data/dataset_info.json: broken JSON at line 2, column 1",), '{"mine": \n}'),
    "a dataset_info.json that is a list": info(("data/dataset_info.json: must be an object", "got an array"), [1]),
    "an unknown dataset": info(
        ("data/dataset_info.json: no dataset is called 'mine'. Did you mean 'mined'?",), {"mined": {}}
    ),
    "an entry that is no object": info((ENTRY + "must be an object, got a string",), {"mine": "rows.json"}),
    "an unknown key of an entry": info(
        (ENTRY + "unknown key 'file_nam'. Did you mean 'file_name'?",), {"mine": {"file_nam": "x"}}
    ),
    "a file that is not there": info(
        (ENTRY + "data/absent.json does not exist. Correct",), {"mine": {"file_name": "absent.json"}}
    ),
    "a file outside of the folder": info(
        (ENTRY + "file_name must stay inside data, got '../rows.json'",), {"mine": {"file_name": "../rows.json"}}
    ),
    "a dataset on the hub": info(
        (ENTRY + "hf_hub_url is not supported yet but in data.datasets with data.streaming: true. Download",),
        {"mine": {"hf_hub_url": "a/b"}},
    ),
    "an unknown formatting": info(
        (ENTRY + "unknown formatting 'sharegtp'. Did you mean 'sharegpt'?",),
        {"mine": {"file_name": "rows.json", "formatting": "sharegtp"}},
    ),
    "an unknown column": info(
        (ENTRY + "unknown key 'promt' in columns. Did you mean 'prompt'?",),
        {"mine": {"file_name": "rows.json", "columns": {"promt": "x"}}},
    ),
    "pictures": info(
        (ENTRY + "the column 'images' is not supported yet",),
        {"mine": {"file_name": "rows.json", "columns": {"images": "x"}}},
    ),
    "a ranking set": info(
        ("mine: holds ranked answers (ranking), sft wants conversations. Choose another dataset",),
        {"mine": {"file_name": "rows.json", "ranking": True}},
    ),
}


def rows(
    says: tuple[str, ...], content: Any, name: str = "bad.json", changes: dict[str, Any] | None = None, **source: Any
) -> Bad:
    return Bad(says, {"data.datasets": [{"path": name, **source}], **(changes or {})}, files={name: content})


def turns(*pairs: tuple[str, str]) -> list[Any]:
    return [{"conversations": [{"from": role, "value": text} for role, text in pairs]}]


GOOD = ROWS[0]
SKIP = "Fix the row, or set data.invalid_rows: skip."
ROW_FILES = {
    "a file that does not exist": Bad(
        ("data.datasets[0]: absent.json does not exist",), {"data.datasets": [{"path": "absent.json"}]}
    ),
    "an unknown key inline": rows(
        ("data.datasets[0]: unknown key 'formating'. Did you mean 'formatting'?",), [GOOD], formating="alpaca"
    ),
    "an unknown file type": rows(
        ("bad.xlsx: the type '.xlsx' is not supported. Write the rows as .json",), "x", "bad.xlsx"
    ),
    "an empty file": rows(("bad.json: holds no rows. Write at least one",), ""),
    "an object instead of rows": rows(("bad.json: must be an array of objects, got an object", ".jsonl"), {"a": 1}),
    "bytes that are not UTF-8": rows(("bad.json: is not UTF-8 (byte 1). Save it as UTF-8.",), b"[\xff]"),
    "broken JSON": rows(
        ("bad.json: broken JSON at line 2, column 8: Expecting ',' delimiter",), '[{"a": 1},\n{"a":1 "b": 2}]'
    ),
    "a broken line of JSON": rows(
        ("bad.jsonl, row 2: broken JSON at line 3, column 10",),
        '{"instruction": "a", "output": "b"}\n\n{"a": 1  \n',
        "bad.jsonl",
    ),
    "a line of CSV with a cell too few": rows(
        ("bad.csv, row 2: must have 2 columns like the first line. Quote",), "instruction,output\na,b\nc\n", "bad.csv"
    ),
    "a torn parquet file": rows(
        ("bad.parquet: cannot be read as parquet", "Write the file again."), b"PAR1xx", "bad.parquet"
    ),
    "plain texts for sft": rows(
        ("bad: holds plain texts (formatting: text), sft wants conversations", "class_path: PT"), "a\nb\n", "bad.txt"
    ),
    "answers for pt": rows(
        ("bad: holds questions with answers, pt wants plain texts", "class_path: SFT"),
        ROWS,
        changes={"model.class_path": "PT"},
    ),
    "conversations for pt": rows(
        ("bad: holds conversations (formatting: sharegpt), pt wants plain texts",),
        turns(("human", "a"), ("gpt", "b")),
        changes={"model.class_path": "PT"},
        formatting="sharegpt",
    ),
}
BAD_ROWS = {
    "a row that is no object": rows(("bad.json, row 2: must be an object, got a number",), [GOOD, 3]),
    "a number in a column of texts": rows(
        ("bad.json, row 2: column 'instruction' must be a string, got 3", SKIP),
        [GOOD, {"instruction": 3, "output": "x"}],
    ),
    "other columns": rows(
        (
            "bad.json, row 2: column 'instruction' must be a non-empty string",
            "the row has the columns 'question', 'output'",
            SKIP,
        ),
        [GOOD, {"question": "a", "output": "x"}],
    ),
    "a row without an answer": rows(("bad.json, row 2: has no answer to learn", SKIP), [GOOD, {"instruction": "hey"}]),
    "an empty answer": rows(
        ("bad.json, row 2: turn 2, an answer to learn, is empty", SKIP), [GOOD, {"instruction": "hey", "output": ""}]
    ),
    "two questions in a row": rows(
        ("bad.json, row 1: turn 2 must be by the assistant, got 'user': turns must alternate", SKIP),
        turns(("human", "a"), ("human", "b"), ("gpt", "c")),
        formatting="sharegpt",
    ),
    "a conversation that ends with a question": rows(
        ("bad.json, row 1: has no answer to learn: the last turn must be the assistant's", SKIP),
        turns(("human", "a"), ("gpt", "b"), ("human", "c")),
        formatting="sharegpt",
    ),
    "an unknown role": rows(
        ("bad.json, row 1: turn 2: 'from' must be one of 'human', 'gpt'", "got 'bot'", SKIP),
        turns(("human", "a"), ("bot", "b")),
        formatting="sharegpt",
    ),
    "a content that is no text": rows(
        ("bad.json, row 1: turn 1: 'content' must be a string, got 3", SKIP),
        [{"messages": [{"role": "user", "content": 3}]}],
        formatting="openai",
    ),
    "broken tools": rows(
        ("bad.json, row 1: column 'tools': broken JSON at character 2", SKIP),
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "{"}],
        formatting="openai",
    ),
    "a row longer than the limit leaves": Bad(
        ("rows.json, row 1: keeps no token to learn at max_length 3", SKIP), {"data.max_length": 3}
    ),
    "no row left": rows(
        ("data.datasets: no row can be used (bad: 1 rows, 0 kept", "Check formatting, columns and max_length."),
        [{"instruction": "hey"}],
        changes={"data.invalid_rows": "skip"},
    ),
}


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def cut(path: Path, size: int = 1000) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop_tensor(path: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})


def of_model(says: tuple[str, ...], prepare: Callable[[Path], Any] | None = None, **changes: Any) -> Bad:
    settings = {BACKBONE: {"path": "./model"}, **{key.replace("__", "."): value for key, value in changes.items()}}
    return Bad(says, settings, prepare=prepare, needs=("model",))


def adapter_of(folder: str, *, base: str = "./model") -> dict[str, Any]:
    return {BACKBONE: {"path": base}, TUNING: lora(adapter=folder)}


MODELS = {
    "a model folder that is missing": Bad(
        (f"{BACKBONE}.path: ./model does not exist. Correct the path.",), {BACKBONE: {"path": "./model"}}
    ),
    "a model folder without a tokenizer": of_model(
        (f"{BACKBONE}.path: ./model holds no tokenizer", "backbone.tokenizer"),
        lambda here: [path.unlink() for path in (here / "model").glob("tokenizer*")],
    ),
    "a broken tokenizer": of_model(
        (f"{BACKBONE}.path: model/tokenizer.json is broken JSON",), lambda here: cut(here / "model/tokenizer.json")
    ),
    "a model folder without a configuration": of_model(
        (f"{BACKBONE}.path: must be a folder with config.json", "got ./model"),
        lambda here: (here / "model/config.json").unlink(),
    ),
    "a model folder without weights": of_model(
        (BACKBONE, "model.safetensors", "./model"), lambda here: (here / "model/model.safetensors").unlink()
    ),
    "torn weights": of_model(
        (BACKBONE, "the model cannot be loaded"), lambda here: cut(here / "model/model.safetensors")
    ),
    "weights that lack a tensor": of_model(
        (BACKBONE, "model.layers.1.mlp.up_proj.weight"),
        lambda here: drop_tensor(here / "model/model.safetensors", "model.layers.1.mlp.up_proj.weight"),
    ),
    "weights of another shape": of_model(
        (BACKBONE, "mlp"), lambda here: change_json(here / "model/config.json", intermediate_size=20)
    ),
    "a tokenizer larger than the embedding": of_model(
        (f"{BACKBONE}: the embedding must cover the tokenizer's 259 words, got 200 rows",),
        lambda here: build_model(here / "model", vocab_size=200),
    ),
    "a model of another kind": of_model(
        (BACKBONE, "vit"), lambda here: (here / "model/config.json").write_text('{"model_type": "vit"}')
    ),
    "no chat template": of_model(
        ("data.template: auto wants a chat template in the tokenizer, got none", "chatml"),
        lambda here: (here / "model/chat_template.jinja").unlink(),
    ),
    "layers that do not exist": Bad(
        (f"{TUNING}.init_args.target: must name linear layers of the model, got q_prj. Did you mean q_proj?",),
        {BACKBONE: {"path": "./model"}, TUNING: lora(target=["q_prj"])},
        needs=("model",),
    ),
    "an adapter that is not there": Bad(
        (f"{TUNING}.init_args.adapter: must be a folder with adapter_config.json, got nowhere",),
        adapter_of("nowhere"),
        needs=("model",),
    ),
    "an adapter of another model": Bad(
        (f"{TUNING}.init_args.adapter: ", "run/final"),
        adapter_of("run/final", base="./other"),
        ("--trainer.default_root_dir", "new"),
        prepare=lambda here: build_model(here / "other", hidden_size=32),
        needs=("lora_run",),
    ),
    "an adapter without weights": Bad(
        (f"{TUNING}.init_args.adapter: ", "run/final"),
        adapter_of("run/final"),
        ("--trainer.default_root_dir", "new"),
        prepare=lambda here: (here / "run/final/adapter_model.safetensors").unlink(),
        needs=("model", "lora_run"),
    ),
}


def resumed(
    says: tuple[str, ...],
    prepare: Callable[[Path], Any] | None = None,
    *,
    run: str = "full_run",
    ckpt_path: str = STEP,
    **changes: Any,
) -> Bad:
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    return Bad(says, settings, ("--ckpt_path", ckpt_path), prepare=prepare, needs=(run,))


LORA_CHANGES = {BACKBONE: {"path": "./model"}, TUNING: lora(rank=2)}
CHECKPOINTS = {
    "a run folder with checkpoints": Bad(
        ("run: must be a new run folder, got one with 2 complete checkpoints", "--ckpt_path last", "--overwrite true"),
        needs=("full_run",),
    ),
    "a run folder that is a file": Bad(
        ("trainer.default_root_dir: must be a folder", "got run"), files={"run": "text"}
    ),
    "a checkpoint that is missing": Bad(
        ("--ckpt_path: ", "got run/nowhere", "manifest.json"), arguments=("--ckpt_path", "run/nowhere")
    ),
    "a checkpoint without a manifest": resumed(
        (STEP, "must be a complete checkpoint", "without manifest.json"),
        lambda here: (here / STEP / "manifest.json").unlink(),
    ),
    "a checkpoint without its weights": resumed((STEP,), lambda here: (here / STEP / "model.safetensors").unlink()),
    "a checkpoint with torn weights": resumed(
        (STEP, "model.safetensors"), lambda here: cut(here / STEP / "model.safetensors")
    ),
    "a checkpoint with a torn state": resumed(
        (STEP, "state.ckpt"), lambda here: cut(here / STEP / "trainer_state/state.ckpt", 300)
    ),
    "the final folder as a checkpoint": resumed(
        ("--ckpt_path: ", "got run/final", "manifest.json and trainer_state"), ckpt_path="run/final"
    ),
    "a checkpoint of another stage": Bad(
        ("model.class_path: must be SFT, the stage of this checkpoint, got PT",),
        {"model.class_path": "PT", "data.datasets": [{"path": "texts.txt"}]},
        ("--ckpt_path", "last"),
        files={"texts.txt": "a b c d\n" * 16},
        needs=("full_run",),
    ),
    "a checkpoint of a wider model": resumed(
        ("must train 12,720 parameters as the checkpoint does, got 29,536",),
        model__init_args__backbone__architecture__hidden_size=32,
    ),
    "a checkpoint of a deeper model": resumed(
        ("must train 12,720 parameters as the checkpoint does, got 10,512",),
        model__init_args__backbone__architecture__num_hidden_layers=1,
    ),
    "a checkpoint of a shallower model": resumed(
        ("must train 12,720 parameters as the checkpoint does, got 14,928",),
        model__init_args__backbone__architecture__num_hidden_layers=3,
    ),
    "a checkpoint of another tuning": resumed(
        ("must train 12,720 parameters as the checkpoint does, got 2,208",),
        model__init_args__tuning={"class_path": "Freeze", "init_args": {"num_layers": 1}},
    ),
    "an adapter for every weight": Bad(
        ("must train 12,720 parameters as the checkpoint does, got 992",),
        LORA_CHANGES,
        ("--ckpt_path", STEP),
        needs=("full_run", "model"),
    ),
    "an adapter of another rank": Bad(
        ("must train 992 parameters as the checkpoint does, got 1,488",),
        LORA_CHANGES | {TUNING: lora(rank=3)},
        ("--ckpt_path", STEP),
        needs=("lora_run", "model"),
    ),
    "an adapter on other layers": Bad(
        ("must train 992 parameters as the checkpoint does, got 128",),
        LORA_CHANGES | {TUNING: lora(rank=2, target=["q_proj"])},
        ("--ckpt_path", STEP),
        needs=("lora_run", "model"),
    ),
    "an adapter on as many weights of other layers": Bad(
        (STEP, "does not fit this model's adapter", "k_proj"),
        LORA_CHANGES | {TUNING: lora(rank=23, target=["model.layers.1.self_attn.k_proj"])},
        ("--ckpt_path", STEP, *PROMPTS),
        "predict",
        needs=("lora_run", "model"),
    ),
    "a newest checkpoint to predict with where there is none": Bad(
        ("--ckpt_path: last needs a complete checkpoint in run, got none",),
        arguments=("--ckpt_path", "last", *PROMPTS),
        verb="predict",
    ),
    "a folder without weights to predict with": Bad(
        ("data", "weight"), arguments=("--ckpt_path", "data", *PROMPTS), files={"data/a.txt": ""}, verb="predict"
    ),
    "an adapter to predict with a whole model": Bad(
        (STEP, "adapter"),
        {BACKBONE: {"path": "./model"}},
        ("--ckpt_path", STEP, *PROMPTS),
        "predict",
        needs=("lora_run", "model"),
    ),
}
DOORS = {
    "keys": KEYS,
    "types": TYPES,
    "choices": CHOICES,
    "files": FILES,
    "combinations": COMBINATIONS,
    "ranges": RANGES,
    "dataset_info": INFO,
    "row files": ROW_FILES,
    "rows": BAD_ROWS,
    "models": MODELS,
    "checkpoints": CHECKPOINTS,
}
TABLE = {f"{door}: {name}": bad for door, kinds in DOORS.items() for name, bad in kinds.items()}


def arguments_of(bad: Bad, here: Path, request: pytest.FixtureRequest) -> list[str]:
    """Lay out the working folder of a case; the arguments of the command."""
    for name in bad.needs:
        shutil.copytree(
            request.getfixturevalue(name), here / name.replace("full_run", "run").replace("lora_run", "run")
        )
    for name, content in bad.files.items():
        path = here / name
        path.parent.mkdir(exist_ok=True)
        raw = (
            content
            if isinstance(content, bytes)
            else (content if isinstance(content, str) else json.dumps(content)).encode()
        )
        path.write_bytes(raw)
    if bad.prepare is not None:
        bad.prepare(here)
    path = write(here, merged(config(), bad.changes))
    if bad.yaml is not None:
        Path(path).write_text(bad.yaml)
    return [bad.verb, "--config", path, *bad.arguments]


def assert_one_line(code: int, error: str, says: tuple[str, ...]) -> None:
    assert code == 2, error[-2000:]
    *before, last = error.splitlines()
    assert last.startswith("lf-lightning: error: ")
    summary = re.compile(
        r"\w+: [\d,]+ rows, .* dropped.*|model: [\d,]+ parameters.*"
        r"|train: [\d,]+ units .*|no --ckpt_path: .*|data\.layout: .*|step \d+.*|continuing .*"
    )
    assert [line for line in before if not summary.fullmatch(line)] == []
    for part in says:
        assert part in last
    assert len(last) < 500, "a line that nobody reads"
    assert not re.search(r"Namespace\(|must be ,|must be  or|must be \.|error: :|<class", last), last
    assert last[-1] in ".?", "the line ends with what to do"


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_one_line_that_names_the_culprit(
    name: str, here: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    bad = TABLE[name]
    arguments = arguments_of(bad, here, request)
    capsys.readouterr()
    code = main(arguments)
    assert_one_line(code, capsys.readouterr().err, bad.says)


SLOW = ("keys: a key of the data", "rows: a row without an answer")


@pytest.mark.parametrize(
    "name", ["models: layers that do not exist", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_process_of_its_own_says_it_in_one_line_too(
    name: str, here: Path, root: Path, request: pytest.FixtureRequest
):
    bad = TABLE[name]
    command = [sys.executable, "-m", "lf_lightning", *arguments_of(bad, here, request)]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment, timeout=120)
    assert_one_line(done.returncode, done.stderr, bad.says)
    assert done.stdout == ""


# ---------------------------------------------------------------------- rm, dpo and kto

RANKED = {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}}
LIKED = {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "liked"}}
PAIRS = [{"instruction": f"Say {text}.", "chosen": text, "rejected": text[::-1] + "?"} for text in ("ab", "cde", "fg")]
ANSWERS = [{"instruction": f"Say {text}.", "output": text, "liked": text != "ab"} for text in ("ab", "cde", "fg")]
GENERATION = f"{INIT}.generation"


def judged(stage: str, says: tuple[str, ...], *, rows: Any = None, to: str | None = None, **more: Any) -> Bad:
    """Bad input of a stage that judges.

    Args:
        stage: Its name.
        says: What the line must contain.
        rows: Those of the file instead of good ones.
        to: The stage that the dataset is for, where that is another.
        more: Options of the stage by name, and `changes` by dotted key, `arguments`, `needs` and `verb` as in Bad.
    """
    is_kto = (to or stage) == "KTO"
    rows = (ANSWERS if is_kto else PAIRS) if rows is None else rows
    changes = {"model.class_path": stage, **more.pop("changes", {})}
    changes["data.datasets"] = [{"path": "judged.json", **(LIKED if is_kto else RANKED)}]
    if stage == "RM":
        changes[GENERATION] = ...
    kept = {name: more.pop(name) for name in ("arguments", "needs", "verb", "prepare") if name in more}
    changes |= {f"{INIT}.{name}": value for name, value in more.items()}
    return Bad(says, changes, files={"judged.json": rows}, **kept)


def with_row(rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    """The rows, of which the second has other values; Ellipsis takes a column away."""
    second = {name: value for name, value in {**rows[1], **changes}.items() if value is not ...}
    return [rows[0], second, *rows[2:]]


def pair(says: str, **changes: Any) -> Bad:
    return judged("DPO", ("judged.json, row 2: ", says), rows=with_row(PAIRS, **changes))


def tag(got: Any, shown: str) -> Bad:
    says = ("judged.json, row 2: column 'liked' must be true or false without quotes", f"got {shown}")
    return judged("KTO", says, rows=with_row(ANSWERS, liked=got))


def margin(got: Any, shown: str) -> Bad:
    bad = judged("RM", ("judged.json, row 2: column 'margin' must be a finite number", shown))
    rows = [{**row, "margin": 1.0} for row in PAIRS]
    rows[1]["margin"] = got
    source = {"path": "judged.json", **RANKED, "columns": {**RANKED["columns"], "margin": "margin"}}
    return Bad(bad.says, {**bad.changes, "data.datasets": [source]}, files={"judged.json": rows})


JUDGED_ROWS = {
    "equal answers": pair("columns 'chosen' and 'rejected' are equal", rejected="cde"),
    "an empty chosen answer": pair("column 'chosen', an answer, is empty", chosen=""),
    "an empty rejected answer": pair("column 'rejected', an answer, is empty", rejected=""),
    "no chosen answer": pair("column 'chosen' must be an answer, got none", chosen=...),
    "no rejected answer": pair("column 'rejected' must be an answer, got none", rejected=None),
    "a number for an answer": pair("column 'rejected' must be a string, got 3", rejected=3),
    "no prompt": pair("column 'instruction' must be a non-empty string", instruction=...),
    "a tag in quotes": tag("true", "'true'"),
    "a number for a tag": tag(1, "1"),
    "null for a tag": tag(None, "none"),
    "no tag": tag(..., "none"),
    "an empty answer to judge": judged(
        "KTO", ("judged.json, row 2: its last turn, the answer to judge, is empty",), rows=with_row(ANSWERS, output="")
    ),
    "a text for a margin": margin("much", "got 'much'"),
    "NaN for a margin": margin(float("nan"), "got nan"),
    "no row": judged("DPO", ("judged.json: holds no rows",), rows=[]),
    "no row that can be used": judged(
        "DPO",
        ("data.datasets: no row can be used", "3 dropped (row 1 and 2 more: column 'rejected', an answer, is empty)"),
        rows=[{**row, "rejected": ""} for row in PAIRS],
        changes={"data.invalid_rows": "skip"},
    ),
    "answers that truncation leaves equal": judged(
        "RM",
        ("judged.json, row 2: its answers are equal in the ", " at max_length 40"),
        rows=with_row(PAIRS, chosen="z" * 60, rejected="z" * 59 + "y"),
        changes={"data.max_length": 40},
    ),
    "an answer that truncation leaves empty": judged(
        "KTO", ("judged.json, row 1: its answer keeps no token at max_length 4",), changes={"data.max_length": 4}
    ),
}
JUDGED_SETS = {
    f"{kind} for {stage}": judged(stage, (says, wants), to=to)
    for kind, to, says in (
        ("pairs", "DPO", "judged: holds ranked answers (ranking)"),
        ("tagged answers", "KTO", "judged: holds liked and disliked answers (kto_tag)"),
    )
    for stage, wants in (
        ("SFT", "sft wants conversations"),
        ("PT", "pt wants plain texts"),
        ("RM", "rm wants ranked answers"),
        ("DPO", "dpo wants ranked answers"),
        ("KTO", "kto wants liked and disliked answers"),
    )
    if (stage == "KTO") != (to == "KTO")
} | {
    f"questions with answers for {stage}": Bad(
        ("rows: holds unjudged rows", f"{stage.lower()} wants "),
        {"model.class_path": stage, **({GENERATION: ...} if stage == "RM" else {})},
    )
    for stage in ("RM", "DPO", "KTO")
}


def range_of(stage: str, name: str, got: Any, want: str) -> Bad:
    return judged(stage, (f"{INIT}.{name}: must be {want}", f"got {got}"), **{name: got})


def constant(loss: str, name: str, got: float, says: str) -> Bad:
    return judged("DPO", (f"{INIT}.constants.{name}: {says}", "got "), loss=loss, constants={name: got})


JUDGED_OPTIONS = {
    "a loss that does not exist": judged(
        "DPO", (f"{INIT}.loss: must be one of", "Did you mean sigmoid?"), loss="sigmoidd"
    ),
    "a loss of another stage": judged("KTO", (f"{INIT}.loss: must be one of kto,", "got simpo"), loss="simpo"),
    **{f"beta {got}": range_of("DPO", "beta", got, "") for got in (0.0, -1.0, float("nan"), float("inf"))},
    "beta 0 of kto": range_of("KTO", "beta", 0.0, ""),
    "a negative ftx": range_of("DPO", "ftx", -1.0, ""),
    "an infinite ftx": range_of("KTO", "ftx", float("inf"), ""),
    "ld_alpha above 1": range_of("DPO", "ld_alpha", 1.5, "in [0, 1]"),
    "an infinite weight": range_of("KTO", "desirable_weight", float("inf"), ""),
    "a negative centering": range_of("RM", "centering", -1.0, ""),
    "an infinite centering": range_of("RM", "centering", float("inf"), ""),
    "no weight at all": judged(
        "KTO", ("desirable_weight: must not be 0 with the other",), desirable_weight=0.0, undesirable_weight=0.0
    ),
    "a bco mix without a reference": judged(
        "DPO", (f"{INIT}.bco_weight: needs a loss with a reference, got simpo",), loss="simpo", bco_weight=0.5
    ),
    "label smoothing of hinge": constant("hinge", "label_smoothing", 0.1, "hinge does not read it"),
    "label smoothing of a half": constant("robust", "label_smoothing", 0.5, "must be in [0, 0.5)"),
    "robust without label smoothing": constant("robust", "label_smoothing", 0.0, "must be above 0 for robust"),
    "a temperature of 0": constant("discopop", "discopop_tau", 0.0, "must be positive"),
    "a reference of orpo": judged(
        "DPO", (f"{INIT}.reference: orpo knows no reference",), loss="orpo", reference={"precompute": True}
    ),
    "a value head of dpo": judged("DPO", (f"{INIT}.value_head",), value_head={"dropout": 0.1}),
    "a reference of rm": judged("RM", (f"{INIT}.reference",), reference={"precompute": True}),
    "packs of pairs": judged("DPO", ("data.packing: must be none for dpo",), changes={"data.packing": "knapsack"}),
    "a learned prompt": judged(
        "KTO", ("data.train_on_prompt: must be false for kto",), changes={"data.train_on_prompt": True}
    ),
    "a shared prompt in the padded layout": judged(
        "DPO",
        ("data.share_prompt: true needs both responses in one row, got layout: padded",),
        changes={"data.share_prompt": True, "data.layout": "padded"},
    ),
    "a shared prompt of sft": Bad(("data.share_prompt: is of rm, dpo and kto only",), {"data.share_prompt": True}),
    "pairs for a kl that dpo has not": judged(
        "DPO", ("data.kl_pairs: is of kto only, got dataset with dpo",), changes={"data.kl_pairs": "dataset"}
    ),
    "a snapshot without an adapter": judged(
        "DPO", (f"{INIT}.reference.kind: snapshot needs a tuning with an adapter",), reference={"kind": "snapshot"}
    ),
    "a reference model without a folder": judged(
        "DPO", (f"{INIT}.reference.path: must be the folder",), reference={"kind": "model"}
    ),
    "a reference model in no folder": judged(
        "DPO", (f"{INIT}.reference.path: must be a folder", "got ./nowhere"), reference={"path": "./nowhere"}
    ),
    "a reference adapter in no folder": judged(
        "DPO",
        (f"{INIT}.reference.adapter: must be a folder", "got ./nowhere"),
        reference={"path": "./model", "adapter": "./nowhere"},
        needs=("model",),
    ),
    "a head that is not there": judged(
        "RM",
        (f"{INIT}.value_head.init: load needs value_head.safetensors", "./model"),
        value_head={"init": "load"},
        changes={BACKBONE: {"path": "./model"}},
        needs=("model",),
    ),
    "an adapter on the output layer": judged(
        "RM",
        (f"{TUNING}.init_args.target: must leave out the output layer",),
        tuning=lora(target=["q_proj", "lm_head"]),
        changes={BACKBONE: {"path": "./model"}},
        needs=("model",),
    ),
    "a head that always drops": judged(
        "RM", (f"{INIT}.value_head.dropout: must be in [0, 1), got 1.0",), value_head={"dropout": 1.0}
    ),
    "a folder without a head to score with": judged(
        "RM",
        ("reward model: model must hold value_head.safetensors",),
        changes={"data.predict_datasets": [{"path": "judged.json", **RANKED}]},
        arguments=("--ckpt_path", "model"),
        verb="predict",
        needs=("model",),
    ),
}
JUDGED = {
    f"{door}: {name}": bad
    for door, kinds in (("rows", JUDGED_ROWS), ("sets", JUDGED_SETS), ("options", JUDGED_OPTIONS))
    for name, bad in kinds.items()
}


@pytest.mark.parametrize("name", JUDGED)
def test_bad_judgements_are_one_line_that_names_the_culprit(
    name: str, here: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    bad = JUDGED[name]
    arguments = arguments_of(bad, here, request)
    capsys.readouterr()
    code = main(arguments)
    assert_one_line(code, capsys.readouterr().err, bad.says)


def test_a_run_that_leaves_the_numbers_ends_by_name(
    here: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    bad = judged("DPO", (), changes={f"{OPTIMIZER}.init_args.lr": 1e30, f"{INIT}.max_grad_norm": None})
    arguments = arguments_of(bad, here, request)
    assert main(arguments) == 1
    assert " is not finite, got " in capsys.readouterr().err.splitlines()[-1]
