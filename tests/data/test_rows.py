import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speclm.data import rows
from speclm.data.rows import BrokenLine, read_rows
from speclm.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.json"


def values(path):
    return [row.value for row in read_rows(path)]


@given(st.lists(VALUES, min_size=1, max_size=6), st.integers(1, 40), st.booleans(), st.booleans())
def test_an_array_is_read_as_json_does_wherever_chunks_end(
    tmp_path_factory, found, chunk_bytes, is_indented, is_ascii
):
    path = tmp_path_factory.mktemp("rows") / "a.json"
    text = json.dumps(found, indent=2 if is_indented else None, ensure_ascii=is_ascii)
    path.write_bytes(b"\n" + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK_BYTES", chunk_bytes)
        assert values(path) == found


def test_lines_and_rows_are_named(path):
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n \n{"a":\xe2\x80\xa8\n{"a": "b\xe2\x80\xa8c"}')
    first, broken, last = read_rows(path)
    assert (first.value, first.where, first.excerpt) == ({"a": 1}, f"{path}:1", '{"a": 1}')
    assert isinstance(broken, BrokenLine)
    assert (broken.where, broken.excerpt, broken.reason) == (f"{path}:3", '{"a":', "broken_json")
    assert (last.value, last.where) == ({"a": "b\u2028c"}, f"{path}:4")
    path.write_bytes(b'\xef\xbb\xbf[1,\n\n"' + b"x" * 99 + b'"]')
    assert [row.where for row in read_rows(path)] == [f"{path}, row 1", f"{path}, row 2"]
    assert [len(row.excerpt) for row in read_rows(path)] == [1, 80]


BROKEN = [
    ('[{"a": 1},\n{"a": }]', r"line 2: .* found '}\]' \(Expecting value"),
    ('[{"a": 1}\n{"a": 2}]', r"line 2: .* found .*no comma after row 1"),
    ('[{"a": 1},\n{"a": 2}', r"line 2: .* found the end of the file \(no comma after row 2"),
    ('[{"a": 1},\n{"a": "b', r"line 2: .* found '\"b' \(Unterminated string"),
    ('[{"a": 1},\n]', r"line 2: .* found '\]' \(Expecting value"),
    ('[{"a": 1}]\n[2]', r"line 2: .* found '\[2\]' \(text after the end"),
    ("[\n" + "[" * 100_000, r"line 2: .*RecursionError"),
    ("[\n" + "9" * 5_000 + "]", r"line 2: .*digits"),
    ('[\n"' + "x" * 20_000 + '"]', r"line 2: .*more than 8000 characters, or no end"),
]


def test_a_broken_array_is_an_error_that_names_the_line(monkeypatch, path):
    monkeypatch.setattr(rows, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(rows, "MAX_ROW_LENGTH", 8_000)
    for text, message in BROKEN:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            list(read_rows(path))


def test_an_excerpt_is_short_whatever_the_row():
    nested = [0]
    for _ in range(900):  # can be parsed, and not be written by the same rules
        nested = [nested]
    assert len(rows.excerpt(nested)) < 80
    assert len(rows.excerpt([[1, 2]] * 1000)) == 80
    assert rows.excerpt("a") == "a"


def test_lines_that_cannot_be_parsed_are_passed_on(monkeypatch, path):
    monkeypatch.setattr(rows, "MAX_ROW_LENGTH", 6_000)
    lines = ["9" * 20_000, "9" * 5_000, '{"b": 1} 2', '{"b": 1}']
    path.write_text("\n".join(lines))
    found = list(read_rows(path))
    assert [getattr(row, "reason", None) for row in found[:1]] == ["too_long"]
    assert [row.where for row in found] == [f"{path}:{line}" for line in (1, 2, 3, 4)]
    assert [isinstance(row, BrokenLine) for row in found] == [True, True, True, False]
    assert "6000 bytes" in found[0].detail
    assert "digits" in found[1].detail
    assert "Extra data" in found[2].detail


NO_ROWS = [
    (None, r"rows\.json cannot be read .*No such file.*name a JSON file"),
    (b"", r"rows\.json has no rows, expected"),
    (b" \n\n", "has no rows"),
    (b"[ ]\n", "has no rows"),
    (b"PAR1\0\0", r"is binary, compressed or not in UTF-8, it starts with b'PAR1"),
    ('{"a": 1}'.encode("utf-16"), r"save it as UTF-8"),
]


def test_files_without_rows_are_named(path):
    for content, message in NO_ROWS:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            list(read_rows(path))


def test_names_that_are_no_files_are_named(tmp_path):
    for name in (".", "a\0b"):
        with pytest.raises(DataError, match=r"cannot be read.*name a JSON file"):
            list(read_rows(tmp_path / name))


def test_bytes_that_are_not_utf8_stay_in_their_row(path):
    for content in (b'[{"a": "\xff"}, {"a": "b"}]', b'{"a": "\xff"}\n{"a": "b"}'):
        path.write_bytes(content)
        assert values(path) == [{"a": "\udcff"}, {"a": "b"}]


@pytest.mark.parametrize("is_array", [True, False])
def test_memory_does_not_grow_with_the_file(path, is_array):
    row = json.dumps({"text": "x" * 10_000}) + "\n"
    path.write_text(f"[{','.join([row] * 500)}]" if is_array else row * 500)
    num_bytes = []
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path, progress=num_bytes.append)) == 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert sum(num_bytes) == path.stat().st_size > 5_000_000
