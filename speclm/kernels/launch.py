"""Plan launches of tree attention on a GPU, and measure which launch sizes are faster.

`tune` writes a file for the environment variable ``SPECLM_KERNEL_CONFIGS``::

    device = torch.device("cuda", 0)
    tune(Path("sizes.json"), architecture=architecture(device), measure=measure_on(device))
"""

import math
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speclm.errors import KernelError
from speclm.kernels.inputs import TreeAttentionInputs
from speclm.kernels.launch_table import (
    BLOCK_KEYS,
    VARIABLE,
    CallSize,
    LaunchConfig,
    LaunchRow,
    LaunchTable,
    built_in_config,
    built_in_rows,
    find_config,
    read_table,
    read_table_once,
    write_table,
)
from speclm.tree.words import num_words

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 160, 192, 256)
"""Head widths that the Triton kernel supports: one power of two, or the sum of two."""

_MAX_SPLITS = 64  # parts are read one after the other when they are merged
_DETERMINISTIC_ROWS = 64  # rows for which the sizes of all deterministic calls are chosen
_KV_HEADS, _KV_LEN = 8, 32_768
_LARGE_ROWS = 256  # of the calls that measure a table row without a limit
_WORTHWHILE = 0.98  # fraction of the current time that faster sizes may take at most
_MAX_STEPS = 4
_REPLAYS = 50


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """How one call of tree attention is launched.

    Args:
        config: Sizes of tiles and programs.
        num_splits: Programs that share the keys of a row and head.
    """

    config: LaunchConfig
    num_splits: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a Triton kernel, ready to run or only to be compiled.

    Args:
        kernel: The jitted function.
        grid: Programs along each axis.
        arguments: Tensors and numbers, by position.
        options: Constants of the kernel and options of the compiler, by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Tensor | int | float, ...]
    options: dict[str, int]


def plan_launch(inputs: TreeAttentionInputs) -> LaunchPlan:
    """Return how a call is launched on its device; depends only on shapes, not on lengths.

    Raises:
        KernelError: If ``SPECLM_KERNEL_CONFIGS`` names an invalid file.
    """
    device = inputs.query.device
    return plan_launch_on(architecture(device), multiprocessors(device), inputs)


def plan_launch_on(
    architecture: str, multiprocessors: int, inputs: TreeAttentionInputs
) -> LaunchPlan:
    """Return how a call is launched on a GPU with a number of multiprocessors.

    Sizes of deterministic calls depend only on the GPU, the type and the head width, and their
    splits have a fixed length, so a row's result does not depend on what is computed with it.
    """
    config = _find_config(architecture, call_size(inputs), os.environ.get(VARIABLE, ""))
    return LaunchPlan(config, split_keys(config, multiprocessors, inputs))


def split_keys(config: LaunchConfig, multiprocessors: int, inputs: TreeAttentionInputs) -> int:
    """Return how many programs share the keys of a row and head.

    They fill the GPU once: programs that wait for others would take as long again. Deterministic
    calls have as many as the capacity of the cache needs.
    """
    # The maximum over all lengths; the tree starts a new tile.
    tree_tiles = -(-inputs.num_slots // config.block_keys)
    max_tiles = -(-max(inputs.kv_len - inputs.num_slots, 0) // config.block_keys) + tree_tiles
    if inputs.deterministic:
        # A single part would skip the merge, and would round sinks elsewhere.
        return max(-(-max_tiles // config.fixed_tiles), 2)
    if inputs.num_splits is not None:
        return inputs.num_splits
    row_tiles = -(-inputs.num_rows // config.block_rows)
    running = multiprocessors * config.programs
    fitting = running // (inputs.batch * inputs.kv_heads * row_tiles)
    worthwhile = -(-max_tiles // config.min_tiles)
    return max(min(fitting, worthwhile, _MAX_SPLITS), 1)


@cache
def architecture(device: torch.device) -> str:
    """Return the architecture of a device, such as ``"sm_90"``; ``"interpreter"`` for a CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]  # features follow
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; on a CPU enough for splits."""
    if device.type == "cpu":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def call_size(inputs: TreeAttentionInputs) -> CallSize:
    """Return the size of a call, by which launch sizes are looked up."""
    itemsize = inputs.query.element_size()
    rows = _DETERMINISTIC_ROWS if inputs.deterministic else inputs.num_rows
    return CallSize(rows, inputs.head_dim * itemsize, is_float32=itemsize > 2)


def head_parts(head_dim: int) -> tuple[int, int]:
    """Return two powers of two that add up to a width; the second may be 0."""
    first = 1 << (head_dim.bit_length() - 1)
    return first, head_dim - first


@cache
def _find_config(architecture: str, size: CallSize, path: str) -> LaunchConfig:
    """Look a call up in the file at `path`, if any, and then in the built-in table."""
    if path:
        config = find_config(read_table_once(path), architecture, size)
        if config is not None:
            return config
    return built_in_config(architecture, size)


@dataclass(frozen=True, slots=True)
class Workload:
    """The call that measures sizes: the largest one that a table row is for.

    Args:
        rows: Nodes with their heads.
        head_dim: Width of a head.
        is_float32: Whether keys are float32; else they are bfloat16.
    """

    rows: int
    head_dim: int
    is_float32: bool


Measure = Callable[[Workload, LaunchConfig], float]
"""Seconds that a call takes; infinite if the GPU lacks the memory or registers for it."""


def tune(path: Path, *, architecture: str, measure: Measure) -> LaunchTable:
    """Measure the neighbours of all table rows of a GPU, and write the best of each to a file.

    Args:
        path: The file; its rows of other GPUs are kept.
        architecture: The GPU, as named by the function `architecture`.
        measure: Takes the time of a call; see `measure_on`.

    Returns:
        The content of the file.

    Raises:
        KernelError: If the file exists and holds no launch sizes.
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
    """Replace sizes by their fastest neighbour, repeatedly, while that is worthwhile."""
    best = measure(workload, config)
    for _ in range(_MAX_STEPS):
        timed = [(measure(workload, neighbour), neighbour) for neighbour in neighbours(config)]
        seconds, neighbour = min(timed, key=lambda pair: pair[0])
        if not seconds < best * _WORTHWHILE:
            break
        best, config = seconds, neighbour
    return config


def neighbours(config: LaunchConfig) -> Iterator[LaunchConfig]:
    """Yield the sizes that differ from `config` in one step of one of them."""
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
    """Return the largest call that a table row is for."""
    itemsize = 4 if row.is_float32 else 2
    widest = max(HEAD_DIMS) if row.max_key_bytes is None else row.max_key_bytes // itemsize
    head_dim = max(dim for dim in HEAD_DIMS if dim <= max(widest, min(HEAD_DIMS)))
    return Workload(row.max_rows or _LARGE_ROWS, head_dim, row.is_float32)


def measure_on(device: torch.device) -> Measure:
    """Return a function that times calls on a GPU: the median over replays of a CUDA graph.

    Each call of the graph has its own cache, and together these are more than three times the size
    of the GPU's L2. Keys therefore come from memory, as in the layers of a model.

    Raises:
        KernelError: If the device is not a GPU.
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
    """Return a call of a given size: a chain of nodes after a prefix that fills the cache."""
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
        ancestor_words=words,  # the bits do not affect the time
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
        end.synchronize()  # the replay must be over
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)
