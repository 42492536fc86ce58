"""Cases of keeping a path and their right results: slots that are copied one by one.

All memory is random bits, so that NaNs of every kind are among them, and all of it is compared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from speclm.kernels import keep_path_, tree_attention

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.int8,
    torch.int64,
    torch.complex64,
)
LAYOUTS = ("contiguous", "slots_first", "sliced")


@dataclass(frozen=True, slots=True)
class PathCase:
    """One call of `keep_path_`, but for the contents of its memory.

    Args:
        lengths: Slots before the tree, of each row of the batch.
        paths: Slots of the tree to keep, of each row.
        gaps: Slots between prefix and tree; None for none.
        padding: Columns of the paths behind the longest.
        spare: Slots behind the longest row.
    """

    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    gaps: tuple[int, ...] | None = None
    layers: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    dtype: torch.dtype = torch.float32
    integers: torch.dtype = torch.int64
    layout: str = "contiguous"
    padding: int = 1
    spare: int = 2
    seed: int = 0

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def begins(self) -> tuple[int, ...]:
        gaps = self.gaps or (0,) * self.batch
        return tuple(length + gap for length, gap in zip(self.lengths, gaps, strict=True))

    @property
    def kv_len(self) -> int:
        ends = (
            begin + max(path, default=-1) + 1
            for begin, path in zip(self.begins, self.paths, strict=True)
        )
        return max(ends) + self.spare

    @property
    def padded_paths(self) -> list[list[int]]:
        longest = max(map(len, self.paths)) + self.padding
        return [[*path, *[-1] * (longest - len(path))] for path in self.paths]


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a case: all of it, and the part that is the cache."""

    everything: Tensor
    cut: Callable[[Tensor], Tensor]

    @property
    def storage(self) -> Tensor:
        return self.cut(self.everything)


def lay_out(case: PathCase) -> Memory:
    """Fill memory with random bits."""
    shape = [case.layers, case.batch, case.kv_heads, case.kv_len, case.head_dim]
    cut: Callable[[Tensor], Tensor] = partial(torch.narrow, dim=0, start=0, length=case.layers)
    if case.layout == "slots_first":
        shape = [shape[axis] for axis in (0, 1, 3, 2, 4)]
        cut = partial(torch.transpose, dim0=2, dim1=3)
    elif case.layout == "sliced":
        shape = [size + 3 for size in shape]
        cut = _without_borders
    size = torch.empty(0, dtype=case.dtype).itemsize
    generator = torch.Generator().manual_seed(case.seed)
    bits = torch.randint(
        0, 256, (*shape[:-1], shape[-1] * size), generator=generator, dtype=torch.uint8
    )
    return Memory(bits.view(case.dtype), cut)


def move_slot_by_slot(case: PathCase, memory: Memory) -> Tensor:
    """Return what all memory should be after the call, which `memory` is before."""
    moved = memory.everything.clone()
    old, new = memory.storage, memory.cut(moved)
    for row, (length, begin, path) in enumerate(
        zip(case.lengths, case.begins, case.paths, strict=True)
    ):
        for offset, slot in enumerate(path):
            new[:, row, :, length + offset] = old[:, row, :, begin + slot]
    return moved


def arguments(case: PathCase, memory: Memory) -> dict[str, Tensor | None]:
    """Arguments of `keep_path_`, whole numbers with strides of their own."""

    def column(numbers: tuple[int, ...]) -> Tensor:
        return torch.tensor(numbers, dtype=case.integers).repeat_interleave(2)[::2]

    return {
        "storage": memory.storage,
        "paths": torch.tensor(case.padded_paths, dtype=case.integers).T.contiguous().T,
        "prefix_lengths": column(case.lengths),
        "tree_starts": None if case.gaps is None else column(case.begins),
    }


