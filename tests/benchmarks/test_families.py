import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def families(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("families")
    for name in ("families", "markers"):
        sys.modules.pop(name, None)


def test_rows_take_the_place_of_those_of_their_version_and_kind(families, tmp_path):
    path = tmp_path / "families.jsonl"
    table = {"kind": "table", "family": "a"}
    families.write(path, [table, {"kind": "survey", "family": "b"}], version="5.23.0")
    families.write(path, [table], version="5.17.0")
    families.write(path, [{**table, "backend": "chains"}], version="5.23.0")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["transformers"], row["family"], row.get("backend")) for row in rows] == [
        ("5.17.0", "a", None),
        ("5.23.0", "a", "chains"),
        ("5.23.0", "b", None),
    ]


def test_any_model_type_can_be_surveyed(families):
    row = families.measure(families.survey_model("glm4_moe_lite"))  # latent attention and experts
    assert row["backend"] == "tree attention"
    assert all(cell["identical"] for cell in row["cells"].values())
    assert row["cells"]["greedy"]["forwards"] < 12
