import json
from pathlib import Path

import pytest

from speclm.bench import (
    Divergence,
    Record,
    Spread,
    append_record,
    compare,
    plain_decoder,
    read_records,
)
from speclm.bench.records import decode_record, is_recorded, time_record
from speclm.errors import DataError, MeasurementError, OptionError, SpeclmError

EXPLAINED = Divergence(0, 0, 5, 1, 2, gap=0.1, logit_difference=0.1)
UNEXPLAINED = Divergence(0, 0, 5, 1, 2, gap=9.0, logit_difference=0.1)


def record(**fields):
    values = {
        "benchmark": "decode",
        "settings": {"method": "ngram"},
        "unit": "ratio",
        "n": 3,
        "median": 2.0,
        "lower_quartile": 1.5,
        "upper_quartile": 2.5,
        "num_identical": 3,
    }
    return Record(**{**values, **fields})


def test_records_are_appended_line_by_line(tmp_path):
    path = tmp_path / "results" / "decode.jsonl"
    append_record(path, record())
    append_record(path, record(settings={"method": "draft"}))
    found = read_records(path)
    assert [line["settings"]["method"] for line in found] == ["ngram", "draft"]
    assert set(found[0]) >= {"machine", "versions", "commit", "date", "median", "n"}
    assert list(path.parent.iterdir()) == [path]


def test_a_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "decode.jsonl"
    path.write_text('{"old": 1}')
    append_record(path, record())
    first, second = path.read_text().splitlines()
    assert json.loads(first) == {"old": 1}
    assert json.loads(second)["benchmark"] == "decode"


def test_an_interrupted_write_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "decode.jsonl"
    append_record(path, record())
    before = path.read_bytes()

    def fail(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        append_record(path, record())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_identical": 2},
        {"num_identical": 2, "divergences": [UNEXPLAINED]},
        {"num_identical": 1, "divergences": [EXPLAINED]},
    ],
    ids=["not listed", "not explained", "one of two listed"],
)
def test_outputs_that_differ_are_not_recorded(tmp_path, fields):
    path = tmp_path / "decode.jsonl"
    with pytest.raises(MeasurementError, match=r"differ.*regular generation.*nothing was recorded"):
        append_record(path, record(**fields))
    assert not path.exists()
    assert issubclass(MeasurementError, SpeclmError)
    assert issubclass(MeasurementError, RuntimeError)


def test_explained_divergences_are_recorded_and_listed(tmp_path):
    path = tmp_path / "decode.jsonl"
    append_record(path, record(num_identical=2, divergences=[EXPLAINED]))
    (found,) = read_records(path)
    assert found["divergences"][0]["gap"] == 0.1


def test_an_method_that_promises_nothing_is_recorded_with_its_count(tmp_path):
    path = tmp_path / "decode.jsonl"
    append_record(path, record(promises_identity=False, num_identical=0))
    assert read_records(path)[0]["num_identical"] == 0


def test_a_measurement_is_found_again_at_the_same_commit_only(tmp_path, monkeypatch):
    path = tmp_path / "decode.jsonl"
    assert not is_recorded(path, benchmark="decode", settings={"method": "ngram"})
    append_record(path, record())
    assert is_recorded(path, benchmark="decode", settings={"method": "ngram"})
    assert not is_recorded(path, benchmark="decode", settings={"method": "draft"})
    assert not is_recorded(path, benchmark="other", settings={"method": "ngram"})
    lines = path.read_text().replace(str(read_records(path)[0]["commit"]["sha"]), "another")
    path.write_text(lines)
    assert not is_recorded(path, benchmark="decode", settings={"method": "ngram"})


def test_decode_record_holds_ratio_and_counters(tiny_base, calls_of):
    plain = plain_decoder(tiny_base)
    comparison = compare(plain, plain, calls_of(max_new_tokens=2), base=tiny_base)
    found = decode_record(comparison, benchmark="decode", settings={"method": "plain"})
    assert (found.n, found.num_identical) == (4, 4)
    assert found.median == comparison.ratio.median
    assert found.tau is None
    assert found.unexplained == []


def test_time_record_has_no_outputs_to_compare():
    found = time_record(Spread(1.0, 2.0, 3.0), n=5, benchmark="import", settings={})
    assert (found.median, found.unit, found.num_identical) == (2.0, "ms", None)


def test_text_of_settings_may_hold_any_line_separator(tmp_path):
    path = tmp_path / "decode.jsonl"
    append_record(path, record(settings={"prompts": "a\u2028b\x85c"}))
    assert read_records(path)[0]["settings"] == {"prompts": "a\u2028b\x85c"}


@pytest.mark.parametrize("line", ["nonsense", "{}", '{"benchmark": 1, "settings": 2, "commit": 3}'])
def test_lines_that_are_no_records_are_named(tmp_path, line):
    path = tmp_path / "decode.jsonl"
    append_record(path, record())
    path.write_text(path.read_text() + line)
    with pytest.raises(DataError, match=r"decode\.jsonl:2: expected a"):
        read_records(path)


@pytest.mark.parametrize("path", [".", "/dev/null"])
def test_folders_and_devices_are_not_replaced(path):
    with pytest.raises(OptionError, match="is a folder or a device"):
        append_record(Path(path), record())
