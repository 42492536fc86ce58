import gc
import importlib
import json
import re
import shutil

import pytest

from speclm.demo.bundle import assets
from speclm.errors import OptionError, PromptError, SpeclmError
from speclm.model.publishing import prepare_publication

bench_module = importlib.import_module("speclm.cli.bench")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "SELECT a FROM"}\n{"messages": [{"role": "user", "content": "2?"}]}'
    )
    return path


OWN_METHOD = """
from speclm.methods.ngram.proposer import NgramProposer


def make(base):
    assert base.config.vocab_size
    return NgramProposer(num_draft_tokens=3)
"""


def test_bench_prints_a_table_and_appends_records(run, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ("--batch", "1,2", "--max-new-tokens", "4", "--threads", "1", "--prompt-lookup")
    result = run(
        "bench", "--prompts", str(prompts), *options, "--heads", "ngram", "--out", str(out)
    )
    assert result.exit_code == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == 6  # prompt lookup takes one prompt at a time
    assert all(record["num_identical"] == record["n"] for record in records[::2])
    assert "prompt_lookup" in result.output


def test_method_of_ones_own_is_measured(run, prompts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_method.py").write_text(OWN_METHOD)
    options = ("--num-prompts", "1", "--max-new-tokens", "4", "--setting", "greedy")
    out = ("--out", "out.jsonl", "--depth", "2")
    result = run("bench", "--prompts", str(prompts), "--heads", "own_method:make", *options, *out)
    assert result.exit_code == 0
    (record,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert record["settings"]["heads"] == "own_method:make"
    assert record["settings"]["depth"] == 2


def test_bad_options_are_named(run, prompts):
    for options, message in [
        (("--batch", "0"), "--batch has '0'"),
        (("--setting", "t9"), "setting 't9' is not known"),
    ]:
        with pytest.raises(OptionError, match=message):
            run("bench", "--prompts", str(prompts), *options)


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a poem.", "Rewrite it."]},
    {"question_id": 321, "category": "qa", "turns": ["who wrote it"]},
    {"question_id": 9, "category": "rag", "turns": ["many words " * 2000]},
]


def test_questions_are_answered_turn_by_turn_and_reported_by_category(run, tmp_path):
    prompts, out, report = (tmp_path / name for name in ("q.jsonl", "out.jsonl", "report"))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    options = ("--prompts", str(prompts), "--max-new-tokens", "4", "--heads", "ngram")
    files = ("--setting", "greedy", "--out", str(out), "--report", str(report))
    answers = ("--answers", str(tmp_path / "answers"))
    result = run("bench", *options, *files, *answers)
    assert result.exit_code == 0
    assert re.search(r"question 9 has \d+ tokens, and the model has 2048 positions", result.output)
    assert re.search(r"mt_bench +2 .*\n.*qa +1 ", result.output)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["settings"].get("category") for record in records] == ["mt_bench", "qa", None]
    assert [record["n"] for record in records] == [2, 1, 3]
    (first, _) = (tmp_path / "answers" / "speclm-greedy.jsonl").read_text().splitlines()
    assert len(json.loads(first)["choices"][0]["turns"]) == 2
    page = (report / "report.md").read_text()
    assert "| mt_bench | greedy | 1 | speclm | 2 |" in page
    assert all(f"({chart.name})" in page for chart in report.glob("*.png"))
    assert {"categories.png", "report.html"} <= {path.name for path in report.iterdir()}
    with pytest.raises(OptionError, match=r"no answer to write; .* new file of --out"):
        run("bench", *options, *files[:4], *answers)


def test_prompts_that_are_all_too_long_are_named(run, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTIONS[2]))
    with pytest.raises(PromptError, match=r"no prompt leaves room.*question 9 has \d+ tokens"):
        run("bench", "--prompts", str(path))


class LoadedError(Exception):
    """Stands for what comes after the checks."""


