"""Small runs of the command line: a configuration, its rows, and the command in this process."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from lf_lightning.__main__ import main

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
ROWS = [{"instruction": f"Count to {number}.", "output": " ".join("abcdefghijkl"[:number])} for number in range(1, 13)]


INIT = "model.init_args"
"""Where the options of the stage lie."""


def config(run: Path | str = "run", lora: Path | str | None = None, **changes: Any) -> dict[str, Any]:
    """A run of four steps of four rows that saves after two.

    Args:
        run: The run folder.
        lora: Folder of a model that gets a LoRA of rank 2; without one every weight of a scratch model trains.
        changes: Values by dotted key, with `__` for the dot.
    """
    base: dict[str, Any] = {
        "seed_everything": 7,
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "default_root_dir": str(run),
        },
        "checkpoint": {"every_n_steps": 2},
        "model": {
            "class_path": "SFT",
            "init_args": {
                "backbone": {"architecture": dict(LLAMA), "tokenizer": "bytes"},
                "tuning": {"class_path": "Full"},
                "optimizer": {"class_path": "AdamW", "init_args": {"lr": 1e-2}},
                "schedule": {"kind": "constant"},
                "generation": {"max_new_tokens": 4},
            },
        },
        "data": {"datasets": [{"path": "rows.json"}], "max_length": 96, "global_batch_size": 4, "cache_dir": None},
    }
    if lora is not None:
        base["model"]["init_args"]["backbone"] = {"path": str(lora)}
        base["model"]["init_args"]["tuning"] = {"class_path": "LoRA", "init_args": {"rank": 2}}
    return merged(base, {name.replace("__", "."): value for name, value in changes.items()})


def build_model(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with the byte tokenizer, as save_pretrained writes them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lf_lightning.data.tokenizer import byte_tokenizer

    architecture = {"vocab_size": 259, **LLAMA, **changes}
    torch.manual_seed(0)
    settings = AutoConfig.for_model(architecture.pop("model_type"), **architecture)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with values set by dotted key; Ellipsis takes the key away."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        *above, leaf = key.split(".")
        node = result
        for part in above:
            node = node.setdefault(part, {})
        if value is ...:
            node.pop(leaf, None)
        else:
            node[leaf] = value
    return result


def write(folder: Path, settings: dict[str, Any], name: str = "run.yaml") -> str:
    """Write a configuration, and the rows where there are none; returns the path for --config."""
    rows = folder / "rows.json"
    if not rows.exists():
        rows.write_text(json.dumps(ROWS))
    path = folder / name
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return str(path)


def lightning(verb: str, folder: Path, settings: dict[str, Any], *arguments: str) -> int:
    """Run a verb with a configuration in this process; the exit code."""
    return main([verb, "--config", write(folder, settings), *arguments])


def log_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of trainer_log.jsonl."""
    return [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """The logged training losses."""
    return [row["loss"] for row in log_rows(run) if "loss" in row]


def weights(folder: Path) -> str:
    """One hash over every bit of every tensor of a folder."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"{folder} holds no weights"
    for path in files:
        with safe_open(path, "pt") as handle:
            for name in sorted(handle.keys()):
                digest.update(name.encode())
                digest.update(handle.get_tensor(name).contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def steps(run: Path) -> list[str]:
    """Names of the checkpoints that are there, hidden ones too."""
    return sorted(path.name for path in (run / "checkpoints").glob("*"))
