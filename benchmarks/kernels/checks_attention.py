"""Checks of tree attention: every feature and type against float64, and equal bits."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.kernels.cases import (
    DENSE_TOLERANCE,
    EPSILON,
    LSE_TOLERANCE,
    RELATIVE,
    Call,
    Case,
    build,
    drawn_cases,
    error_of,
    is_bitwise,
    poison,
    relative_error,
)

_TYPES = (torch.bfloat16, torch.float16, torch.float32)
# Lengths lie around multiples of every size of tile, where edges of loops are.
_LENGTHS = ((64,), (129, 63), (0, 1, 65), (511, 384, 17), (1023, 1025), (300,), (2047, 130, 2049))
FACTORS = {
    "dtype": _TYPES,
    "head_dim": (128, 64, 80, 96, 256, 128),
    "groups": (4, 1, 3, 8),
    "nodes": (64, 1, 7, 33, 65, 128, 256),
    "lengths": _LENGTHS,
    "has_padding": (False, True, False),
    "gap": (None, 0, 3, None),
    "window": (None, None, 1, 17, 64, 127, None),
    "softcap": (None, 20.0, None),
    "has_sinks": (False, True),
    "has_own_trees": (True, False),
    "is_deterministic": (False, False, True),
    "num_splits": (None, None, 1, 3, 16, None),
    "above": (0, 0, 3, 64),
}
TINY_FACTORS = {
    **FACTORS,
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "head_dim": (16, 80),
    "groups": (3, 1),
    "nodes": (7, 1, 5),
    "lengths": ((17, 33), (0, 1)),
    "window": (None, 5),
    "softcap": (None, 20.0),
    "num_splits": (None, 3),
    "above": (0, 2),
}
PLAIN = tuple(
    Case(dtype=dtype, head_dim=128, groups=4, nodes=nodes, lengths=(1029, 513), num_splits=splits)
    for nodes, splits in ((64, None), (16, None), (1, 4), (128, 1))
    for dtype in _TYPES
)
"""The first ones: what most models ask for."""


def attention_cases(*, is_tiny: bool) -> list[Case]:
    """Return the cases, the plainest first."""
    if is_tiny:
        return drawn_cases(6, factors=TINY_FACTORS)
    return [*PLAIN, *drawn_cases(126, factors=FACTORS, seed=1)]


def check_case(case: Case, *, device: str, backend: str, seed: int = 0) -> str | None:
    """Compare a call with float64; return a complaint if it is off by too much."""
    call = build(case, device=device, seed=seed)
    expected, expected_lse = call.exact()
    gap = error_of(expected, call.dense(torch.float64))
    if not gap <= DENSE_TOLERANCE:
        return f"the reference is off dense attention by {gap:.1e}"
    eager = error_of(call.dense(case.dtype), expected)
    largest = float(call.value.double().abs().max())
    bound = 2 * eager + EPSILON[case.dtype] * largest
    poison(device)
    output, lse = call.outputs(backend=backend, return_lse=True)
    error, relative = error_of(output, expected), relative_error(output, expected)
    if not error <= bound:
        return f"off by {error:.2e}, expected at most {bound:.2e} (eager is by {eager:.2e})"
    if not relative <= RELATIVE[case.dtype]:
        return f"off by {relative:.2e} of its norm, expected at most {RELATIVE[case.dtype]}"
    lse_error = error_of(lse, expected_lse)
    if not lse_error <= LSE_TOLERANCE:
        return f"lse off by {lse_error:.2e}, expected at most {LSE_TOLERANCE}"
    return None


def deterministic_cases(*, is_tiny: bool) -> list[Case]:
    """Return cases whose rows are computed alone and next to others."""
    if is_tiny:
        sizes = {"nodes": 6, "head_dim": 16, "lengths": (9, 20, 1)}
        return [Case(**sizes, is_deterministic=True, has_padding=True, has_own_trees=True)]
    lengths = (1300, 64, 4097, 65, 1, 2048, 700, 1023)
    plain = Case(head_dim=128, groups=4, nodes=64, lengths=lengths, is_deterministic=True)
    rich = replace(plain, window=900, softcap=20.0, has_sinks=True, has_padding=True, gap=2)
    paged = replace(plain, has_own_trees=True, groups=3, head_dim=96)
    wide = replace(plain, head_dim=256, nodes=65, groups=8, has_own_trees=True)
    return [
        replace(case, dtype=dtype)
        for case in (plain, rich, paged, wide)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]


def check_deterministic(case: Case, *, device: str, backend: str) -> str | None:
    """Compute single nodes, single rows and another layout, and compare them bit by bit."""
    call = build(case, device=device)
    output = call.outputs(backend=backend)
    for what, found, expected in _same_results(case, call, output, backend):
        poison(device)
        complaint = is_bitwise(found(), expected, lambda what=what: what)
        if complaint is not None:
            return complaint
    return None


def _same_results(case: Case, call: Call, output: torch.Tensor, backend: str) -> Iterator[tuple]:
    arguments = call.arguments
    for node in sorted({0, 1, case.nodes // 2, case.nodes - 1}):
        slots = case.above + node + 1
        alone = {
            "query": arguments["query"][:, :, node : node + 1],
            "ancestor_words": arguments["ancestor_words"][
                :, node : node + 1, : -(-slots // 64)
            ].contiguous(),
            "depths": arguments["depths"][:, :slots].contiguous(),
        }
        yield (
            f"node {node} by itself",
            lambda alone=alone: call.outputs(backend=backend, **alone),
            output[:, node : node + 1],
        )
    for row in range(len(case.lengths)):
        alone = {name: _row(arguments, name, row) for name in arguments}
        yield (
            f"row {row} by itself",
            lambda alone=alone: call.outputs(backend=backend, **alone),
            output[row : row + 1],
        )
    yield "again", lambda: call.outputs(backend=backend), output
    yield "in 7 splits", lambda: call.outputs(backend=backend, num_splits=7), output
    longer = {
        name: torch.cat([arguments[name], torch.full_like(arguments[name], torch.nan)], dim=2)
        for name in ("key", "value")
    }
    yield "in a longer cache", lambda: call.outputs(backend=backend, **longer), output


def _row(arguments: dict, name: str, row: int) -> object:
    value = arguments[name]
    if not isinstance(value, torch.Tensor) or name == "sinks" or value.shape[0] == 1:
        return value
    return value[row : row + 1].contiguous() if name != "query" else value[row : row + 1]
