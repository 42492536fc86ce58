import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.errors import KernelError
from speclm.kernels.inputs import require_shapes
from speclm.kernels.launch import (
    HEAD_DIMS,
    LaunchPlan,
    Workload,
    architecture,
    call_size,
    fastest,
    head_parts,
    measure_on,
    multiprocessors,
    neighbours,
    plan_launch,
    plan_launch_on,
    tune,
    workload_inputs,
    workload_of,
)
from speclm.kernels.launch_table import (
    TABLE,
    VARIABLE,
    LaunchConfig,
    LaunchRow,
    built_in_rows,
    read_table,
    write_table,
)
from tests.kernels.meta_inputs import meta_inputs

CPU = torch.device("cpu")
H200 = 132  # multiprocessors
ARCHITECTURES = st.sampled_from([*TABLE, "sm_999"])
SHAPES = {
    "nodes": st.integers(1, 256),
    "groups": st.integers(1, 16),
    "head_dim": st.sampled_from(HEAD_DIMS),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    "batch": st.integers(1, 64),
    "kv_heads": st.integers(1, 16),
    "kv_len": st.integers(256, 300_000),
}

SIZES = LaunchConfig(64, 32, 4, 2)
WORKLOAD = Workload(64, 128, is_float32=False)
ROWS = st.sampled_from([row for rows in TABLE.values() for row in rows])


def planned(inputs, *, name="sm_90", count=H200) -> LaunchPlan:
    return plan_launch_on(name, count, inputs)


