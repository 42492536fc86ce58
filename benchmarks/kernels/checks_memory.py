"""Checks of where kernels read and write: far offsets, overlaps, and small calls to be watched."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.cases import RELATIVE, Case, random_parents, random_paths, relative_error
from benchmarks.kernels.checks_attention import check_case
from speclm.kernels import keep_path_, tree_attention, tree_words
from speclm.kernels.reference import keep_path_reference, tree_words_reference

Check = tuple[str, Callable[[], str | None]]

_DIM = 128


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of what is read and moved at the end of a large storage.

    Args:
        elements: Of the storage.
        rows: Rows of a batch.
        layers: Layers.
        heads: Key heads.
        nodes: Nodes of a tree.
        seen: Slots of the prefix that are read.
    """

    elements: int
    rows: int
    layers: int
    heads: int
    nodes: int
    seen: int


FAR = Sizes(2**31 + 2**26, rows=32, layers=4, heads=8, nodes=33, seen=700)
"""A storage in which offsets do not fit 32 bits."""
NEAR = Sizes(2**16, rows=2, layers=2, heads=2, nodes=5, seen=40)
"""A dry run."""


def offset_checks(*, device: str, backend: str, sizes: Sizes = FAR) -> Iterator[Check]:
    """Return checks on one large storage, seen as a long row and as many rows."""
    generator = torch.Generator(device=device).manual_seed(0)
    flat = torch.empty(sizes.elements, dtype=torch.float16, device=device)
    flat.normal_(generator=generator)
    for name, view in {"slots": _one_row, "rows": _many_rows}.items():
        yield (
            f"attention at far {name}",
            lambda view=view: _check_far(*view(flat, sizes), sizes, backend=backend),
        )
    many = _cut(flat, sizes.layers, sizes.rows, sizes.heads, -1, _DIM)
    yield "keep_path_ at far rows", lambda: _check_moves(many, sizes)
    yield "keep_path_ at far slots", lambda: _check_moves(_cut(flat, 1, 1, 1, -1, _DIM), sizes)


def _cut(flat: Tensor, *shape: int) -> Tensor:
    """Return the end of a storage in a shape whose -1 takes all there is."""
    size = prod(axis for axis in shape if axis > 0)
    length = flat.numel() // size
    return flat[-size * length :].view([axis if axis > 0 else length for axis in shape])


