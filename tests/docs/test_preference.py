import re
from pathlib import Path

import nbformat
import pytest
import torch

from lf_lightning.losses.kto import KTO_LOSSES
from lf_lightning.losses.preference import PREFERENCE_LOSSES, LogRatios, PreferenceConstants, StepKL


def rows(root: Path) -> dict[str, list[str]]:
    """Loss -> formula, start, sums or means and paper, as the table of the page has them."""
    text = (root / "docs" / "preference.md").read_text(encoding="utf-8").split("## DPO: `loss`")[1].split("\nMixes")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    return {name.strip("`"): cells for name, *cells in found[1:]}


def test_the_page_has_every_loss_once_with_its_paper(root: Path):
    assert list(rows(root)) == list(PREFERENCE_LOSSES)
    assert [name for name, cells in rows(root).items() if not re.search(r"\d{4}\.\d{5}", cells[3])] == []


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_the_page_says_where_a_loss_starts_and_what_it_compares(name: str, root: Path):
    entry, (_, start, compared, _) = PREFERENCE_LOSSES[name], rows(root)[name]
    assert compared == ("means" if entry.uses_means else "sums") + ("" if entry.uses_reference else ", no reference")
    zero = torch.zeros(1)
    value = entry.function(
        LogRatios(zero, zero), beta=0.1, constants=PreferenceConstants(), kl=StepKL(zero[0], zero[0])
    )
    assert start == (f"{value.item():.4f}".rstrip("0").rstrip(".") if entry.uses_reference else "-")


@pytest.mark.parametrize("page", ["README.md", "README_zh.md"])
def test_a_readme_has_a_row_for_each_stage_with_its_configs(page: str, root: Path):
    text = (root / page).read_text(encoding="utf-8")
    for stage in ("pt", "sft", "rm", "dpo", "kto", "ppo", "grpo"):
        (row,) = re.findall(rf"(?m)^\| `{stage.upper()}` \|.*$", text)
        configs = sorted(f"configs/{stage}/{path.name}" for path in (root / "configs" / stage).glob("*.yaml"))
        assert sorted(re.findall(r"configs/[^)]*", row)) == configs


def test_the_page_names_what_kto_can_train(root: Path):
    text = (root / "docs" / "preference.md").read_text(encoding="utf-8").split("\n## KTO")[1]
    assert set(KTO_LOSSES) == {"kto", "apo_zero_unpaired"}
    assert "`loss: apo_zero_unpaired`" in text


def test_dpo_in_ten_lines_has_ten(root: Path):
    notebook = nbformat.read(root / "notebooks" / "02_dpo_in_ten_lines.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "trainer.fit(" in cell.source]
    assert len(cell.source.splitlines()) == 10
