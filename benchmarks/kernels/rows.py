"""The rows of the table of kernels, and what they are meant to reach on an H200."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch

import torch

from benchmarks.kernels.methods import Shape

BASELINES = ("flex", "sdpa", "grouped_sdpa", "eager")
OURS = ("ours", "deterministic")
_ALL = ("ours", *BASELINES)


@dataclass(frozen=True, slots=True)
class Row:
    """A shape, and what it is measured with.

    Args:
        name: For filters and tables.
        shape: What is attended to.
        methods: What computes it; ours comes first.
        has_goals: Whether it is of the shape that goals are set for.
    """

    name: str
    shape: Shape
    methods: tuple[str, ...] = _ALL
    has_goals: bool = True


@dataclass(frozen=True, slots=True)
class Measured:
    """What a row has shown.

    Args:
        row: The row.
        microseconds: Median of each method.
        copy_rate: Of the machine, in gigabytes a second.
    """

    row: Row
    microseconds: Mapping[str, float] = field(default_factory=dict)
    copy_rate: float = 1.0

    @property
    def bandwidth(self) -> float:
        """Gigabytes of keys and values a second that ours reads."""
        return self.row.shape.kv_bytes / self.microseconds["ours"] / 1e3

    @property
    def share(self) -> float:
        """Bandwidth over the rate of copies."""
        return self.bandwidth / self.copy_rate

    @property
    def teraflops(self) -> float:
        """Operations a second of ours."""
        return self.row.shape.operations / self.microseconds["ours"] / 1e6

    def speedup(self, method: str) -> float | None:
        """Return how many times longer a method takes than ours."""
        if method not in self.microseconds:
            return None
        return self.microseconds[method] / self.microseconds["ours"]


def rows() -> list[Row]:
    """Return all rows, the most important ones first."""
    plain = [(64, 32), (16, 32), (32, 32), (1, 32), (64, 4), (16, 8), (64, 8), (1, 8)]
    more = [(64, 128), (16, 128), (32, 128), (1, 128), (32, 8), (16, 4), (128, 32), (1, 4), (32, 4)]
    last = [(128, 8), (128, 128), (128, 4)]
    with_layouts = (*_ALL, "deterministic")
    found = [
        _row(nodes, kilo, with_layouts if (nodes, kilo) in plain[:6] else _ALL)
        for nodes, kilo in plain
    ]
    found += [_row(nodes, kilo, _ALL) for nodes, kilo in more]
    ragged = Shape(8192, 16, batch=8)
    few = ("ours", "flex", "sdpa")
    found += [
        Row("t16-n8k-b8", ragged, few, has_goals=False),
        Row("t64-n8k-b8", replace(ragged, nodes=64), few, has_goals=False),
        Row("t64-n32k-d64", Shape(32768, 64, head_dim=64), few, has_goals=False),
        Row("t64-n32k-d256", Shape(32768, 64, head_dim=256), few, has_goals=False),
        Row("t16-n32k-fp16", Shape(32768, 16, dtype=torch.float16), ("ours",), has_goals=False),
    ]
    return found + [_row(nodes, kilo, _ALL) for nodes, kilo in last]


def _row(nodes: int, kilo: int, methods: tuple[str, ...]) -> Row:
    return Row(f"t{nodes}-n{kilo}k", Shape(1024 * kilo, nodes), methods)


def tiny_rows() -> list[Row]:
    """Return rows for a dry run."""
    shape = Shape(120, 5, q_heads=4, kv_heads=2, head_dim=16, dtype=torch.float32)
    methods = (*_ALL, "deterministic")
    return [
        Row("t5-n120", shape, methods),
        Row("t5-n120-b3", replace(shape, batch=3), ("ours", "flex", "sdpa"), has_goals=False),
    ]


def chosen(found: Sequence[Row], patterns: Sequence[str] | None) -> list[Row]:
    """Return the rows whose names fit a pattern."""
    if not patterns:
        return list(found)
    return [row for row in found if any(fnmatch(row.name, pattern) for pattern in patterns)]


def goals(measured: Measured) -> list[tuple[str, bool]]:
    """Return what a row is meant to reach, and whether it does.

    With few rows in a product the bandwidth is the bound, with many the rate of products.
    """
    if not measured.row.has_goals:
        return []
    shape = measured.row.shape
    num_rows = shape.nodes * shape.q_heads // shape.kv_heads
    found = _own_goals(measured, num_rows)
    is_long = shape.prefix >= 32768
    least = {"flex": 1.3 if shape.prefix >= 8192 else 1.0, "sdpa": 0.0, "eager": 0.0}
    if shape.nodes == 64 and is_long:
        least |= {"sdpa": 6.0 if shape.prefix >= 131072 else 4.0, "eager": 15.0}
    for method, factor in least.items():
        speedup = measured.speedup(method)
        if speedup is not None and factor:
            found.append((f"{method} takes {factor} times as long", speedup >= factor))
    return found


def _own_goals(measured: Measured, num_rows: int) -> list[tuple[str, bool]]:
    prefix, share = measured.row.shape.prefix, measured.share
    found = []
    if num_rows <= 64 and prefix >= 32768:
        found.append(("85 % of the copy rate", share >= 0.85))
    elif num_rows <= 64 and prefix == 8192:
        found.append(("65 % of the copy rate", share >= 0.65))
    elif num_rows == 128 and prefix >= 32768:
        found.append(("70 % of the copy rate", share >= 0.70))
    elif num_rows == 256 and prefix >= 32768:
        found.append(("450 TFLOP/s", measured.teraflops >= 450))
    elif num_rows == 256 and prefix == 4096:
        found.append(("at most 15 us", measured.microseconds["ours"] <= 15))
    return found
