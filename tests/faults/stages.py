"""Two small runs of each stage: steps long enough to be hit, a checkpoint every three, a validation every two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.cli.runs import INIT, build_model, config
from tests.stages.judgement_runs import judged
from tests.stages.rollout_runs import rolled

MARK_PHASES = {"class_path": "lf_lightning.commands.phases.MarkPhases"}
EVERY, STEPS = 3, 11  # the last step has neither checkpoint nor validation of its own


class Case(NamedTuple):
    """A stage, and what is special about its run."""

    stage: str
    on_folder: bool  # LoRA on a model in a folder; every weight of a scratch model otherwise
    options: dict[str, Any]


def init(**options: Any) -> dict[str, Any]:
    return {f"{INIT}.{name}": value for name, value in options.items()}


DROPOUT = init(tuning={"class_path": "LoRA", "init_args": {"rank": 2, "dropout": 0.2}})
BY_EPOCHS = {"trainer__max_steps": ..., "trainer__max_epochs": 3}
CASES: dict[str, tuple[Case, Case]] = {
    "pt": (Case("PT", False, {"data__packing": "blocks"}), Case("PT", True, DROPOUT)),
    "sft": (Case("SFT", True, DROPOUT), Case("SFT", False, BY_EPOCHS)),
    "rm": (Case("RM", False, init(value_head={"dropout": 0.2})), Case("RM", True, BY_EPOCHS)),
    "dpo": (Case("DPO", False, init(bco_weight=0.5)), Case("DPO", True, DROPOUT)),
    "kto": (Case("KTO", True, {}), Case("KTO", False, BY_EPOCHS)),
    "ppo": (
        Case("PPO", False, {"constants": {"score_norm": "whiten", "kl_horizon": 20}}),
        Case("PPO", True, {"constants": {"kl_estimator": "k3"}}),
    ),
    "grpo": (Case("GRPO", False, {}), Case("GRPO", True, {"constants": {"importance": "sequence"}})),
}
"""Name of a stage -> its runs."""
TEXTS = [{"text": f"{number} " + " ".join("abcdefghijklmnop"[: number + 4])} for number in range(1, 25)]


def settings(folder: Path, case: Case) -> dict[str, Any]:
    """The configuration of a case; its model, where it lies in a folder, is made beside the run."""
    lora = folder / "model" if case.on_folder else None
    if lora is not None and not lora.exists():
        build_model(lora)
    common: dict[str, Any] = {
        "trainer__max_steps": STEPS,
        "trainer__callbacks": [MARK_PHASES],
        "trainer__val_check_interval": 2,
        "checkpoint__every_n_steps": EVERY,
        "data__micro_batch_size": 1,
        "data__eval_micro_batch_size": 1,
        "data__val_size": 3,
        f"{INIT}.schedule": {"kind": "cosine", "warmup_ratio": 0.2},
    }
    changes = {**common, **case.options}
    if case.stage in ("PPO", "GRPO"):
        return rolled(
            case.stage,
            folder / "run",
            lora,
            **{**changes, "data__eval_micro_batch_size": ..., "generation": {"max_new_tokens": 12, "batch_size": 2}},
        )
    if case.stage in ("RM", "DPO", "KTO"):
        return judged(folder, case.stage, "run", lora, **changes)
    if case.stage == "PT":
        (folder / "texts.json").write_text(json.dumps(TEXTS))
        source = {"path": str(folder / "texts.json"), "formatting": "text", "columns": {"text": "text"}}
        changes = {"data__max_length": 24, "data__datasets": [source], **changes, f"{INIT}.generation": ...}
    return config(folder / "run", lora, **{"model__class_path": case.stage, **changes})
