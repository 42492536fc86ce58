import json
from pathlib import Path

import pytest
import torch

from speclm import __version__
from speclm.bench import (
    Cell,
    Divergence,
    Record,
    Spread,
    append_record,
    compare,
    measure_grid,
    plain_decoder,
    prompt_lookup_decoder,
    read_records,
    records,
    speculative_decoder,
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


def test_outputs_that_differ_are_not_recorded(tmp_path):
    path = tmp_path / "decode.jsonl"
    refused = [
        {"num_identical": 2},
        {"num_identical": 2, "divergences": [UNEXPLAINED]},
        {"num_identical": 1, "divergences": [EXPLAINED]},
    ]
    for fields in refused:  # not listed, not explained, one of two listed
        with pytest.raises(MeasurementError, match=r"differ.*regular.*nothing was recorded"):
            append_record(path, record(**fields))
    assert not path.exists()
    assert issubclass(MeasurementError, SpeclmError)
    assert issubclass(MeasurementError, RuntimeError)


def test_explained_divergences_are_recorded_and_listed(tmp_path):
    path = tmp_path / "decode.jsonl"
    append_record(path, record(num_identical=2, divergences=[EXPLAINED]))
    (found,) = read_records(path)
    assert found["divergences"][0]["gap"] == 0.1


def test_a_method_that_promises_nothing_is_recorded_with_its_count(tmp_path):
    path = tmp_path / "decode.jsonl"
    append_record(path, record(promises_identity=False, num_identical=0))
    assert read_records(path)[0]["num_identical"] == 0


def test_a_measurement_is_found_again_at_the_same_version_and_commit_only(tmp_path, monkeypatch):
    path = tmp_path / "decode.jsonl"
    assert not is_recorded(path, benchmark="decode", settings={"method": "ngram"})
    append_record(path, record())
    assert is_recorded(path, benchmark="decode", settings={"method": "ngram"})
    assert not is_recorded(path, benchmark="decode", settings={"method": "draft"})
    assert not is_recorded(path, benchmark="other", settings={"method": "ngram"})
    lines = path.read_text().replace(str(read_records(path)[0]["commit"]["sha"]), "another")
    path.write_text(lines)
    assert not is_recorded(path, benchmark="decode", settings={"method": "ngram"})
    append_record(path, record())
    monkeypatch.setattr(records, "__version__", "9.9")  # an installed package has no commit
    assert not is_recorded(path, benchmark="decode", settings={"method": "ngram"})


def test_decode_record_holds_ratio_and_counters(tiny_base, calls_of):
    plain = plain_decoder(tiny_base)
    (comparison,) = compare(plain, [plain], calls_of(max_new_tokens=2), base=tiny_base)
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


def test_lines_that_are_not_records_are_named(tmp_path):
    path = tmp_path / "decode.jsonl"
    append_record(path, record())
    first = path.read_text()
    wrong = ({"settings": []}, {"commit": {}}, {"versions": None}, {"benchmark": 1})
    changed = [json.dumps({**json.loads(first), **change}) for change in wrong]
    for line in ("nonsense", "{}", *changed):
        path.write_text(first + line)
        with pytest.raises(DataError, match=r"decode\.jsonl:2: expected a"):
            read_records(path)


def test_folders_and_devices_are_not_replaced():
    for path in (".", "/dev/null"):
        with pytest.raises(OptionError, match="is a folder or a device"):
            append_record(Path(path), record())


def test_grid_is_recorded_cell_by_cell_and_resumed(tmp_path, tiny_base, calls_of):
    path = tmp_path / "grid.jsonl"
    cells = [Cell(calls_of(batch=size, max_new_tokens=2), {"batch": size}) for size in (1, 4)]
    methods = [
        plain_decoder(tiny_base),
        speculative_decoder("none", tiny_base, None),
        prompt_lookup_decoder(tiny_base),
    ]

    def run(some_cells):
        return measure_grid(some_cells, methods, base=tiny_base, benchmark="test", path=path)

    first = next(run(cells))
    assert first.record.settings == {"batch": 1, "method": "plain"}
    assert len(read_records(path)) == 1
    names = [(m.record.settings["batch"], m.comparison.method) for m in run(cells)]
    assert names == [(1, "none"), (1, "prompt_lookup"), (4, "plain"), (4, "none")]
    assert list(run(cells)) == []


def test_without_a_path_everything_is_measured(tiny_base, calls_of):
    cell = Cell(calls_of(max_new_tokens=2), {})
    methods = [speculative_decoder("none", tiny_base, None)]
    for _ in range(2):
        (measured,) = measure_grid([cell], methods, base=tiny_base, benchmark="test")
        assert measured.record.num_identical == 4


def test_machine_names_processor_cores_and_threads():
    found = records.describe_machine()
    assert found.cpu
    assert found.num_cores >= 1
    assert found.num_threads == torch.get_num_threads()
    assert len(found.gpus) == torch.cuda.device_count()


def test_versions_are_those_in_use():
    versions = records.describe_versions()
    assert versions["torch"] == torch.__version__
    assert versions["speclm"] == __version__
    assert set(versions) - {"triton"} == {"python", "torch", "transformers", "speclm"}


def test_package_without_metadata_has_no_version():
    assert records._version_of("no-such-package-here") == "unknown"


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_ROOT", tmp_path)
    assert records.describe_commit() == records.Commit(sha=None, is_dirty=False)
    (tmp_path / ".git").mkdir()  # git finds no repository in it
    assert records.describe_commit().sha is None


def test_processor_falls_back_on_the_platform(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_CPU_INFO", tmp_path / "none")
    assert records._cpu_model()


def test_triton_is_named_where_it_is_installed(monkeypatch):
    for found, expected in (("3.9.9", "3.9.9"), ("unknown", None)):
        monkeypatch.setattr(records, "_version_of", lambda name, found=found: found)
        assert records.describe_versions().get("triton") == expected
