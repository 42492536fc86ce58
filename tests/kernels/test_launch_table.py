import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import KernelError
from speclm.kernels.launch import HEAD_DIMS
from speclm.kernels.launch_table import (
    TABLE,
    CallSize,
    LaunchConfig,
    LaunchRow,
    built_in_config,
    built_in_rows,
    find_config,
    read_table,
    read_table_once,
    write_table,
)

SIZES = LaunchConfig(16, 32, 4, 2)
ROW = {
    "max_rows": 16,
    "max_key_bytes": None,
    "is_float32": False,
    "block_rows": 16,
    "block_keys": 64,
    "num_warps": 4,
    "num_stages": 3,
    "programs": 3,
    "min_tiles": 2,
    "fixed_tiles": 16,
}
COUNTS = st.integers(1, 100)
CONFIGS = st.builds(
    LaunchConfig,
    block_rows=st.sampled_from([16, 32, 64, 128, 256]),
    block_keys=st.sampled_from([16, 32, 64]),
    num_warps=st.sampled_from([1, 2, 4, 8, 16]),
    num_stages=COUNTS,
    programs=COUNTS,
    min_tiles=COUNTS,
    fixed_tiles=COUNTS,
)
ROWS = st.builds(
    LaunchRow,
    config=CONFIGS,
    max_rows=st.none() | COUNTS,
    max_key_bytes=st.none() | COUNTS,
    is_float32=st.booleans(),
)
TABLES = st.dictionaries(
    st.sampled_from(["sm_80", "sm_120", "gfx90a", "interpreter"]),
    st.lists(ROWS, max_size=4).map(tuple),
)


@given(
    name=st.sampled_from([*TABLE, "sm_75", "gfx1201"]),
    rows=st.integers(1, 256 * 16),
    head_dim=st.sampled_from(HEAD_DIMS),
    is_float32=st.booleans(),
)
def test_there_are_sizes_for_every_call_on_every_gpu(name, rows, head_dim, is_float32):
    size = CallSize(rows, head_dim * (4 if is_float32 else 2), is_float32=is_float32)
    config = built_in_config(name, size)
    assert config.block_rows <= 128


def test_gpu_that_we_do_not_know_gets_the_default():
    assert built_in_rows("sm_999") == TABLE["default"]
    for row in TABLE["default"]:
        assert row.config.programs == 1 or row.is_float32


def test_rows_of_a_tile_are_few_for_few_rows():
    for name in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"):
        sizes = [
            built_in_config(name, CallSize(rows, 256, is_float32=False)) for rows in (1, 64, 65)
        ]
        assert [size.block_rows for size in sizes] == [16, 64, 128]


def test_first_row_that_takes_a_call_counts():
    wide = LaunchRow(replace(SIZES, num_stages=4))
    table = {"sm_90": (LaunchRow(SIZES, max_rows=16, max_key_bytes=256), wide)}
    found = [
        find_config(table, "sm_90", CallSize(rows, key_bytes, is_float32=False))
        for rows, key_bytes in ((16, 256), (17, 256), (16, 257))
    ]
    assert found == [SIZES, wide.config, wide.config]


def test_call_that_no_row_takes_has_no_sizes():
    table = {"sm_90": (LaunchRow(SIZES),)}
    assert find_config(table, "sm_90", CallSize(1, 512, is_float32=True)) is None
    assert find_config(table, "sm_80", CallSize(1, 256, is_float32=False)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_keys": 128}, r"block_keys is 128, expected one of \(16, 32, 64\)"),
        ({"block_rows": 48}, "block_rows is 48, expected a power of two from 16 to 256"),
        ({"block_rows": 8}, "block_rows is 8, expected a power of two from 16"),
        ({"num_warps": 0}, "num_warps is 0, expected a power of two from 1 to 16"),
        ({"num_warps": 32}, "num_warps is 32, expected a power of two from 1 to 16"),
        ({"num_stages": 0}, "num_stages is 0, expected at least 1"),
        ({"programs": 0}, "programs is 0, expected at least 1"),
        ({"min_tiles": -1}, "min_tiles is -1, expected at least 1"),
        ({"fixed_tiles": 0}, "fixed_tiles is 0, expected at least 1"),
        ({"programs": 10**30}, "programs is 10*, expected at least 1 and at most 65536"),
    ],
)
def test_sizes_that_cannot_be_launched_are_refused(changes, message):
    with pytest.raises(KernelError, match=message):
        replace(SIZES, **changes)


@given(table=TABLES)
def test_what_is_written_is_read(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "sizes.json"
    write_table(path, table)
    assert read_table(str(path)) == table


def test_our_table_can_be_written_as_a_file_to_start_from(tmp_path):
    path = tmp_path / "sizes.json"
    ours = {name: rows for name, rows in TABLE.items() if name != "default"}
    write_table(path, ours)
    assert read_table(str(path)) == ours


def test_file_is_read_once(tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"sm_90": [ROW]}))
    first = read_table_once(str(path))
    path.write_text("broken")
    assert read_table_once(str(path)) is first


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "sizes.json"
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("speclm.files.atomic.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_table(path, {})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"sizes\.json is not JSON .*write it anew"),
        ("__import__('os')", "is not JSON"),
        ("[]", "holds a list, expected an object of rows by architecture"),
        ('{"hopper": []}', "rows for 'hopper', expected an architecture such as"),
        ('{"sm_90": {}}', "holds a dict for sm_90, expected a list of rows"),
        ('{"sm_90": [3]}', "row 0 of sm_90 has 'int', expected the fields"),
        ('{"sm_90": [{"block_rows": 16}]}', r"row 0 of sm_90 has \['block_rows'\], expected"),
    ],
)
def test_file_that_holds_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "sizes.json"
    path.write_text(text)
    with pytest.raises(KernelError, match=message):
        read_table(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "row 1 of gfx942 has .*'extra'.*expected the fields"),
        ({"num_warps": 4.0}, "row 1 of gfx942: num_warps is 4.0, expected a whole number"),
        ({"num_stages": True}, "num_stages is True, expected a whole number"),
        ({"programs": None}, "programs is None, expected a whole number"),
        ({"max_rows": "16"}, "max_rows is '16', expected a whole number"),
        ({"is_float32": 1}, "is_float32 is 1, expected true or false"),
        ({"block_keys": 48}, "row 1 of gfx942: block_keys is 48, expected one of"),
    ],
)
def test_row_that_cannot_be_launched_is_named(tmp_path, changes, message):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"gfx942": [ROW, ROW | changes]}))
    with pytest.raises(KernelError, match=message):
        read_table(str(path))