def assert_moved(case: PathCase, **options: object) -> None:
    """Call `keep_path_` and hold all memory against the slots copied one by one."""
    memory = lay_out(case)
    right = move_slot_by_slot(case, memory)
    keep_path_(**arguments(case, memory), **options)
    assert torch.equal(memory.everything.view(torch.uint8), right.view(torch.uint8))


def accepting(kept: int) -> PathCase:
    """Two rows that accept a number of nodes of a chain next to siblings, and half of it."""
    path = (0, 2, 3, 6, 7, 9)[:kept]
    return PathCase(lengths=(5, 0), paths=(path, path[: kept // 2]), gaps=(0, 5))


def assert_decodes_on(*, backend: str) -> None:
    """Keep a path, decode a token, and compare with a cache that held nothing but the path."""
    length, path, dim = 6, [0, 2, 3], 16
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    storage, new = normal(2, 1, 2, length + 8, dim), normal(2, 1, 2, 1, dim)
    kept = [*range(length), *(length + slot for slot in path)]
    fresh = torch.cat([storage[:, :, :, kept], new], 3)
    keep_path_(
        storage,
        torch.tensor([[*path, -1]]),
        prefix_lengths=torch.tensor([length]),
        backend=backend,
    )
    past = length + len(path)
    storage[:, 0, :, past] = new[:, 0, :, 0]
    attend = partial(
        tree_attention,
        normal(1, 4, 1, dim),
        prefix_lengths=torch.tensor([past]),
        ancestor_words=torch.ones(1, 1, 1, dtype=torch.int64),
        depths=torch.zeros(1, 1, dtype=torch.int32),
        backend="reference",
    )
    assert torch.equal(attend(*storage), attend(*fresh))


def _without_borders(tensor: Tensor) -> Tensor:
    return tensor[1:-2, 2:-1, 1:-2, 2:-1, 1:-2]


@st.composite
def path_cases(draw: st.DrawFn, *, most_nodes: int = 40) -> PathCase:
    """Cases of every kind."""
    batch = draw(st.integers(1, 3))
    paths = []
    for _ in range(batch):
        nodes = draw(st.integers(1, most_nodes))
        kept = draw(st.sets(st.integers(0, nodes - 1)) | st.just(set(range(nodes))))
        paths.append(tuple(sorted(kept)))
    return PathCase(
        lengths=tuple(draw(st.integers(0, 20)) for _ in range(batch)),
        paths=tuple(paths),
        gaps=draw(st.none() | st.tuples(*[st.integers(0, 5)] * batch)),
        layers=draw(st.integers(1, 3)),
        kv_heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from([1, 3, 4, 8])),
        dtype=draw(st.sampled_from(DTYPES)),
        integers=draw(st.sampled_from([torch.int32, torch.int64])),
        layout=draw(st.sampled_from(LAYOUTS)),
        padding=draw(st.integers(0, 2)),
        spare=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 99)),
    )


def directed_cases() -> list[PathCase]:
    """Paths whose targets are other nodes' sources, around the borders of chunks."""
    shifts = [
        PathCase(lengths=(3,), paths=(tuple(range(shift, shift + size)),))
        for shift, size in ((1, 15), (1, 16), (1, 17), (1, 40), (15, 40), (16, 40), (17, 40))
    ]
    every_second = PathCase(lengths=(0,), paths=(tuple(range(0, 80, 2)),))
    late = PathCase(lengths=(2,), paths=((*range(20), 30, 31, 45),))  # in place for a chunk
    ragged = PathCase(lengths=(0, 9, 4), paths=((), tuple(range(3, 40)), (0,)), gaps=(9, 0, 5))
    in_place = PathCase(lengths=(4, 1), paths=(tuple(range(20)), (0, 1)))
    empty = PathCase(lengths=(4,), paths=((),), padding=0)
    wide = [PathCase(lengths=(1,), paths=((1, 2, 5),), head_dim=dim) for dim in (96, 128, 129, 576)]
    return [*shifts, every_second, late, ragged, in_place, empty, *wide]
