"""Every notebook of the documentation runs from top to bottom, and is stored without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
TIMEOUT_SECONDS = 300

# Notebooks import the checkout that they belong to, and compute on one thread.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

# Runs in its own process: code cells come as JSON on stdin, and share one namespace.
WORKER = """
import json, sys
namespace = {"__name__": "__main__"}
for name, source in json.load(sys.stdin):
    exec(compile(source, name, "exec"), namespace)
"""


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run_notebook(notebook: Path, folder: Path) -> None:
    """Run the code cells in a folder; fail with what the first broken one printed."""
    cells = code_cells(notebook)
    named = [(f"{notebook.name}, cell {cell['id']}", "".join(cell["source"])) for cell in cells]
    result = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=json.dumps(named),
        cwd=folder,
        env=ENVIRONMENT,
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(notebook, tmp_path):
    run_notebook(notebook, tmp_path)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_holds_no_outputs(notebook):
    for cell in code_cells(notebook):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_cells_have_names_of_their_own(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.fixture
def run(tmp_path):
    def run_cells(*sources: str) -> None:
        cells = [
            {"cell_type": "code", "id": f"c{index}", "source": source.splitlines(keepends=True)}
            for index, source in enumerate(sources)
        ]
        path = tmp_path / "page.ipynb"
        path.write_text(json.dumps({"cells": cells}))
        run_notebook(path, tmp_path)

    return run_cells


def test_cells_share_a_namespace_in_order(run, tmp_path):
    run("x = 1\ny = 2", "open('out', 'w').write(str(x + y))")
    assert (tmp_path / "out").read_text() == "3"


def test_error_names_the_cell(run):
    with pytest.raises(AssertionError, match=r"page\.ipynb, cell c1"):
        run("x = 1", "y")