def _one_row(flat: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    cache = _cut(flat, 1, 1, -1, _DIM)
    return cache, torch.tensor([cache.shape[2] - sizes.nodes - 5], device=flat.device)


def _many_rows(flat: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    cache = _cut(flat, sizes.rows, sizes.heads, -1, _DIM)
    ends = cache.shape[2] - sizes.nodes - torch.arange(sizes.rows, device=flat.device) % 7
    return cache, ends


def _check_far(cache: Tensor, ends: Tensor, sizes: Sizes, *, backend: str) -> str | None:
    """Compare attention at the end of a storage with the same over a copy of what it reads."""
    generator = torch.Generator().manual_seed(1)
    device, batch = cache.device, len(ends)
    words, depths = tree_words_reference(random_parents(1, sizes.nodes, generator).to(device))
    query = torch.randn(batch, 4 * cache.shape[1], sizes.nodes, _DIM, generator=generator)
    query = query.to(cache)
    shared = {"ancestor_words": words, "depths": depths}
    starts = (ends - sizes.seen).clamp_min(0)
    places = {"prefix_lengths": ends, "prefix_starts": starts}
    output = tree_attention(query, cache, cache, **places, **shared, backend=backend)
    near = torch.stack([_read(cache, row, int(starts[row]), sizes) for row in range(batch)])
    expected = tree_attention(
        query.double(), near, near, prefix_lengths=ends - starts, **shared, backend="reference"
    )
    error = relative_error(output, expected)
    bound = RELATIVE[cache.dtype]
    return None if error <= bound else f"off by {error:.1e} of its norm, expected {bound}"


def _read(cache: Tensor, row: int, start: int, sizes: Sizes) -> Tensor:
    past = start + sizes.seen + 9 + sizes.nodes
    part = cache[row, :, start:past].double()
    return F.pad(part, (0, 0, 0, past - start - part.shape[1]))


def _check_moves(storage: Tensor, sizes: Sizes) -> str | None:
    """Move paths at the end of a storage; all before it has to stay as it is."""
    _, rows, _, kv_len, _ = storage.shape
    generator = torch.Generator().manual_seed(2)
    length = min(9, sizes.nodes)
    paths = random_paths(rows, length=length, nodes=sizes.nodes, generator=generator)
    paths = paths.to(storage.device)
    lengths = torch.full((rows,), kv_len - sizes.nodes - 3, device=storage.device)
    low = kv_len - 2 * sizes.nodes
    before = storage[..., :low, :].view(torch.int16).sum(dtype=torch.int64)
    expected = storage[..., low:, :].clone()
    keep_path_(storage, paths, prefix_lengths=lengths, tree_starts=lengths + 2)
    places = {"prefix_lengths": lengths - low, "tree_starts": lengths + 2 - low}
    keep_path_reference(expected, paths, **places)
    if not torch.equal(storage[..., low:, :].view(torch.int16), expected.view(torch.int16)):
        return "slots are not moved as by the reference"
    if storage[..., :low, :].view(torch.int16).sum(dtype=torch.int64) != before:
        return "slots before the prefix's end have changed"
    return None


def check_races(*, device: str, repeats: int = 200) -> str | None:
    """Move paths whose sources and targets overlap, again and again."""
    generator = torch.Generator().manual_seed(3)
    shape = (64, 4, 4, 96, 128) if device != "cpu" else (2, 3, 1, 80, 16)
    contents = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
    batch, begin = shape[1], 16
    storage, expected = torch.empty_like(contents), torch.empty_like(contents)
    for repeat in range(repeats):
        nodes = (20, 64)[repeat % 2]
        length = min(nodes, (17, 33, 60)[repeat % 3])  # longer than what is moved at once
        paths = random_paths(batch, length=length, nodes=nodes, generator=generator).to(device)
        lengths = torch.randint(begin - repeat % 2, begin + 1, (batch,), generator=generator)
        places = {
            "prefix_lengths": lengths.to(device),
            "tree_starts": torch.full((batch,), begin, device=device),
        }
        storage.copy_(contents)
        expected.copy_(contents)
        keep_path_(storage, paths, **places)
        keep_path_reference(expected, paths, **places)
        if not torch.equal(storage, expected):
            wrong = int((storage != expected).sum())
            return f"repeat {repeat} moves {wrong} values otherwise than the reference"
    return None


def watched_checks(*, device: str, backend: str) -> Iterator[Check]:
    """Return checks small enough for a tool that watches every access."""
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    plain = {"head_dim": 128, "groups": 4, "kv_heads": 1, "nodes": 17, "lengths": (129, 70)}
    if device == "cpu":
        plain |= {"head_dim": 16, "groups": 2, "nodes": 3, "lengths": (17, 9)}
    rich = {"window": 40, "softcap": 20.0, "has_sinks": True, "has_padding": True, "gap": 3}
    split = {"has_own_trees": True, "num_splits": 3}
    for name, dtype in kinds.items():
        for what, more in {"plain": {}, "every feature": rich, "splits": split}.items():
            case = Case(**plain, **more, dtype=dtype)
            yield (
                f"watched attention {name}, {what}",
                lambda case=case: check_case(case, device=device, backend=backend),
            )
    yield "watched keep_path_", lambda: check_races(device=device, repeats=4)
    yield "watched tree_words", lambda: _check_words(device)


def _check_words(device: str) -> str | None:
    parents = random_parents(3, 70, torch.Generator().manual_seed(4)).to(device)
    found, expected = tree_words(parents), tree_words_reference(parents)
    same = all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    return None if same else "words or depths differ from the reference"
