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
)

SIZES = LaunchConfig(16, 32, 4, 2)


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
