"""Writes docs/support-matrix.md by asking the doors that a run goes through, so that the page says what they do.

python docs/make_support_matrix.py
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from lf_lightning.models import Tuning
from lf_lightning.refusal import leaves
from lf_lightning.stages import STAGES
from lf_lightning.stages.doors import PRECISIONS, REFUSED_STRATEGIES, STRATEGIES, TOGETHER, check_run
from lf_lightning.types import InputError

PAGE = Path(__file__).parent / "support-matrix.md"

HEAD = """# What runs with what

Made by `python docs/make_support_matrix.py`, which asks the function that refuses a run, `check_run` in
`lf_lightning/stages/doors.py`: change it, not a line here. A run that is refused ends before the model is loaded, with
exit code 2 and the line that stands under the tables.

The tuning decides nothing here: {tunings} are the same in every cell.
`fsdp2` with `replicate` is as `fsdp2`; with `tensor_parallel` it runs {together} alone, without LoRA.
[strategies.md](strategies.md) says which strategy to take.

- **equal**: gradients, losses and metrics are those of one process, by the tests of `tests/stages`.
- **trains**: tests run it; autocast rounds, so equality is tested in `32-true` alone.
- **not run**: not refused, and not proven: the project has had no machine with a CUDA device. Once a result of one is
  committed under `bench/results/`, its cells say so.
- **n**: refused, with line n.
"""

WHERE = {"cpu": "CPU, gloo", "gpu": "CUDA, nccl"}
ON_CPU = {"32-true": "equal", "bf16-mixed": "trains"}
NOT_RUN = "not run"


def refusal(**asked: str) -> str:
    """The line that refuses a combination; empty where it may run."""
    try:
        check_run(**asked)
    except InputError as error:
        return str(error)
    return ""


def page() -> str:
    """The whole page."""
    tasks = [stage.task for stage in STAGES]
    lines: list[str] = []
    tables = []
    for accelerator, where in WHERE.items():
        table = [f"## {where}", "", f"| strategy | precision | {' | '.join(tasks)} |", "|---" * (2 + len(tasks)) + "|"]
        for strategy, precision in product((*STRATEGIES, *REFUSED_STRATEGIES), PRECISIONS):
            cells = []
            for task in tasks:
                line = refusal(strategy=strategy, precision=precision, accelerator=accelerator, task=task)
                if line and line not in lines:
                    lines.append(line)
                allowed = ON_CPU[precision] if accelerator == "cpu" and not line else NOT_RUN
                cells.append(str(lines.index(line) + 1) if line else allowed)
            table.append(f"| `{strategy}` | `{precision}` | {' | '.join(cells)} |")
        tables.append("\n".join(table))
    refused = [f"{number}. `{line}`" for number, line in enumerate(lines, 1)]
    names = sorted(kind.__name__ for kind in leaves(Tuning))
    head = HEAD.format(tunings=", ".join(names[:-1]) + f" and {names[-1]}", together=", ".join(TOGETHER))
    return "\n\n".join([head.rstrip(), *tables, "## What is said", "\n".join(refused)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
