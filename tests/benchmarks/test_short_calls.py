import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def short_calls(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("short_calls")
    sys.modules.pop("short_calls")


def test_first_and_later_calls_are_recorded_next_to_the_bases(short_calls, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    arguments = "--places lm_eval,pipeline,stop_strings --methods none --batch 2 --tokens 3"
    monkeypatch.setattr(
        "sys.argv",
        ["short_calls.py", *arguments.split(), "--calls", "1", "--first", "1", "--out", str(out)],
    )
    short_calls.main()
    records = [json.loads(line)["settings"] for line in out.read_text().splitlines()]
    assert [(found["place"], found["calls"]) for found in records] == [
        (place, calls)
        for place in ("lm_eval", "pipeline", "stop_strings")
        for calls in ("later", "first")
    ]


def test_other_output_is_no_result(short_calls):
    with pytest.raises(SystemExit, match="call 0 differs"):
        short_calls.pair(lambda _: [1], lambda _: [2], 0)
