from pathlib import Path

import pytest

from docs.make_options import PAGE, leaves, options, page, readable
from lf_lightning import DataModule, LoRA, Reward, RewardFunction


def test_the_page_of_options_is_what_the_script_makes_of_the_classes():
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python docs/make_options.py"


@pytest.mark.parametrize(
    "line",
    [
        "| `rank` | whole number | `8` | Rank of the update, > 0. |",
        "| `betas` | two numbers | `[0.9, 0.999]` | Decay of the running means of the gradient and of its square, each "
        "in [0, 1). |",
        "| `packing` | `none` or `blocks` or `knapsack` | `none` |",
        "| `overwrite` | true or false | false |",
        "## model.init_args.tuning: Freeze",
        "- `SFT`: Supervised fine-tuning:",
    ],
)
def test_the_page_says(line: str):
    assert line in page()


def test_an_option_without_a_meaning_is_refused():
    class Silent:
        """Says nothing.

        Args:
            known: A word.
        """

        def __init__(self, known: int, unknown: int = 3) -> None: ...

    with pytest.raises(AssertionError, match="Silent does not explain unknown"):
        options(Silent)


def test_every_option_of_a_class_is_in_its_table():
    assert [row[0] for row in options(LoRA)][:5] == ["rank", "alpha", "dropout", "target", "adapter"]
    assert "mask_history" in [row[0] for row in options(DataModule)]


def test_a_class_of_ones_own_below_ours_changes_nothing():
    before = [kind.__name__ for kind in leaves(Reward)]

    class Own(RewardFunction):
        """Mine."""

    assert [kind.__name__ for kind in leaves(Reward)] == before
    assert Own.__name__ not in before


def test_types_read_as_words():
    assert readable("int | None") == "whole number or null"
    assert readable('Literal["stop", "skip"]') == "`stop` or `skip`"


def test_pages_name_no_file_that_is_absent(root: Path):
    pages = [root / "README.md", root / "README_zh.md", *sorted((root / "docs").glob("*.md"))]
    assert len(pages) >= 7
    links = [(page, link) for page in pages for link in linked_files(page)]
    assert len(links) > 20
    assert [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()] == []


def linked_files(page: Path) -> list[str]:
    """What the links of a page point to, in this repository."""
    parts = page.read_text(encoding="utf-8").split("](")[1:]
    targets = [part.split(")")[0].split("#")[0] for part in parts]
    return [target for target in targets if target and "://" not in target]
