import json

import pytest

from speclm.bench import Cell, measure_grid, plain_decoder, report, speculative_decoder
from speclm.bench.report import as_dictionary, recorded, write_report
from speclm.errors import DataError, OptionError
from speclm.methods.ngram.proposer import NgramProposer


@pytest.fixture(scope="module")
def records_of():
    """Measure once, and return copies that a test may change."""
    made = []

    def make(base, calls):
        if not made:
            methods = [
                speculative_decoder("speclm", base, NgramProposer(), adaptive=False),
                plain_decoder(base),
            ]
            settings = {"setting": "greedy", "batch": 2, "heads": "ngram", "base": "a|b"}
            cells = [Cell(calls, settings)]
            measured = measure_grid(cells, methods, base=base, benchmark="bench")
            made.extend(as_dictionary(found.record) for found in measured)
        return json.loads(json.dumps(made))

    return make


@pytest.fixture
def records(records_of, tiny_base, calls_of):
    return records_of(tiny_base, calls_of(batch=2, max_new_tokens=24))


@pytest.fixture
def draws_nothing(monkeypatch):
    for name in ("draw_panels", "draw_bars"):
        monkeypatch.setattr(report, name, lambda *_, **__: b"")


def test_report_has_the_records_a_page_and_charts(tmp_path, records):
    write_report(tmp_path / "report", records)
    files = {path.name for path in (tmp_path / "report").iterdir()}
    charts = {"acceptance", "speed", "latency", "latency_distribution", "round"}
    assert files == {"report.json", "report.md", "report.html", *(f"{c}.png" for c in charts)}
    content = json.loads((tmp_path / "report/report.json").read_text())
    assert content["records"] == records
    ours = content["records"][0]
    assert ours["tau"] == pytest.approx(1 + sum(ours["kept_by_depth"]))
    assert 0 < ours["latency"]["mean"] <= ours["latency"]["p90"] * 1.001
    page = (tmp_path / "report/report.md").read_text()
    tau, share = f"{ours['tau']:.2f}", f"{ours['kept_by_depth'][0]:.1%}"
    assert f"| greedy | 2 | speclm | {tau} |" in page
    assert f"| greedy | 2 | speclm | {share} |" in page
    assert "| greedy | 2 | plain | |" in page  # it has no tau
    assert "| base | a\\|b |" in page
    assert "2 of 2 |" in page


@pytest.mark.usefixtures("draws_nothing")
def test_pauses_and_differences_are_stated(tmp_path, records):
    ours = records[0]
    ours |= {"pause_summary": "3 of 9 rounds without a draft", "kept_by_depth": []}
    ours |= {"num_identical": 1, "divergences": [{"gap": 0.25}]}
    records[1]["promises_identity"] = False
    part = {**ours, "settings": {**ours["settings"], "category": "qa"}}
    ours["tau_by_nodes"] = [[1, 1.5], [8, 2.25]]
    write_report(tmp_path, [*records, part])
    page = (tmp_path / "report.md").read_text()
    assert "- greedy, batch 2: 3 of 9 rounds without a draft" in page
    assert "1 of 2; the others differ at a gap of scores of at most 0.25" in page
    assert "2 of 2, not promised" in page
    assert "| qa | greedy | 2 | speclm | 2 |" in page
    assert "| greedy | 2 | speclm | 1.50 | 2.25 |" in page
    assert "No draft token was accepted." in page


@pytest.mark.usefixtures("draws_nothing")
def test_what_cannot_be_reported_is_named(tmp_path, records):
    with pytest.raises(OptionError, match="no measurement to report"):
        write_report(tmp_path, [])
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be written to"):
        write_report(tmp_path / "file", records)
    older = {name: value for name, value in records[0].items() if name != "kept_by_depth"}
    for wrong in (older, {**records[0], "latency": None}):
        with pytest.raises(DataError, match=r"no 'latency' .*'kept_by_depth'.* measure again"):
            write_report(tmp_path / "report", [wrong])
    assert not (tmp_path / "report").exists()


def test_long_names_of_categories_leave_room_in_charts(monkeypatch, records):
    labels = []

    def draw(_title, names, *_, **__):
        labels.extend(names)
        return b""

    monkeypatch.setattr(report, "draw_bars", draw)
    part = {**records[0], "settings": {**records[0]["settings"], "category": "long\n" * 50}}
    report._speed_chart("", [part])
    assert labels == ["long long long long long long…, greedy"]


def test_records_of_an_earlier_run_are_found_by_their_settings(tmp_path, records):
    path = tmp_path / "out.jsonl"
    part = {**records[1], "settings": {**records[1]["settings"], "category": "qa"}}
    path.write_text("".join(json.dumps(record) + "\n" for record in [part, part, *records]))
    wanted = [records[1]["settings"], {"setting": "t1.0"}]
    assert recorded(path, benchmark="bench", settings=wanted) == [records[1], part]
