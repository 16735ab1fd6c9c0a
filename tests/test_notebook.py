"""The notebook runs from top to bottom, on the demo model if it is there, else on a tiny one."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from sd.pipeline import DEMO_CHECKPOINT

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "ladder.ipynb"


@pytest.fixture
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_outputs_are_stripped(notebook):
    assert not any(cell.outputs or cell.execution_count for cell in code_cells(notebook))


@pytest.mark.full(memory=False)
def test_notebook_runs(notebook, tiny_checkpoint, monkeypatch):
    monkeypatch.setenv("SD_CKPT", str(DEMO_CHECKPOINT if DEMO_CHECKPOINT.exists() else tiny_checkpoint))
    monkeypatch.setenv("STEPS", "2")
    monkeypatch.setenv("PAIRS", "1")
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    shown = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(shown) >= 8
    text = "".join(output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert "the same twice: True" in text
    assert "deepcache=3" in text
