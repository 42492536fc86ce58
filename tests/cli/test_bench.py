import importlib
import json
import re

import pytest

from speclm.cli._options import positive_numbers
from speclm.cli._prompts import read_prompts
from speclm.errors import DataError, OptionError, SpeclmError

bench_module = importlib.import_module("speclm.cli.bench")

PROMPTS = [
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
    {"prompt": "SELECT a FROM"},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n\n")
    return path


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


def test_a_conversation_loses_its_answer(prompts):
    assert read_prompts("--prompts", prompts) == [
        [{"role": "user", "content": "2 + 2?"}],
        "SELECT a FROM",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--prompts .* is empty"),
        ("not json", ":1: expected a JSON object"),
        ('{"text": "a"}', ':1: expected "prompt", a string, or "messages"'),
        ('{"messages": [1]}', ':1: expected "prompt", a string, or "messages"'),
        ('{"prompt": ""}', ":1: the prompt is empty"),
        ('{"messages": []}', ":1: no message that asks"),
        ('{"messages": [{"role": "assistant", "content": "4"}]}', ":1: no message that asks"),
    ],
)
def test_bad_prompt_files_are_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts("--prompts", path)


def test_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts("--prompts", tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--batch", "0"), "--batch has '0'"), (("--settings", "t9"), "setting 't9' is not known")],
)
def test_bad_options_are_named(run, prompts, options, message):
    with pytest.raises(OptionError, match=message):
        run("bench", "--prompts", str(prompts), *options)


def test_line_separators_inside_a_prompt_stay_in_it(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), "utf-8")
    assert read_prompts("--prompts", path) == ["a\u2028b\x85c"]


class LoadedError(Exception):
    """Stands for what comes after the checks."""


@pytest.fixture
def bench(run, prompts, monkeypatch):
    def load(*_, **__):
        raise LoadedError

    monkeypatch.setattr(bench_module, "load", load)
    return lambda *options: run("bench", "--prompts", str(prompts), *options)


@pytest.mark.parametrize("name", [".", "file/out.jsonl", "a/b/out.jsonl", "prompts.jsonl"])
def test_file_that_cannot_take_records_is_named_before_anything_is_loaded(bench, tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(SpeclmError, match=re.escape(str(tmp_path / name))):
        bench("--out", str(tmp_path / name))


def test_folders_are_made_on_request(bench, tmp_path):
    with pytest.raises(LoadedError):
        bench("--out", str(tmp_path / "a" / "b" / "out.jsonl"), "--make-folders")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("text", ["", "1,,2", "-1", "²", "1" * 5000])
def test_numbers_of_rows_are_positive(text):
    with pytest.raises(OptionError, match="--batch has"):
        positive_numbers(text)
