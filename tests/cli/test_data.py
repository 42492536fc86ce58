import json
import subprocess
import sys
from pathlib import Path

import pytest

from speclm.errors import OptionError

ROOT = Path(__file__).parents[2]
ROWS = [
    {"id": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"from": "gpt", "value": "\x1b[31m"}]},
    {"question": "q", "answer": "a"},
]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def convert(run, chats, tmp_path):
    def run_convert(*words):
        out = tmp_path / "made" / "messages.jsonl"
        return out, run("data", "convert", str(chats), "--out", str(out), *map(str, words))

    return run_convert


def test_convert_writes_messages_and_shows_what_became_of_the_rows(convert, chats, tmp_path):
    report = tmp_path / "report.json"
    out, result = convert("--report", report)
    assert result.exit_code == 0
    answers = [json.loads(line)["messages"][1] for line in out.read_text().splitlines()]
    assert [answer["content"] for answer in answers] == ["a", "a"]
    shown = " ".join(result.output.split())
    assert "1 dropped no turn of the assistant follows one of the user first" in shown
    assert "2 of 3 rows are in" in shown
    assert "\x1b" not in result.output
    saved = json.loads(report.read_text())
    assert (saved["num_kept"], saved["num_dropped"]) == (2, 1)
    assert saved["outcomes"][0]["where"] == f"{chats}, row 2"
    with pytest.raises(OptionError, match="exists"):
        convert()
    convert("--overwrite", "--deduplicate", "--schema", "sharegpt")
    assert len(out.read_text().splitlines()) == 1


def test_files_that_cannot_be_written_are_named_before_anything_is_read(convert, chats, tmp_path):
    with pytest.raises(OptionError, match=r"--report .* is also the output or a source"):
        convert("--report", chats)
    with pytest.raises(OptionError, match=r"--report is .* a folder or a device"):
        convert("--report", tmp_path)
    assert not (tmp_path / "made" / "messages.jsonl").exists()


def test_report_that_cannot_be_written_is_named(monkeypatch, convert, tmp_path):
    def fail(*arguments):
        raise OSError("full")

    monkeypatch.setattr("speclm.cli.data.write_json", fail)
    with pytest.raises(OptionError, match=r"--report .* cannot be written \(full\)"):
        convert("--report", tmp_path / "report.json")


def test_convert_imports_no_torch(chats, tmp_path):
    words = ["data", "convert", str(chats), "--out", str(tmp_path / "a.jsonl")]
    code = f"""
import sys
from typer.testing import CliRunner
from speclm.cli import app
for words in ({words!r}, ["data", "convert", "--help"]):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
