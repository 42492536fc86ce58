from benchmarks.decode import prompt_sets
from benchmarks.report import render
from speclm.bench import read_records


def test_records_are_by_category_and_make_a_table(tmp_path):
    out = tmp_path / "prompt_sets.jsonl"
    options = ["--n", "2", "--methods", "ngram", "--max-new-tokens", "4", "--out", str(out)]
    prompt_sets.main(options)
    records = read_records(out)
    assert [record["settings"]["category"] for record in records] == ["mt_bench", "translation"]
    assert [record["num_identical"] for record in records] == [2, 1]
    table = " ".join(render.render(records, "prompt_sets").split())
    assert '| MT-bench | `"ngram"` | ' in table
    assert "identical to `base.generate`: 3 of 3" in table
