from benchmarks.decode import speedup
from speclm.bench import read_records


def test_one_run_replaces_the_records_and_stops_in_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speedup, "METHODS", ("prompt_lookup", "ngram"))
    path = tmp_path / "speedup.jsonl"
    path.write_text("of another run\n")
    fixed = ["--n", "2", "--sets", "sql", "--settings", "greedy", "--max-new-tokens", "4"]
    speedup.main(["--minutes", "0", *fixed, "--out", str(path)])
    records = read_records(path)
    settings = [record["settings"] for record in records]
    methods = ["prompt_lookup", "ngram", "eagle3 auto"]
    assert [found["method"] for found in settings] == methods
    assert [record["n"] for record in records] == [1, 1, 1]
    assert {found["num_prompts"] for found in settings} == {1}
    assert all(record["num_identical"] == 1 for record in records)
    assert "eagle3 auto" in capsys.readouterr().out
