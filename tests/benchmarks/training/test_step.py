import json

from benchmarks.training import step


def test_steps_of_a_training_are_compared_with_bare_ones(tmp_path):
    path = tmp_path / "training.jsonl"
    step.main(["--recipes", "medusa", "--steps", "1", "--batch", "1", "--out", str(path)])
    record = json.loads(path.read_text())
    assert (record["n"], record["settings"]["method"]) == (1, "medusa")
    assert record["median"] > 0
