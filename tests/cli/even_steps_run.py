"""Fits one configuration after the other on several processes and notes what each made; started by a test.

python even_steps_run.py CONFIG ...
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lf_lightning.__main__ import main
from lf_lightning.stages import Stage

train, evaluate = Stage.training_step, Stage.validation_step
made = [0, 0, 0]  # steps, their micro-batches, validation batches


def training_step(stage: Stage, step: Any, batch_idx: int) -> None:
    made[0] += 1
    made[1] += len(step.micro_batches)
    train(stage, step, batch_idx)


def validation_step(stage: Any, batch: Any, batch_idx: int) -> None:
    made[2] += 1
    evaluate(stage, batch, batch_idx)


if __name__ == "__main__":
    Stage.training_step, Stage.validation_step = training_step, validation_step
    seen = []
    for path in sys.argv[1:]:
        made[:] = [0, 0, 0]
        code = main(["fit", "--config", path])
        if code:
            sys.exit(code)
        seen.append(list(made))
    Path(f"seen.{os.environ.get('LOCAL_RANK', '0')}").write_text(json.dumps(seen))
