import importlib
import json

import pytest


@pytest.fixture
def short_calls():
    return importlib.import_module("benchmarks.decode.short_calls")  # imports lm_eval


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


def test_other_output_is_not_recorded(short_calls):
    with pytest.raises(SystemExit, match="call 0 differs"):
        short_calls.pair(lambda _: [1], lambda _: [2], 0)
