"""Times of kernels by replayed graphs, and how fast a machine copies and multiplies."""

from collections.abc import Callable, Sequence
from math import ceil
from time import perf_counter

import torch

Call = Callable[[], object]

MIN_SAMPLES = 50
_WARM_SECONDS = 0.03  # clocks rise meanwhile
_GRAPH_MILLISECONDS = 2.0
_MAX_CALLS = 256  # of one graph
_COPIED_BYTES = 2**32
_MATRIX = 8192


def time_calls(calls: Sequence[Call], *, device: str, samples: int = MIN_SAMPLES) -> list[float]:
    """Return microseconds of one of several calls, `samples` times.

    On a GPU a graph of all calls is replayed, and its time divided by their number. They work on
    different memory, so that none finds in the cache what the one before it has read. Short graphs
    hold the calls several times, so that the launch of the graph itself does not count.
    """
    if device == "cpu":
        return [_time_each(calls) for _ in range(samples)]
    replay = capture(calls)
    start = perf_counter()
    while perf_counter() - start < _WARM_SECONDS:
        replay()
        torch.cuda.synchronize()
    repeats = min(ceil(_GRAPH_MILLISECONDS / _time_events(replay)), _MAX_CALLS // len(calls))
    if repeats > 1:
        replay = capture(list(calls) * repeats)
        replay()
    times = [_time_events(replay) for _ in range(samples)]
    return [1e3 * time / len(calls) / max(repeats, 1) for time in times]


def capture(calls: Sequence[Call]) -> Call:
    """Return the replay of a graph of calls; each is made twice before, to compile and to load."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _time_each(calls: Sequence[Call]) -> float:
    start = perf_counter()
    for call in calls:
        call()
    return 1e6 * (perf_counter() - start) / len(calls)


def _time_events(call: Call) -> float:
    """Return the milliseconds of a call on the device."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def copy_rates(device: str) -> list[float]:
    """Return gigabytes a second of copies on the device, read and written ones together."""
    size = _COPIED_BYTES if device != "cpu" else 2**20
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    times = time_calls([lambda: target.copy_(source)], device=device, samples=20)
    return [2 * size / time / 1e3 for time in times]


def product_rates(device: str) -> list[float]:
    """Return teraflops a second of products of large bfloat16 matrices of random numbers."""
    size = _MATRIX if device != "cpu" else 64
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    times = time_calls([lambda: left @ right], device=device, samples=20)
    return [2 * size**3 / time / 1e6 for time in times]


def num_buffers(num_bytes: int, device: str) -> int:
    """Return how many buffers of a size are more than three times the cache of the device."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, 3 * cache // num_bytes + 1)
