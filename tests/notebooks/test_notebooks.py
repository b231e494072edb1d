import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHORT = 6  # optimizer steps


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shortened(notebook: NotebookNode) -> NotebookNode:
    """The notebook with a step budget that a test can wait for."""
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source, found = re.subn(r"(?m)^num_steps = \d+", f"num_steps = {SHORT}", parameters.source)
    assert found == 1
    return notebook


def text_of(cell: NotebookNode) -> str:
    outputs = [output.get("text") or output.get("data", {}).get("text/markdown", "") for output in cell.outputs]
    return "\n".join(outputs)


def test_there_are_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["01_one_sft_run", "02_dpo_in_ten_lines", "03_reading_a_ppo_rollout"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_any_folder_and_answers_in_its_last_cell(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    notebook = shortened(read(path))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert f"{SHORT} optimizer steps" in text_of(notebook.cells[-1])
    assert (tmp_path / "runs" / path.stem / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_a_question_first_and_is_saved_with_its_outputs(path: Path):
    notebook = read(path)
    assert "?" in notebook.cells[0].source
    assert len(text_of(notebook.cells[-1])) > 100
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = [output.output_type for cell in code_cells(notebook) for output in cell.outputs]
    assert "error" not in kinds
    assert "display_data" in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_defines_nothing_longer_than_ten_lines(path: Path):
    for cell in code_cells(read(path)):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 10
