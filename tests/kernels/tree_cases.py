"""Cases of tree attention and their right results: paths over parents, then a dense softmax.

Nothing here reads ancestor words or strides: the right result follows from the contents of a case,
which are laid out in memory in another step. All memory that a call may not read is NaN.
"""

import os
import random
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from speclm.kernels import tree_attention
from speclm.kernels.inputs import TreeAttentionInputs

EPSILON = {torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Rounding of the output, relative to the largest value; float32 includes that of long sums."""

if os.environ.get("TRITON_INTERPRET") == "1":
    EPSILON[torch.bfloat16] = 2.0**-6  # it cuts shares and outputs off, where GPUs round

LSE_EPSILON = 1e-5
"""Rounding of float32 scores and their sum, relative to the denominator's logarithm."""

CAP_EPSILON = 2.0**-22
"""Rounding of scores under a soft cap, relative to the cap: they are computed in units of it."""

KINDS = ("chain", "star", "uniform", "top_k", "near_chain", "padded")
LAYOUTS = ("contiguous", "slots_first", "sliced", "key_beside_value")
GROUPS = (1, 2, 3, 4, 7, 8, 16)
HEAD_DIMS = (16, 64, 80, 96, 128, 256)

Parents = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TreeCase:
    """One call of tree attention, but for its contents.

    Args:
        parents: Parents of every tree slot, of each row or of all of them; padding is its own.
        lengths: Slots before the tree, of each row of the batch.
        nodes: Slots at the end of the tree that attend; None for all.
        starts: Slots of left padding.
        gaps: Slots between prefix and tree.
        sinks: Size of the sinks; None for none.
        logits: Size of the scores.
        spare: Slots behind the longest row.
    """

    parents: tuple[Parents, ...]
    lengths: tuple[int, ...]
    nodes: int | None = None
    starts: tuple[int, ...] | None = None
    gaps: tuple[int, ...] | None = None
    kv_heads: int = 1
    groups: int = 1
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    integers: torch.dtype = torch.int32
    layout: str = "contiguous"
    window: int | None = None
    softcap: float | None = None
    sinks: float | None = None
    logits: float = 1.0
    deterministic: bool = False
    spare: int = 5
    seed: int = 0

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int:
        return len(self.parents[0])

    @property
    def attending(self) -> int:
        return self.slots if self.nodes is None else self.nodes

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.groups

    @property
    def begins(self) -> tuple[int, ...]:
        gaps = self.gaps or (0,) * self.batch
        return tuple(length + gap for length, gap in zip(self.lengths, gaps, strict=True))


@dataclass(frozen=True, slots=True)
class Contents:
    """What a case computes with, by position and not by place in memory.

    Args:
        query: Of every tree slot: ``[batch, q_heads, slots, head_dim]``, as are the next two with
            `kv_heads`.
        tree_key: Keys of the tree.
        tree_value: Values of the tree.
        prefix_key: Keys of slot 0 and on: ``[batch, kv_heads, longest prefix, head_dim]``.
        prefix_value: Values of the prefix.
        sinks: Of each query head.
    """

    query: Tensor
    tree_key: Tensor
    tree_value: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    sinks: Tensor | None

    def rows(self, rows: slice) -> "Contents":
        """Contents of some rows of the batch."""
        parts = (self.query, self.tree_key, self.tree_value, self.prefix_key, self.prefix_value)
        return Contents(*(part[rows] for part in parts), self.sinks)

    def tree_slots(self, slots: list[int] | slice) -> "Contents":
        """Contents with other tree slots."""
        tree = (part[:, :, slots] for part in (self.query, self.tree_key, self.tree_value))
        return Contents(*tree, self.prefix_key, self.prefix_value, self.sinks)


def walk_up(parents: Parents, slot: int) -> list[int]:
    """A slot and what lies above it, in this order; padding has nothing above it."""
    path = [slot]
    while parents[path[-1]] != path[-1]:
        path.append(parents[path[-1]])
    return path


def grow(kind: str, slots: int, seed: int = 0) -> Parents:
    """Parents of a tree of some shape, each before its children."""
    rng = random.Random(f"{kind} {slots} {seed}")
    parents, inside = [0], [0]
    for slot in range(1, slots):
        if kind == "padded" and rng.random() < 0.25:
            parents.append(slot)
        else:
            parents.append(_parent(kind, inside, rng))
            inside.append(slot)
    return tuple(parents)


def _parent(kind: str, inside: list[int], rng: random.Random) -> int:
    if kind == "star":
        return 0
    if kind == "chain":
        return inside[-1]
    if kind == "near_chain":  # a guess next to the chain now and then
        return inside[-1] if rng.random() < 0.8 else inside[-2:][0]
    if kind == "top_k":  # four nodes a level, of which the likelier ones have more children
        level = (len(inside) - 1) // 4
        return 0 if level == 0 else inside[4 * level - 3 + min(rng.randrange(4), rng.randrange(4))]
    return rng.choice(inside)


def reorder(parents: Parents, seed: int) -> list[int]:
    """Slots in another order that has parents before their children; the root stays first."""
    rng = random.Random(seed)
    order, waiting = [0], list(range(1, len(parents)))
    while waiting:
        ready = [slot for slot in waiting if parents[slot] in {slot, *order}]
        order.append(rng.choice(ready))
        waiting.remove(order[-1])
    return order


def renumber(parents: Parents, order: list[int]) -> Parents:
    """Parents of the slots in another order; what is left out may be nobody's parent."""
    return tuple(order.index(parents[slot]) for slot in order)


def draw_contents(case: TreeCase) -> Contents:
    """Normal contents from the seed of a case; a row's do not depend on the rows after it."""
    longest = max(case.lengths, default=0)
    rows = []
    for row in range(case.batch):
        generator = torch.Generator().manual_seed(1000 * case.seed + row)
        normal = partial(torch.randn, generator=generator)
        query = normal(case.q_heads, case.slots, case.head_dim) * case.logits
        tree = normal(2, case.kv_heads, case.slots, case.head_dim)
        prefix = normal(2, case.kv_heads, longest, case.head_dim)
        rows.append([part.to(case.dtype) for part in (query, *tree, *prefix)])
    sinks = None
    if case.sinks is not None:
        generator = torch.Generator().manual_seed(case.seed)
        sinks = (case.sinks * torch.randn(case.q_heads, generator=generator)).to(case.dtype)
    return Contents(*(torch.stack(parts) for parts in zip(*rows, strict=True)), sinks)


def lay_out(case: TreeCase, contents: Contents | None = None) -> TreeAttentionInputs:
    """Put contents into memory that is NaN wherever nothing may be read."""
    contents = contents or draw_contents(case)
    begins = case.begins
    kv_len = max(begins, default=0) + case.slots + case.spare
    key, value = _caches(case, (case.batch, case.kv_heads, kv_len, case.head_dim))
    for row, (length, begin) in enumerate(zip(case.lengths, begins, strict=True)):
        start = case.starts[row] if case.starts else 0
        tree = torch.arange(begin, begin + case.slots)
        prefix = torch.arange(start, length)
        for cache, of_prefix, of_tree in (
            (key, contents.prefix_key, contents.tree_key),
            (value, contents.prefix_value, contents.tree_value),
        ):
            cache[row][:, prefix] = of_prefix[row, :, start:length]
            cache[row][:, tree] = of_tree[row]
    words, depths = words_and_depths(case)
    query = contents.query[:, :, -case.attending :]
    if case.layout != "contiguous":  # in the midst of memory that is NaN, nodes before heads
        around = torch.full((case.batch, case.slots + 2, case.q_heads, case.head_dim), torch.nan)
        around = around.to(case.dtype).transpose(1, 2)[:, :, 1 : 1 + case.attending]
        query = around.copy_(query)

    def integers(numbers: tuple[int, ...] | None) -> Tensor | None:
        return None if numbers is None else torch.tensor(numbers, dtype=case.integers)

    return TreeAttentionInputs(
        query=query,
        key=key,
        value=value,
        prefix_lengths=torch.tensor(case.lengths, dtype=case.integers),
        ancestor_words=words,
        depths=depths,
        prefix_starts=integers(case.starts),
        tree_starts=None if case.gaps is None else integers(begins),
        sinks=contents.sinks,
        scale=case.head_dim**-0.5,
        window=case.window,
        softcap=case.softcap,
        deterministic=case.deterministic,
        return_lse=True,
    )


def _caches(case: TreeCase, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Caches of keys and of values in the layout of a case, full of NaN."""
    rows, heads, slots, dim = shape
    full = partial(torch.full, fill_value=float("nan"), dtype=case.dtype)
    if case.layout == "key_beside_value":  # and the value's slots are farther apart than its heads
        both = full((rows, slots, heads, 2, dim)).transpose(1, 2)
        return both[:, :, :, 0], both[:, :, :, 1]
    if case.layout == "slots_first":
        return full((rows, slots, heads, dim)).transpose(1, 2), full(shape)
    if case.layout == "sliced":
        key = full((rows + 1, heads + 1, slots + 3, dim + 8))[1:, 1:, 3:, 8:]
        return key, full((rows, heads, slots + 1, dim))[:, :, 1:]
    return full(shape), full(shape)


def words_and_depths(case: TreeCase) -> tuple[Tensor, Tensor]:
    """Ancestor words of the nodes that attend, and depths of all slots, from paths."""
    first = case.slots - case.attending
    num_bytes = 8 * -(-case.slots // 64)
    words, depths = [], []
    for parents in case.parents:
        paths = [walk_up(parents, slot) for slot in range(case.slots)]
        depths.append([len(walk) - 1 for walk in paths])
        bits = b"".join(
            sum(1 << slot for slot in walk).to_bytes(num_bytes, "little") for walk in paths[first:]
        )
        words.append(torch.frombuffer(bytearray(bits), dtype=torch.int64))
    everything = torch.full((2 + len(words), case.attending, num_bytes // 8), -1)
    everything[1:-1] = torch.stack(words).view(len(words), case.attending, num_bytes // 8)
    wide = torch.full((len(depths), case.slots + 3), -1, dtype=case.integers)
    wide[:, 2:-1] = torch.tensor(depths, dtype=case.integers)
    return everything[1:-1], wide[:, 2:-1]


def attend_densely(
    case: TreeCase, contents: Contents, *, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attend with one dense softmax a row, as eager attention does: scores and shares in a type.

    Returns:
        The output and the logarithm of the denominator in the layout of `tree_attention`, float64
        where that is computed in and else float32.
    """
    exact = torch.float64 if compute == torch.float64 else torch.float32
    outputs, sums = [], []
    for row, length in enumerate(case.lengths):
        start = case.starts[row] if case.starts else 0
        key = torch.cat([contents.prefix_key[row, :, start:length], contents.tree_key[row]], 1)
        value = torch.cat(
            [contents.prefix_value[row, :, start:length], contents.tree_value[row]], 1
        )
        key, value = (part.to(compute).repeat_interleave(case.groups, 0) for part in (key, value))
        query = contents.query[row, :, -case.attending :].to(compute)
        scores = query @ key.transpose(1, 2) * case.head_dim**-0.5
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        sees = _sees(case, row)
        scores = scores.masked_fill(~sees, -torch.inf).to(exact)
        if contents.sinks is not None:
            sinks = contents.sinks.to(exact)[:, None, None].expand(-1, case.attending, 1)
            scores = torch.cat([scores, sinks], 2)
        sums.append(scores.logsumexp(2))
        shares = scores.softmax(2)[:, :, : key.shape[1]].to(compute)
        outputs.append((shares @ value).transpose(0, 1).to(exact))
    return torch.stack(outputs), torch.stack(sums)


def _sees(case: TreeCase, row: int) -> Tensor:
    """What each node of a row sees of its prefix and of the tree behind it: ``[nodes, slots]``."""
    parents = case.parents[row % len(case.parents)]
    start, length = case.starts[row] if case.starts else 0, case.lengths[row]
    window = case.window or length + case.slots
    sees = torch.zeros(case.attending, length - start + case.slots, dtype=torch.bool)
    for node in range(case.attending):
        path = walk_up(parents, case.slots - case.attending + node)
        first_seen = length + len(path) - window  # the window ends with the node itself
        sees[node, max(first_seen - start, 0) : length - start] = True
        for slot in path[:window]:
            sees[node, length - start + slot] = True
    return sees


def largest_error(
    found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Largest error of outputs, and of sums, if any, relative to their size; NaN is one."""
    output = (found[0].double() - right[0]).abs()
    lse = torch.zeros(1)
    if found[1].numel():
        lse = (found[1].double() - right[1]).abs() / right[1].abs().clamp(min=1.0)
    return tuple(part.nan_to_num(torch.inf).max().item() for part in (output, lse))


def assert_right(
    case: TreeCase, found: tuple[Tensor, Tensor], contents: Contents | None = None
) -> None:
    """Hold a result against the dense softmax in float64; twice the error of eager is allowed."""
    contents = contents or draw_contents(case)
    right = attend_densely(case, contents, compute=torch.float64)
    eager = attend_densely(case, contents, compute=case.dtype)
    values = [contents.tree_value, *(contents.prefix_value,) * (max(case.lengths) > 0)]
    size = max(value.abs().max().item() for value in values)
    of_cap = CAP_EPSILON * (case.softcap or 0.0)
    allowed = 2 * largest_error(eager, right)[0] + (EPSILON[case.dtype] + of_cap) * size
    error, lse_error = largest_error(found, right)
    assert found[0].shape == right[0].shape
    assert found[0].dtype == case.dtype
    assert allowed < size, "eager attention says nothing about this case"
    assert error <= allowed, f"output is {error:.2e} off, {allowed:.2e} is allowed"
    if found[1].numel():
        assert found[1].shape == right[1].shape
        assert lse_error <= LSE_EPSILON + of_cap, f"lse is {lse_error:.2e} off"


def call(inputs: TreeAttentionInputs, **others: object) -> tuple[Tensor, Tensor]:
    """Call the public function with inputs, some of them replaced."""
    found = tree_attention(
        **{name: getattr(inputs, name) for name in TreeAttentionInputs.__slots__} | others
    )
    return found if isinstance(found, tuple) else (found, torch.empty(0))


def near_blocks(block: int, most: int) -> st.SearchStrategy[int]:
    """Whole numbers where loops over blocks go wrong: around their multiples, 0 and 1."""
    numbers = {0, 1, *(k * block + by for k in range(1, most + 1) for by in (-1, 0, 1))}
    return st.sampled_from(sorted(numbers))


@st.composite
def tree_cases(
    draw: st.DrawFn,
    *,
    block: int = 16,
    most_blocks: int = 4,
    sizes: tuple[int, ...] = (1, 4, 7, 17, 33, 64, 65),
    dtypes: tuple[torch.dtype, ...] = tuple(EPSILON),
    head_dims: tuple[int, ...] = HEAD_DIMS,
    most_rows: int = 64,
    **fixed: object,
) -> TreeCase:
    """Cases with every feature, of at most so many rows of queries a key head.

    Args:
        draw: Of hypothesis.
        block: Keys of a tile, to which lengths, windows and padding are close.
        most_blocks: Longest prefix in tiles.
        sizes: Tree slots.
        dtypes: Types of queries, keys and values.
        head_dims: Widths of heads.
        most_rows: Most rows of queries of a key head; keeps the interpreter quick.
        fixed: Fields that are not drawn; `nodes` may only be None.
    """
    sampled = partial(_sampled, draw)
    slots = sampled(sizes)
    kind = sampled(KINDS)
    batch = draw(st.integers(1, 3 if slots < 33 else 2))
    lengths = tuple(draw(near_blocks(block, most_blocks)) for _ in range(batch))
    starts = tuple(draw(st.sampled_from([0, 1, block - 1, block, length])) for length in lengths)
    starts = tuple(min(start, length) for start, length in zip(starts, lengths, strict=True))
    attends_in_full = "nodes" in fixed or draw(st.booleans())
    nodes = slots if attends_in_full else draw(st.integers(1, slots))
    groups = sampled([number for number in GROUPS if number * nodes <= most_rows or number == 1])
    trees = draw(st.sampled_from([1, batch]))
    fields = {
        "parents": tuple(grow(kind, slots, seed) for seed in range(trees)),
        "lengths": lengths,
        "nodes": nodes,
        "starts": starts if draw(st.booleans()) else None,
        "gaps": tuple(draw(st.integers(0, 3)) for _ in lengths) if draw(st.booleans()) else None,
        "kv_heads": draw(st.integers(1, 2)) if groups * nodes <= most_rows // 2 else 1,
        "groups": groups,
        "head_dim": sampled(head_dims),
        "dtype": sampled(dtypes),
        "integers": sampled([torch.int32, torch.int64]),
        "layout": sampled(LAYOUTS),
        "window": draw(st.none() | near_blocks(block, most_blocks - 1).filter(bool)),
        "softcap": sampled([None, None, 5.0, 30.0]),
        "sinks": sampled([None, None, 1.0, 5.0]),
        "seed": draw(st.integers(0, 99)),
    }
    return TreeCase(**(fields | fixed))


def _sampled(draw: st.DrawFn, options: object) -> object:
    return draw(st.sampled_from(list(options)))
