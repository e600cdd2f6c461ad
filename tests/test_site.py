"""Tests that the documentation site builds without warnings and that the notebook runs."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """Returns the kinds of the outputs of each code cell: stdout, or an image."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        [
            output.get("name", output.output_type)
            for output in cell.outputs
            if output.get("name") != "stderr"
        ]
        for cell in cells
    ]


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", tmp_path / "trees", ROOT / "docs", tmp_path / "site"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "load_model" in (tmp_path / "site" / "api" / "models.html").read_text()


@pytest.mark.slow
def test_notebook_runs_and_has_the_stored_outputs(tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # one device, as a reader has
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = kinds(notebook)
    assert ["stdout"] in stored and ["display_data"] in stored  # stored with its outputs
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=place).execute()
    assert kinds(notebook) == stored
