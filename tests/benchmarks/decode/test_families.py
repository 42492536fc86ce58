import json
from pathlib import Path

from benchmarks.decode import families

ROOT = Path(__file__).parents[3]


def test_rows_take_the_place_of_those_of_their_version_and_kind(tmp_path):
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


def test_any_model_type_can_be_surveyed():
    row = families.measure(families.survey_model("glm4_moe_lite"))  # latent attention and experts
    assert row["backend"] == "tree attention"
    assert all(cell["identical"] for cell in row["cells"].values())
    assert row["cells"]["greedy"]["forwards"] < 12
