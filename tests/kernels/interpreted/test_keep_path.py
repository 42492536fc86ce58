"""The Triton kernel that keeps a path, in the interpreter, against slots copied one by one."""

import os
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.cache import TreeCache
from speclm.kernels import keep_path_
from speclm.kernels._triton_tree_ops import keep_path_launch
from speclm.kernels.backends import VARIABLE
from tests.kernels.interpreted.launching import search
from tests.kernels.path_cases import (
    DTYPES,
    PathCase,
    accepting,
    arguments,
    assert_decodes_on,
    assert_moved,
    directed_cases,
    lay_out,
    path_cases,
)


@search
@given(case=path_cases())
def test_all_memory_is_what_copies_slot_by_slot_leave(case):
    assert_moved(case, backend="triton")


@pytest.mark.parametrize("case", directed_cases(), ids=lambda case: f"{case.head_dim}-{case.paths}")
def test_targets_that_are_sources_of_other_nodes_are_read_first(case):
    assert_moved(case, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_type_survive(dtype):
    assert_moved(PathCase(lengths=(3,), paths=((1, 4),), dtype=dtype), backend="triton")


@pytest.mark.parametrize("kept", range(6))
def test_every_accepted_length_of_a_chain_beside_siblings(kept):
    assert_moved(accepting(kept), backend="triton")


def test_decoding_goes_on_as_from_a_cache_that_never_held_the_tree():
    assert_decodes_on(backend="triton")


@search
@given(
    batch=st.integers(1, 3),
    widths=st.sampled_from([(4, 4), (3, 5)]),
    rounds=st.lists(st.sets(st.integers(0, 19)), min_size=1, max_size=3),
)
def test_a_tree_cache_holds_what_it_holds_without_the_kernel(batch, widths, rounds):
    caches = []
    for backend in ("triton", "auto"):
        with mock.patch.dict(os.environ, {VARIABLE: backend}):
            caches.append(_decoded(batch, widths, rounds))
    assert caches[0].host_lengths == caches[1].host_lengths
    for layer, right in zip(caches[0].layers, caches[1].layers, strict=True):
        for row, length in enumerate(caches[0].host_lengths):
            assert torch.equal(layer.keys[row, :, :length], right.keys[row, :, :length])
            assert torch.equal(layer.values[row, :, :length], right.values[row, :, :length])


def test_the_launch_is_made_without_reading_a_number():
    case = PathCase(lengths=(3, 1), paths=((0, 2), (1,)), gaps=(0, 2))
    given_tensors = arguments(case, lay_out(case)).values()
    storage, *rest = (tensor.to("meta") for tensor in given_tensors)
    launch = keep_path_launch(storage, *rest)
    assert launch.grid == (case.layers * case.batch * case.kv_heads, 1)


def test_autograd_knows_that_storage_is_written():
    case = PathCase(lengths=(3,), paths=((1,),))
    given_tensors = arguments(case, lay_out(case))
    before = given_tensors["storage"]._version
    keep_path_(**given_tensors, backend="triton")
    assert given_tensors["storage"]._version > before


def _decoded(batch: int, widths: tuple[int, int], rounds: list[set[int]]) -> TreeCache:
    generator = torch.Generator().manual_seed(0)
    cache = TreeCache(num_layers=2, num_padding=torch.zeros(batch, dtype=torch.long))

    def write(slots: int) -> None:
        for layer in cache.layers:
            layer.update(
                *(torch.randn(batch, 2, slots, width, generator=generator) for width in widths)
            )

    write(3)
    cache.commit_prompt()
    for kept in rounds:
        cache.reserve(20)
        write(20)
        cache.append(20)
        cache.keep([[slot for slot in sorted(kept) if slot >= row] for row in range(batch)])
    return cache