@pytest.fixture
def bench(run, prompts, monkeypatch):
    def load(*_, **__):
        raise LoadedError

    monkeypatch.setattr(bench_module, "load_with_heads", load)
    return lambda *options: run("bench", "--prompts", str(prompts), *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "specbench"), r"'specbench', expected a file or one of .*'spec-bench'"),
        (("--prompts", "humaneval"), r"not bundled; download .*HumanEval\.jsonl\.gz.*--prompts"),
        (("--prompts", "none.jsonl"), r"none\.jsonl cannot be read"),
        (("--prompts", "mt-bench", "--batch", "1,2"), r"question 81 has 2 turns.*--batch 1"),
        (("--answers", "answers", "--batch", "2"), r"--answers has the answers of batches of 1"),
    ],
)
def test_sets_that_cannot_be_measured_are_named_before_anything_is_loaded(
    bench, tmp_path, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpeclmError, match=message):
        bench(*options)


@pytest.mark.parametrize("name", [".", "file/out.jsonl", "a/b/out.jsonl", "prompts.jsonl"])
def test_file_that_cannot_take_records_is_named_before_anything_is_loaded(bench, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpeclmError, match=re.escape(str(tmp_path / name))):
        bench("--out", str(tmp_path / name))


def test_folders_are_made_on_request(bench, tmp_path):
    with pytest.raises(LoadedError):
        bench("--out", str(tmp_path / "a" / "b" / "out.jsonl"), "--make-folders")
    assert (tmp_path / "a" / "b").is_dir()


def test_memory_is_read_and_named_in_the_record(run, prompts, tmp_path):
    options = ("--max-new-tokens", "4", "--heads", "lookup", "--setting", "greedy")
    memory, out = tmp_path / "m.safetensors", tmp_path / "out.jsonl"
    files = ("--memory", str(memory), "--out", str(out))
    assert run("bench", "--prompts", str(prompts), *options, *files).exit_code == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["settings"]["memory"] == "m.safetensors"
    gc.collect()
    assert memory.exists()


def test_report_is_written_also_for_what_an_earlier_run_measured(run, prompts, tmp_path):
    out, report = tmp_path / "out.jsonl", tmp_path / "report"
    options = ("--prompts", str(prompts), "--max-new-tokens", "4", "--heads", "ngram")
    files = ("--out", str(out), "--report", str(report))
    for setting in ("greedy", "greedy,t1.0"):
        result = run("bench", *options, "--setting", setting, "--no-pauses", *files)
        assert f"report is in {report}" in result.output
    assert f"greedy, batch 1, speclm: {out} has this measurement" in result.output
    records = json.loads((report / "report.json").read_text())["records"]
    assert [record["settings"]["setting"] for record in records] == ["greedy", "t1.0"]
    assert [record["settings"]["pauses"] for record in records] == [False, False]
    assert records == [json.loads(line) for line in out.read_text().splitlines()]
    prompts.write_text('{"prompt": "of the same name"}\n' * 2)
    run("bench", *options, "--setting", "greedy", "--no-pauses", "--out", str(out))
    assert len(out.read_text().splitlines()) == len(records) + 1


def test_report_of_heads_in_a_folder_names_their_weights(run, prompts, tmp_path):
    heads = tmp_path / "heads"
    shutil.copytree(assets()["medusa"], heads)
    options = ("--num-prompts", "1", "--max-new-tokens", "4", "--setting", "greedy")
    files = ("--heads", str(heads), "--report", str(heads / "report"))
    run("bench", "--prompts", str(prompts), *options, *files)
    assert "| tau as decoded, greedy, batch 1 |" in prepare_publication(heads, "me/heads").card


def test_report_needs_matplotlib_and_a_folder_before_anything_is_loaded(
    bench, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"--report .* cannot be written"):
        bench("--report", str(tmp_path / "file"))
    monkeypatch.setattr("speclm.plots.find_spec", lambda _: None)
    with pytest.raises(OptionError, match=r"--report draws .*'speclm\[plots\]'"):
        bench("--report", str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()
