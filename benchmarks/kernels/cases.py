"""Calls of tree attention that check it: drawn features, poisoned slots, and what is right.

Every slot outside prefix and tree is NaN. What nodes see is derived from the parents here, not from
the words that the kernels are given.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from typing import Any

import torch
from torch import Tensor

from speclm.kernels import tree_attention
from speclm.kernels.reference import tree_words_reference

EPSILON = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Of the largest value, beyond twice what dense attention in the same type is off by."""
RELATIVE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of the output's norm: shares and output are rounded once each."""
LSE_TOLERANCE = 1e-3
"""Of the logarithm of the denominator, which is float32 with every type."""
DENSE_TOLERANCE = 1e-9
"""Of two float64 results that sum in different orders."""
_POISON_BYTES = tuple(512 << shift for shift in range(0, 18, 2))
"""Blocks of these sizes are what an allocator hands out for most results."""

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a call looks like.

    Args:
        dtype: Of query, keys and values.
        head_dim: Width of a head.
        groups: Query heads that share a key head.
        kv_heads: Key heads.
        nodes: Nodes that attend.
        above: Tree slots before them.
        lengths: Prefix of each row, left padding included.
        has_padding: Whether rows begin with left padding.
        gap: Slots between the longest prefix and the trees; None for trees right after prefixes.
        window: Positions that a node sees.
        softcap: Bound of the scores.
        has_sinks: Whether heads have sinks.
        has_own_trees: Whether every row has a tree of its own.
        is_deterministic: Whether results are to be equal to the bit.
        num_splits: Parts of the keys; None for what the kernel takes.
        room: Slots after the trees.
    """

    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    groups: int = 2
    kv_heads: int = 2
    nodes: int = 7
    above: int = 0
    lengths: tuple[int, ...] = (70, 33)
    has_padding: bool = False
    gap: int | None = None
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    has_own_trees: bool = False
    is_deterministic: bool = False
    num_splits: int | None = None
    room: int = 5

    def __str__(self) -> str:
        features = {
            "padded": self.has_padding,
            "sinks": self.has_sinks,
            "own trees": self.has_own_trees,
            "deterministic": self.is_deterministic,
        }
        numbers = {
            "above": self.above or None,
            "gap": self.gap,
            "window": self.window,
            "cap": self.softcap,
            "splits": self.num_splits,
        }
        words = [name for name, has in features.items() if has]
        words += [f"{name} {value}" for name, value in numbers.items() if value is not None]
        kind = str(self.dtype).removeprefix("torch.")
        size = f"{self.kv_heads}x{self.groups} heads of {self.head_dim}, {self.nodes} nodes"
        return ", ".join([f"{kind} {size} after {list(self.lengths)}", *words])


@dataclass(frozen=True, slots=True)
class Call:
    """A call, and the same in dense form.

    Args:
        arguments: Of `tree_attention`.
        key: Keys as a contiguous cache, zero wherever they were poisoned.
        value: Values likewise.
        visible: True where a node sees a slot, ``[batch, nodes, kv_len]``.
    """

    arguments: Arguments
    key: Tensor
    value: Tensor
    visible: Tensor

    def outputs(self, *, backend: str, **more: Any) -> Any:
        """Return what a backend computes."""
        return tree_attention(**{**self.arguments, **more}, backend=backend)

    def exact(self, **more: Any) -> tuple[Tensor, Tensor]:
        """Return output and logarithm of the denominator by the reference in float64."""
        wide = {
            name: value.double()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in self.arguments.items()
        }
        wide |= {"deterministic": False, "num_splits": None, "return_lse": True, **more}
        return tree_attention(**wide, backend="reference")

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return dense attention in a type, its softmax in float32 or wider."""
        return dense_attention(
            self.arguments["query"].to(dtype),
            self.key.to(dtype),
            self.value.to(dtype),
            self.visible,
            softcap=self.arguments["softcap"],
            sinks=self.arguments["sinks"],
        )


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Compute attention as eager modeling files do; nodes before heads."""
    groups, dtype = query.shape[1] // key.shape[1], query.dtype
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        column = sinks.to(dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=3)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    shares = torch.softmax(scores, dim=3, dtype=kind).to(dtype)
    return (shares[..., : key.shape[2]] @ value).transpose(1, 2)


def random_parents(rows: int, slots: int, generator: torch.Generator) -> Tensor:
    """Draw trees: the first row bushy, the next ones ever more like chains."""
    parents = torch.zeros(rows, slots, dtype=torch.long)
    for row in range(rows):
        for slot in range(1, slots):
            reach = slot if row % 3 == 0 else min(slot, 1 + 2 * (row % 3))
            parents[row, slot] = slot - 1 - int(torch.randint(reach, (), generator=generator))
    return parents


def build(case: Case, *, device: str, seed: int = 0) -> Call:
    """Return a call with features of a case; equal cases with other seeds have equal shapes."""
    generator = torch.Generator().manual_seed(seed)
    batch, slots = len(case.lengths), case.above + case.nodes
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    starts = torch.zeros_like(lengths)
    if case.has_padding:
        shares = torch.rand(batch, generator=generator) * 0.6
        starts = (lengths * shares).to(torch.int32)
    begins = lengths if case.gap is None else (lengths.max() + case.gap).expand(batch)
    kv_len = int(begins.max()) + slots + case.room
    parents = random_parents(batch if case.has_own_trees else 1, slots, generator)
    words, depths = tree_words_reference(parents)
    visible = _visible(case, parents, starts, lengths, begins, kv_len)
    is_live = _between(starts, lengths, kv_len) | _between(begins, begins + slots, kv_len)
    shape = (batch, case.kv_heads, kv_len, case.head_dim)
    dead = ~is_live[:, None, :, None]
    key, value = (
        torch.randn(shape, generator=generator).to(case.dtype).masked_fill(dead, 0.0)
        for _ in range(2)
    )
    stored = [part.masked_fill(dead, torch.nan) for part in (key, value)]
    q_heads = case.kv_heads * case.groups
    query = torch.randn(batch, case.nodes, q_heads, case.head_dim, generator=generator) * 1.5
    arguments: Arguments = {
        "query": query.to(case.dtype).transpose(1, 2),
        "key": stored[0],
        "value": stored[1],
        "prefix_lengths": lengths,
        "ancestor_words": words[:, case.above :].contiguous(),
        "depths": depths,
        "prefix_starts": starts if case.has_padding else None,
        "tree_starts": None if case.gap is None else begins.contiguous(),
        "sinks": torch.randn(q_heads, generator=generator) if case.has_sinks else None,
        "window": case.window,
        "softcap": case.softcap,
        "num_splits": case.num_splits,
        "deterministic": case.is_deterministic,
    }
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    return Call(moved, key.to(device), value.to(device), visible.to(device))


def _between(first: Tensor, past: Tensor, kv_len: int) -> Tensor:
    at = torch.arange(kv_len)
    return (at >= first[:, None]) & (at < past[:, None])  # [batch, kv_len]


def _visible(
    case: Case, parents: Tensor, starts: Tensor, lengths: Tensor, begins: Tensor, kv_len: int
) -> Tensor:
    visible = torch.zeros(len(lengths), case.nodes, kv_len, dtype=torch.bool)
    window = kv_len + parents.shape[1] if case.window is None else case.window
    for row, (start, length, begin) in enumerate(
        zip(starts.tolist(), lengths.tolist(), begins.tolist(), strict=True)
    ):
        tree = parents[row % len(parents)].tolist()
        for node in range(case.nodes):
            path = [case.above + node]
            while tree[path[-1]] != path[-1]:
                path.append(tree[path[-1]])
            position = length + len(path) - 1
            visible[row, node, max(start, position - window + 1) : length] = True
            for distance, slot in enumerate(path):
                visible[row, node, begin + slot] = distance < window
    return visible


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference; infinite for NaN."""
    error = float((found.double() - expected.double()).abs().max())
    return float("inf") if isnan(error) else error


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over that of what is expected; infinite for NaN."""
    found, expected = found.double(), expected.double()
    error = float((found - expected).norm() / expected.norm())
    return float("inf") if isnan(error) else error


def poison(device: str) -> None:
    """Leave NaN in the memory that the next allocations on a GPU are given."""
    if device == "cpu":
        return  # memory is not kept for the next ones there
    blocks = [
        torch.full((size,), 255, dtype=torch.uint8, device=device)
        for size in _POISON_BYTES
        for _ in range(3)
    ]
    torch.cuda.synchronize()
    del blocks


def drawn_cases(count: int, *, factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[Case]:
    """Draw cases in which the values of every factor come equally often, mixed with the others."""
    draw = random.Random(seed)
    decks = {}
    for name, values in factors.items():
        deck = [values[index % len(values)] for index in range(count)]
        draw.shuffle(deck)
        decks[name] = deck
    return [
        _allowed(replace(Case(), **{name: deck[index] for name, deck in decks.items()}))
        for index in range(count)
    ]


def _allowed(case: Case) -> Case:
    """Leave out what the kernels do not take: more than 256 tree slots."""
    return replace(case, above=min(case.above, 256 - case.nodes))


def random_paths(batch: int, *, length: int, nodes: int, generator: torch.Generator) -> Tensor:
    """Draw a path for each row: the root, then slots in ascending order, padded with -1."""
    paths = torch.full((batch, length), -1)
    for row in range(batch):
        kept = int(torch.randint(1, length + 1, (), generator=generator))
        below = 1 + torch.randperm(nodes - 1, generator=generator)[: kept - 1].sort().values
        paths[row, 0] = 0
        paths[row, 1 : 1 + len(below)] = below
    return paths


def is_bitwise(left: Tensor, right: Tensor, what: Callable[[], str]) -> str | None:
    """Return a complaint if two outputs differ in a bit; NaN is never right."""
    if bool(left.isnan().any()):
        return f"{what()}: NaN"
    if torch.equal(left, right):
        return None
    return f"{what()}: differs by {error_of(left, right):.2e} in {int((left != right).sum())}"