def programs(inputs, plan: LaunchPlan) -> int:
    row_tiles = -(-inputs.num_rows // plan.config.block_rows)
    return row_tiles * plan.num_splits * inputs.batch * inputs.kv_heads


@given(name=ARCHITECTURES, shape=st.fixed_dictionaries(SHAPES))
def test_programs_fill_the_gpu_once_unless_there_are_more_rows_and_heads(name, shape):
    inputs = meta_inputs(**shape)
    plan = planned(inputs, name=name)
    assert 1 <= plan.num_splits <= 64
    if plan.num_splits > 1:
        assert programs(inputs, plan) <= H200 * plan.config.programs


def test_splits_of_a_long_context_leave_less_than_a_split_of_the_gpu_idle():
    inputs = meta_inputs(nodes=16, groups=4, batch=1, kv_heads=8)
    plan = planned(inputs)
    assert plan.num_splits == 33  # two programs on each multiprocessor, and no power of two
    idle = H200 * plan.config.programs - programs(inputs, plan)
    assert 0 <= idle < inputs.kv_heads


def test_short_cache_is_not_split_into_less_than_the_fewest_tiles():
    plan = planned(meta_inputs(nodes=4, batch=1, kv_heads=1, kv_len=600))
    tiles = -(-596 // plan.config.block_keys) + 1
    assert plan.num_splits == -(-tiles // plan.config.min_tiles)


def test_splits_that_a_call_asks_for_are_taken():
    inputs = replace(meta_inputs(nodes=4), num_splits=7)
    assert planned(inputs).num_splits == 7


@given(name=ARCHITECTURES, shape=st.fixed_dictionaries(SHAPES), other=st.fixed_dictionaries(SHAPES))
def test_deterministic_sizes_depend_on_type_and_width_alone(name, shape, other):
    other |= {"head_dim": shape["head_dim"], "dtype": shape["dtype"]}
    one, two = (
        planned(meta_inputs(**each, deterministic=True), name=name, count=count)
        for each, count in ((shape, 1), (other, 300))
    )
    assert one.config == two.config


@given(name=ARCHITECTURES, shape=st.fixed_dictionaries(SHAPES), data=st.data())
def test_deterministic_splits_cover_every_length_that_the_cache_has_room_for(name, shape, data):
    inputs = replace(meta_inputs(**shape, deterministic=True), num_splits=3)
    plan = planned(inputs, name=name)
    room = inputs.kv_len - inputs.num_slots
    start = data.draw(st.integers(0, room))
    length = data.draw(st.integers(start, room))
    keys = plan.config.block_keys
    tiles = -(-(length - start) // keys) + -(-inputs.num_slots // keys)
    assert plan.num_splits >= 2  # the asked for 3 do not count
    assert tiles <= plan.num_splits * plan.config.fixed_tiles


def test_deterministic_splits_do_not_depend_on_the_gpu_or_batch():
    one = planned(meta_inputs(nodes=1, batch=1, deterministic=True), count=20)
    two = planned(meta_inputs(nodes=1, batch=9, deterministic=True), count=200)
    assert one == two
    assert one.config.fixed_tiles * one.config.block_keys == 1024


@given(shape=st.fixed_dictionaries(SHAPES))
def test_call_size_counts_nodes_with_their_heads_and_bytes_of_a_key(shape):
    size = call_size(meta_inputs(**shape))
    assert size.rows == shape["nodes"] * shape["groups"]
    assert size.key_bytes == shape["head_dim"] * shape["dtype"].itemsize
    assert size.is_float32 == (shape["dtype"] == torch.float32)


def test_cpu_is_planned_for_as_the_interpreter():
    assert architecture(CPU) == "interpreter"
    assert multiprocessors(CPU) > 1
    inputs = meta_inputs(nodes=3, batch=1, kv_heads=1, kv_len=100)
    on_cpu = replace(inputs, query=torch.empty(inputs.query.shape))
    plan = plan_launch(on_cpu)
    assert (plan.config.block_rows, plan.config.block_keys) == (16, 16)
    assert plan.num_splits > 1


class FakeProperties:
    gcnArchName = "gfx942:sramecc+:xnack-"  # noqa: N815 - PyTorch's name
    multi_processor_count = 304


@pytest.mark.parametrize(("hip", "expected"), [(None, "sm_120"), ("6.4", "gfx942")])
def test_architecture_of_a_gpu_is_asked_for_once(monkeypatch, hip, expected):
    asked = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: FakeProperties)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or (12, 0)
    )
    device = torch.device("cuda", 60 + (hip is None))  # which no other test asks for
    assert architecture(device) == architecture(device) == expected
    assert multiprocessors(device) == 304
    assert len(asked) == (hip is None)


def test_rows_of_a_file_go_before_the_table(monkeypatch, tmp_path):
    sizes = {"block_rows": 32, "block_keys": 32, "num_warps": 2, "num_stages": 5}
    counts = {"programs": 4, "min_tiles": 8, "fixed_tiles": 32}
    limits = {"max_rows": 16, "max_key_bytes": None, "is_float32": False}
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"sm_90": [limits | sizes | counts]}))
    monkeypatch.setenv(VARIABLE, str(path))
    plan = planned(meta_inputs(nodes=4, batch=1))
    assert (plan.config.num_stages, plan.config.min_tiles) == (5, 8)
    assert plan.num_splits == 64  # four programs on a multiprocessor would allow 66
    monkeypatch.delenv(VARIABLE)
    assert planned(meta_inputs(nodes=4, batch=1)).config == TABLE["sm_90"][2].config


def test_calls_that_no_row_of_a_file_takes_get_the_table(monkeypatch, tmp_path):
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps({"gfx942": []}))
    monkeypatch.setenv(VARIABLE, str(path))
    inputs = meta_inputs(nodes=4)
    assert planned(inputs).config == TABLE["sm_90"][2].config
    assert planned(inputs, name="gfx942").config == TABLE["gfx942"][0].config


def test_file_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "missing.json"))
    with pytest.raises(KernelError, match=r"missing\.json cannot be read .*SPECLM_KERNEL_CONFIGS"):
        planned(meta_inputs(nodes=4))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_parts_are_powers_of_two_that_add_up(head_dim):
    first, rest = head_parts(head_dim)
    assert first + rest == head_dim
    assert first & (first - 1) == 0
    assert rest == 0 or (rest >= 16 and rest & (rest - 1) == 0)


def clock(best: LaunchConfig, *, step: float = 0.1):
    """A fake clock: sizes take longer the more fields differ from the best ones."""
    names = ("block_rows", "block_keys", "num_warps", "num_stages", "programs")

    def measure(_: Workload, config: LaunchConfig) -> float:
        return 1 + step * sum(getattr(config, name) != getattr(best, name) for name in names)

    return measure


def test_fastest_takes_several_steps():
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
