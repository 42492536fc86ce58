import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import KernelError
from speclm.kernels.inputs import require_shapes
from speclm.kernels.launch import HEAD_DIMS, call_size
from speclm.kernels.launch_files import read_table, write_table
from speclm.kernels.launch_table import TABLE, LaunchConfig, LaunchRow, built_in_rows
from speclm.kernels.tuning import (
    Workload,
    fastest,
    measure_on,
    neighbours,
    tune,
    workload_inputs,
    workload_of,
)

SIZES = LaunchConfig(64, 32, 4, 2)
WORKLOAD = Workload(64, 128, is_float32=False)
ROWS = st.sampled_from([row for rows in TABLE.values() for row in rows])


def clock(best: LaunchConfig, *, step: float = 0.1):
    """A fake clock: sizes take longer the more fields differ from the best ones."""
    names = ("block_rows", "block_keys", "num_warps", "num_stages", "programs")

    def measure(_: Workload, config: LaunchConfig) -> float:
        return 1 + step * sum(getattr(config, name) != getattr(best, name) for name in names)

    return measure


def test_fastest_walks_over_several_steps():
    best = LaunchConfig(128, 64, 8, 3)
    found = fastest(SIZES, WORKLOAD, clock(best))
    assert (found.block_rows, found.block_keys) == (128, 64)
    assert (found.num_warps, found.num_stages) == (8, 3)


def test_fastest_stays_where_a_step_is_hardly_faster():
    assert fastest(SIZES, WORKLOAD, clock(LaunchConfig(64, 32, 4, 3), step=0.01)) == SIZES


def test_fastest_avoids_sizes_that_the_gpu_lacks_memory_for():
    def measure(_: Workload, config: LaunchConfig) -> float:
        return math.inf if config.block_rows > 64 else 1 / config.block_rows

    assert fastest(SIZES, WORKLOAD, measure) == SIZES
    assert fastest(LaunchConfig(128, 32, 4, 2), WORKLOAD, measure).block_rows == 64


def test_fastest_stays_where_nothing_can_be_launched():
    assert fastest(SIZES, WORKLOAD, lambda *_: math.inf) == SIZES


@given(row=ROWS)
def test_neighbours_differ_and_keep_the_length_of_fixed_splits(row):
    found = list(neighbours(row.config))
    assert len({*found, row.config}) == len(found) + 1
    for config in found:
        fixed = row.config.fixed_tiles * row.config.block_keys
        assert config.fixed_tiles * config.block_keys == fixed


@given(row=ROWS)
def test_workload_is_a_call_that_its_row_takes(row):
    workload = workload_of(row)
    inputs = workload_inputs(workload, torch.device("meta"))
    require_shapes(inputs)
    assert inputs.head_dim in HEAD_DIMS
    assert inputs.num_rows == workload.rows
    assert row.takes(call_size(inputs))


def test_row_without_limits_is_measured_with_wide_heads_and_many_rows():
    assert workload_of(LaunchRow(SIZES)) == Workload(256, 256, is_float32=False)


def test_rows_found_are_written_and_those_of_other_gpus_kept(tmp_path):
    path = tmp_path / "sizes.json"
    others = {"gfx942": (LaunchRow(SIZES, max_rows=3),), "sm_90": ()}
    write_table(path, others)
    best = LaunchConfig(64, 32, 8, 3)
    table = tune(path, architecture="sm_90", measure=clock(best))
    assert read_table(str(path)) == table
    assert table["gfx942"] == others["gfx942"]
    limits = [(row.max_rows, row.max_key_bytes, row.is_float32) for row in table["sm_90"]]
    ours = built_in_rows("sm_90")
    assert limits == [(row.max_rows, row.max_key_bytes, row.is_float32) for row in ours]
    assert {row.config.num_warps for row in table["sm_90"]} == {8}


def test_new_file_is_written_for_a_gpu_that_we_do_not_know(tmp_path):
    path = tmp_path / "sizes.json"
    tune(path, architecture="sm_999", measure=lambda *_: 1.0)
    assert read_table(str(path)) == {"sm_999": TABLE["default"]}


def test_file_of_something_else_is_not_overwritten(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("notes")
    with pytest.raises(KernelError, match=r"notes\.txt is not JSON"):
        tune(path, architecture="sm_90", measure=lambda *_: 1.0)
    assert path.read_text() == "notes"


def test_cpu_is_not_measured_on():
    with pytest.raises(KernelError, match="measured on a GPU, not on cpu"):
        measure_on(torch.device("cpu"))
