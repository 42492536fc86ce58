"""Every notebook of the documentation runs from top to bottom, and is stored without outputs."""

import json
from pathlib import Path

import pytest

from tests.docs.fresh_process import Processes, Step

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_cells(notebook: Path) -> list[dict]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def run_notebook(processes: Processes, notebook: Path, folder: Path) -> None:
    """Run the code cells in a folder; fail with what the first broken one printed."""
    cells: list[Step] = [
        (f"{notebook.name}, cell {cell['id']}", 0, "".join(cell["source"]))
        for cell in code_cells(notebook)
    ]
    failure = processes.run(cells, folder)
    assert failure is None, failure


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(notebook, processes, tmp_path):
    run_notebook(processes, notebook, tmp_path)


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
def run(processes, tmp_path):
    def run_cells(*sources: str) -> None:
        cells = [
            {"cell_type": "code", "id": f"c{index}", "source": source.splitlines(keepends=True)}
            for index, source in enumerate(sources)
        ]
        path = tmp_path / "page.ipynb"
        path.write_text(json.dumps({"cells": cells}))
        run_notebook(processes, path, tmp_path)

    return run_cells


def test_cells_share_a_namespace_in_order(run, tmp_path):
    run("x = 1\ny = 2", "open('out', 'w').write(str(x + y))")
    assert (tmp_path / "out").read_text() == "3"


def test_error_names_the_cell(run):
    with pytest.raises(AssertionError, match=r"page\.ipynb, cell c1"):
        run("x = 1", "y")
