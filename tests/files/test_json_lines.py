import gzip
import json

import pytest

from speclm.errors import DataError
from speclm.files.json_lines import parse_json_lines, read_json_lines

# Python's splitlines() ends a line at each of them, and JSON strings may hold them as they are.
OTHER_LINE_ENDS = "\x85\u2028\u2029"


def test_rows_end_at_newlines_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"a{OTHER_LINE_ENDS}b"}, {"text": "c"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert parse_json_lines(path) == rows


def test_carriage_return_before_a_newline_is_part_of_the_line_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\r\n{"a":\r2}\r\n')
    assert [line.content for line in read_json_lines(path)] == [b'{"a": 1}', b'{"a":\r2}']
    assert parse_json_lines(path) == [{"a": 1}, {"a": 2}]


def test_lines_are_numbered_with_the_blank_ones(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n \n{}\n\n{}\n")
    assert [line.where for line in read_json_lines(path)] == [f"{path}:3", f"{path}:5"]


def test_byte_order_mark_is_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert parse_json_lines(path) == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json", "expected a JSON object, found 'not json'"),
        (b"[1]", r"expected a JSON object, found '\[1\]'; correct or drop"),
        (b'{"a": ' + b"[" * 100_000, "expected a JSON object.*recursion"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "expected a JSON object.*digits"),
        (b'{"a": "\xff"}', "expected UTF-8 text.*save the file as UTF-8"),
        (b'{"a": ["\\ud800"]}', "expected a JSON object.*surrogates"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" + content + b"\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {message}"):
        parse_json_lines(path)


def test_compressed_file_is_named(tmp_path):
    (tmp_path / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(DataError, match=r"HumanEval\.jsonl\.gz is compressed .* gunzip"):
        read_json_lines(tmp_path / "HumanEval.jsonl.gz")


@pytest.mark.parametrize("name", [".", "none.jsonl", "a\0b"])
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    with pytest.raises(DataError, match=r"cannot be read.*name a file of JSON lines"):
        read_json_lines(tmp_path / name)
