"""docs/notebooks/sagemaker.ipynb is run as it stands, but for the cells that install and that need AWS."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/notebooks/sagemaker.ipynb"
ELSEWHERE = {"install", "aws"}  # tags of cells that are not run here


def test_the_notebook_is_valid_and_holds_no_output():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    tags = {tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])}
    assert tags == ELSEWHERE
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.timeout(600)
def test_the_notebook_runs_up_to_the_submit(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if not ELSEWHERE & set(cell.metadata.get("tags", []))]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    root = str(NOTEBOOK.parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    for cell in notebook.cells:
        cell.source = cell.source.replace('RUN = ["experiment=quick"]', 'RUN = ["experiment=quick", "train.budget=6steps"]')
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "report.html" in printed
    assert '"TrainingJobName": "from-notebook-' in printed
    assert "parameters" in printed
    assert (tmp_path / "runs/rehearsal/model/config.json").is_file()
    assert not (tmp_path / "runs/from-notebook").exists(), "a dry run leaves nothing"
