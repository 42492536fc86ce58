import json
from pathlib import Path

import pytest

from benchmarks.report import render_families as render

ROOT = Path(__file__).parents[3]
ROW = {"kind": "table", "examples": "Some 7B", "reason": "no trees: why; chain self-check passed"}
CELLS = {"cells": {"greedy": {"identical": True, "forwards": 5}}}


def records(*rows: tuple[str, str, str]) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = {}
    for version, family, backend in rows:
        row = {**ROW, **CELLS, "transformers": version, "family": family, "backend": backend}
        found.setdefault(version, []).append(row)
    return found


def test_page_is_that_of_the_records(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_row_says_why_and_what_is_otherwise_elsewhere():
    known = records(
        ("5.23.0", "a", "chains"), ("5.23.0", "b", "chains"), ("5.17.0", "a", "regular generation")
    )
    table = render.render("chains", {}, records=known).splitlines()
    assert table[0] == "| family | for example | why | differs in |"
    assert table[2:] == [
        "| `a` | Some 7B | why | 5.17.0: regular generation |",
        "| `b` | Some 7B | why | 5.17.0: unknown |",
    ]


def test_summary_counts_families_and_outputs():
    known = records(("5.23.0", "a", "chains"), ("5.23.0", "b", "tree attention"))
    row = render.render("summary", {}, records=known).splitlines()[-1]
    assert row == "| 5.23.0 | 1 + 0 | 1 + 0 | 0 + 0 | 2 | 2 |"


def test_newest_version_comes_first(tmp_path):
    path = tmp_path / render.RESULTS
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"transformers": v}) + "\n" for v in ("5.9.0", "5.23.0")))
    assert list(render.read(tmp_path)) == ["5.23.0", "5.9.0"]


def test_unknown_table_is_refused():
    with pytest.raises(ValueError, match=r"no table 'leaves'.*summary"):
        render.render("leaves", {}, records={})
