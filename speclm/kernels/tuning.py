"""Measures on a GPU whether neighbours of the launch sizes in our table are faster.

What is found goes to a file that the environment variable ``SPECLM_KERNEL_CONFIGS`` takes::

    device = torch.device("cuda", 0)
    tune(Path("sizes.json"), architecture=architecture(device), measure=measure_on(device))
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from speclm.errors import KernelError
from speclm.kernels.inputs import TreeAttentionInputs
from speclm.kernels.launch import HEAD_DIMS, LaunchPlan, multiprocessors, split_keys
from speclm.kernels.launch_files import read_table, write_table
from speclm.kernels.launch_table import (
    BLOCK_KEYS,
    LaunchConfig,
    LaunchRow,
    LaunchTable,
    built_in_rows,
)
from speclm.tree.topology import num_words

_KV_HEADS, _KV_LEN = 8, 32_768
_LARGE_ROWS = 256  # of calls that a row without a limit is measured with
_WORTHWHILE = 0.98  # of the time that the table's sizes take
_MOST_STEPS = 4
_REPLAYS = 50


@dataclass(frozen=True, slots=True)
class Workload:
    """A call that sizes are measured with: the largest that a row of the table is for.

    Args:
        rows: Nodes with their heads.
        head_dim: Width of a head.
        is_float32: Whether keys are float32; else they are bfloat16.
    """

    rows: int
    head_dim: int
    is_float32: bool


Measure = Callable[[Workload, LaunchConfig], float]
"""Seconds that a call takes; infinite where the GPU lacks the memory or registers for it."""


def tune(path: Path, *, architecture: str, measure: Measure) -> LaunchTable:
    """Measure the neighbours of all rows for a GPU, and write the best of each to a file.

    Rows of other GPUs that the file already holds are kept.

    Args:
        path: The file; written at once when all is measured.
        architecture: The GPU's, as `speclm.kernels.launch.architecture` names it.
        measure: Takes the time of a call; see `measure_on`.

    Returns:
        What the file holds.

    Raises:
        KernelError: If the file is there and is not one of sizes.
    """
    table = read_table(str(path)) if path.exists() else {}
    rows = tuple(
        replace(row, config=fastest(row.config, workload_of(row), measure))
        for row in built_in_rows(architecture)
    )
    table = table | {architecture: rows}
    write_table(path, table)
    return table


def fastest(config: LaunchConfig, workload: Workload, measure: Measure) -> LaunchConfig:
    """Walk from sizes to their fastest neighbour, and on from there, while that is worthwhile."""
    best = measure(workload, config)
    for _ in range(_MOST_STEPS):
        timed = [(measure(workload, neighbour), neighbour) for neighbour in neighbours(config)]
        seconds, neighbour = min(timed, key=lambda pair: pair[0])
        if not seconds < best * _WORTHWHILE:
            break
        best, config = seconds, neighbour
    return config


def neighbours(config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Yield the sizes that differ from others in one step of one of them."""
    for block_keys in (config.block_keys // 2, config.block_keys * 2):
        if block_keys in BLOCK_KEYS:
            fixed_keys = config.fixed_tiles * config.block_keys
            fixed_tiles = max(fixed_keys // block_keys, 1)
            yield replace(config, block_keys=block_keys, fixed_tiles=fixed_tiles)
    for block_rows in (config.block_rows // 2, config.block_rows * 2):
        if 16 <= block_rows <= 128:
            yield replace(config, block_rows=block_rows)
    yield replace(config, num_warps=4 if config.num_warps == 8 else 8)
    for step in (-1, 1):
        if config.num_stages + step >= 1:
            yield replace(config, num_stages=config.num_stages + step)
        if config.programs + step >= 1:
            yield replace(config, programs=config.programs + step)


def workload_of(row: LaunchRow) -> Workload:
    """Return the largest call that a row is for."""
    itemsize = 4 if row.is_float32 else 2
    widest = max(HEAD_DIMS) if row.max_key_bytes is None else row.max_key_bytes // itemsize
    head_dim = max(dim for dim in HEAD_DIMS if dim <= max(widest, min(HEAD_DIMS)))
    return Workload(row.max_rows or _LARGE_ROWS, head_dim, row.is_float32)


def measure_on(device: torch.device) -> Measure:
    """Return what times calls on a GPU: the median of replays of a graph of several calls.

    Each call of a graph has a cache of its own, and all of them are more than three times what the
    GPU's L2 holds, so that keys come from memory, as they do between the layers of a model.

    Raises:
        KernelError: If the device is no GPU.
    """
    if device.type != "cuda":
        raise KernelError(
            f"sizes are measured on a GPU, not on {device}; run this on the machine that decodes"
        )
    from triton.runtime.errors import OutOfResources, PTXASError

    from speclm.kernels._triton_attention import tree_attention_triton

    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    inputs_of = lru_cache(maxsize=1)(workload_inputs)

    def measure(workload: Workload, config: LaunchConfig) -> float:
        inputs = inputs_of(workload, device)
        plan = LaunchPlan(config, split_keys(config, multiprocessors(device), inputs))
        count = 1 + 3 * cache_bytes // (inputs.key.nbytes + inputs.value.nbytes)
        calls = [inputs, *(_with_own_cache(inputs) for _ in range(count))]
        try:
            tree_attention_triton(inputs, plan)  # compiles
        except (OutOfResources, PTXASError):
            return math.inf
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph):
            for call in calls:
                tree_attention_triton(call, plan)
        return _median_seconds(graph) / len(calls)

    return measure


def workload_inputs(workload: Workload, device: torch.device) -> TreeAttentionInputs:
    """Return a call of a size: a chain of nodes behind a prefix that fills the cache."""
    groups = min(4, workload.rows)
    nodes = workload.rows // groups
    dtype = torch.float32 if workload.is_float32 else torch.bfloat16
    cache_shape = (1, _KV_HEADS, _KV_LEN, workload.head_dim)
    words = torch.zeros(1, nodes, num_words(nodes), dtype=torch.int64, device=device)
    return TreeAttentionInputs(
        query=torch.randn(
            1, _KV_HEADS * groups, nodes, workload.head_dim, dtype=dtype, device=device
        ),
        key=torch.randn(cache_shape, dtype=dtype, device=device),
        value=torch.randn(cache_shape, dtype=dtype, device=device),
        prefix_lengths=torch.full((1,), _KV_LEN - nodes, device=device, dtype=torch.long),
        ancestor_words=words,  # which bits are set takes no time
        depths=torch.arange(nodes, device=device)[None],
        scale=workload.head_dim**-0.5,
    )


def _with_own_cache(inputs: TreeAttentionInputs) -> TreeAttentionInputs:
    return replace(inputs, key=inputs.key.clone(), value=inputs.value.clone())


def _median_seconds(graph: torch.cuda.CUDAGraph) -> float:
    times: list[float] = []
    graph.replay()
    for _ in range(_REPLAYS):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()  # what is measured has to be over
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
