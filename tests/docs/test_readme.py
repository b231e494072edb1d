import json
import re
from pathlib import Path

import pytest
import yaml

from lf_lightning.__main__ import COMMANDS
from lf_lightning.cli import build
from lf_lightning.data.formats import conversation_of
from lf_lightning.data.sources import load_rows, resolve_sources


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_the_readme_builds_the_run_that_it_shows(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (text,) = blocks(root / "README.md", "yaml")
    (tmp_path / "my_run.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    gate = build(["--config", "my_run.yaml"], "fit")
    assert type(gate.model).__name__ == "SFT"
    assert gate.datamodule.names["train"] == ["my_rows"]
    assert gate.trainer.default_root_dir == "runs/my_run"


def test_the_readme_shows_rows_that_the_data_chain_reads(root: Path, tmp_path: Path):
    rows, info = blocks(root / "README.md", "json")
    (tmp_path / "my_rows.json").write_text(rows, encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(info, encoding="utf-8")
    (source,) = resolve_sources(["my_rows"], str(tmp_path))
    conversations = [conversation_of(row, source) for row in load_rows(source)]
    assert [each.messages[-1].content for each in conversations] == [
        "I am Robin, a helper for gardeners.",
        "The sunflower.",
    ]


def test_the_readme_in_chinese_shows_the_same_code(root: Path):
    english, chinese = root / "README.md", root / "README_zh.md"
    for language in ("json", "python"):
        assert blocks(chinese, language) == blocks(english, language)
    assert [yaml.safe_load(text) for text in blocks(chinese, "yaml")] == [
        yaml.safe_load(text) for text in blocks(english, "yaml")
    ]
    assert english.read_text(encoding="utf-8").count("\n## ") == chinese.read_text(encoding="utf-8").count("\n## ")


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_a_readme_is_complete(name: str, root: Path):
    text = (root / name).read_text(encoding="utf-8")
    assert "@@" not in text
    assert [command for command in COMMANDS if f"lf-lightning {command}" not in text] == []
    assert re.findall(r"exact match after training: (\d\.\d+)", text)
    assert float(re.findall(r"exact match after training: (\d\.\d+)", text)[0]) >= 0.9
    assert not re.search("[\U0001f300-\U0001faff]|img.shields", text)  # no emoji, no badges


def test_examples_of_dataset_info_in_the_page_on_data_are_json(root: Path):
    found = [json.loads(text) for text in blocks(root / "docs" / "data.md", "json")]
    assert found[0]["chats"]["formatting"] == "sharegpt"
