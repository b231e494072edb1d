"""No stage ever holds logits of all its tokens: the size of every tensor of a training step is watched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lf_lightning import DPO, KTO, PT, RM, SFT, BackboneSpec, DataModule, Full
from lf_lightning.types import FeedbackBatch, PreferenceBatch

WORDS = 4096
LLAMA = {
    "model_type": "llama",
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
}
LONG, OTHER = "abcdefgh" * 50, "hgfedcba" * 50  # 400 tokens each
ROW = {"instruction": "say it", "output": LONG, "text": LONG, "chosen": LONG, "rejected": OTHER, "liked": True}
RANKED = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
SOURCES: dict[type, dict[str, Any]] = {
    PT: {"formatting": "text"},
    SFT: {},
    RM: {"ranking": True, "columns": RANKED},
    DPO: {"ranking": True, "columns": RANKED},
    KTO: {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "liked"}},
}


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation gives out."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return found


class Watch(Callback):
    """Watch the sizes of one training step, forward and backward."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        parts = [
            each.tokens
            if isinstance(each, PreferenceBatch)
            else each.responses
            if isinstance(each, FeedbackBatch)
            else each
            for each in batch.micro_batches
        ]
        self.num_counted = max(int((part.targets >= 0).sum()) for part in parts)
        self.sizes = Sizes()
        self.sizes.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sizes.__exit__(None, None, None)


@pytest.mark.parametrize("stage", SOURCES, ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("layout", ["padded", "padding_free"])
def test_no_tensor_of_a_step_is_as_large_as_its_tokens_times_the_vocabulary(
    stage: type[Any], layout: str, tmp_path: Path
):
    spec = BackboneSpec(architecture=LLAMA, tokenizer="bytes")
    source = {"records": [{**ROW, "instruction": f"say it {index}"} for index in range(4)], **SOURCES[stage]}
    options = {"max_length": 512, "global_batch_size": 4, "micro_batch_size": 4, "cache_dir": None}
    template = "default" if stage is PT else "auto"
    data = DataModule(spec, stage.task, datasets=[source], layout=layout, template=template, **options)
    module, watch = stage(spec, Full()), Watch()
    module.configure_callbacks = list
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        logger=False,
        log_every_n_steps=1,
        callbacks=[watch],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    assert watch.num_counted >= 1600
    limit = 256 * WORDS if stage is not RM else 64 * WORDS  # one chunk of logits; a reward model has none at all
    assert watch.sizes.largest <= limit, f"{watch.sizes.largest} numbers, {limit} at most"
