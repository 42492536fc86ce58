"""Keeping a path in plain PyTorch, and what is refused before any backend sees it."""

import inspect
from functools import partial

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from speclm.errors import KernelError
from speclm.kernels import keep_path_
from speclm.kernels.backends import VARIABLE
from speclm.kernels.keep_path import keep_path_backend
from tests.kernels.path_cases import (
    DTYPES,
    PathCase,
    accepting,
    arguments,
    assert_decodes_on,
    assert_moved,
    directed_cases,
    lay_out,
    move_slot_by_slot,
    path_cases,
)

CPU = torch.device("cpu")
CASE = PathCase(lengths=(3, 1), paths=((0, 2), (1,)))
PAGED = PathCase(lengths=(3, 1), paths=((0, 2), (1,)), page_len=4)
op = torch.ops.speclm.keep_path_.default


def call_op(case: PathCase = CASE, **others: object) -> None:
    """Call the op itself, which checks shapes, where the test's own checks would be first."""
    given_tensors = arguments(case, lay_out(case)) | others
    op(*given_tensors.values(), "reference")


def call(case: PathCase = CASE, **others: object) -> None:
    keep_path_(**(arguments(case, lay_out(case)) | others))


def refuse_to_read(*_: object) -> None:
    raise RuntimeError("read on the host")


@given(case=path_cases())
def test_all_memory_is_what_copies_slot_by_slot_leave(case):
    assert_moved(case)


@pytest.mark.parametrize("case", directed_cases(), ids=lambda case: f"{case.head_dim}-{case.paths}")
def test_targets_that_are_sources_of_other_nodes_are_read_first(case):
    assert_moved(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_every_type_survive(dtype):
    assert_moved(PathCase(lengths=(3,), paths=((1, 4),), dtype=dtype))


@pytest.mark.parametrize("kept", range(6))
def test_every_accepted_length_of_a_chain_beside_siblings(kept):
    assert_moved(accepting(kept))


@pytest.mark.parametrize("page_len", [0, 4])
def test_decoding_goes_on_as_from_a_cache_that_never_held_the_tree(page_len):
    assert_decodes_on(page_len=page_len, backend="reference")


@pytest.mark.parametrize("axis", range(5))
def test_storage_without_values_stays_as_it_is(axis):
    shape = [2, 1, 2, 5, 4]
    shape[axis] = 0
    rows = shape[1]
    paths, lengths = torch.full((rows, 2), -1), torch.zeros(rows, dtype=torch.long)
    keep_path_(torch.empty(shape), paths, prefix_lengths=lengths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"storage": torch.zeros(2, 2, 6, 4)}, r"storage has shape \(2, 2, 6, 4\).*5 axes"),
        ({"storage": torch.zeros(2, 2, 2, 6, 4, dtype=torch.complex128)}, "of 16 bytes, expected"),
        ({"storage": torch.zeros(2, 2, 2, 6, 8)[..., ::2]}, r"strides .* 1 in the last axis"),
        ({"storage": torch.zeros(1, 2, 2, 6, 4).expand(2, -1, -1, -1, -1)}, "expand none"),
        ({"storage": torch.zeros(2, 3, 2, 6, 4)}, "storage has 3 rows, paths 2"),
        ({"paths": torch.zeros(2, dtype=torch.long)}, r"paths is torch.int64 of shape \(2,\)"),
        ({"paths": torch.zeros(2, 3)}, r"paths is torch.float32"),
        ({"prefix_lengths": torch.zeros(3, dtype=torch.long)}, r"prefix_lengths .*each of the 2"),
        ({"prefix_lengths": torch.zeros(2)}, "prefix_lengths is torch.float32"),
        ({"tree_starts": torch.zeros(2, 1, dtype=torch.long)}, "tree_starts is torch.int64 of"),
        ({"tree_starts": torch.zeros(2, dtype=torch.int16)}, "tree_starts is torch.int16"),
        ({"block_table": torch.zeros(3, 1, dtype=torch.int32)}, "block_table .* pages of 2 rows"),
        ({"block_table": torch.zeros(2, 1)}, "block_table is torch.float32"),
        (
            {"block_table": torch.zeros(2, 1).int(), "storage": torch.zeros(2, 2, 2, 0, 4)},
            "pages without slots",
        ),
        ({"paths": torch.zeros(2, 3, dtype=torch.long, device="meta")}, "paths is on meta"),
        (
            {"prefix_lengths": torch.zeros(2, dtype=torch.long, device="meta")},
            "prefix_lengths is on meta, storage on cpu",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message):
    with pytest.raises(KernelError, match=message):
        call_op(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": torch.tensor([[0, 2], [2, 1]])}, r"path of row 1 is \[2, 1\].*ascending"),
        ({"paths": torch.tensor([[0, 0], [1, -1]])}, "path of row 0 .*ascending"),
        ({"paths": torch.tensor([[0, -1, 2], [1, 2, -1]])}, "path of row 0 .*only behind"),
        ({"paths": torch.tensor([[0, 2], [-2, -1]])}, "path of row 1 .*only behind"),
        ({"paths": torch.tensor([[0, 2], [1, 90]])}, "row 1 needs slots up to 92, the cache has 8"),
        ({"prefix_lengths": torch.tensor([3, 9])}, "row 1 needs slots up to 11, the cache has 8"),
        ({"prefix_lengths": torch.tensor([-1, 1])}, "row 0 has a prefix of -1 slots"),
        ({"tree_starts": torch.tensor([2, 1])}, "row 0 has a prefix of 3 slots .*from slot 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message):
    memory = lay_out(CASE)
    before = memory.storage.clone()
    with pytest.raises(KernelError, match=message):
        keep_path_(**(arguments(CASE, memory) | change))
    assert torch.equal(memory.storage.view(torch.uint8), before.view(torch.uint8))


def test_a_prefix_longer_than_the_cache_is_refused_though_nothing_is_kept():
    paths, lengths = torch.full((2, 1), -1), torch.tensor([9, 0])
    with pytest.raises(KernelError, match="row 0 needs slots up to 9"):
        call(paths=paths, prefix_lengths=lengths)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[0, 1], [2, 1]], r"overlap in page 1"),  # both write there
        ([[0, 1], [0, 2]], r"overlap in page 0"),  # one writes where the other reads its prefix
        ([[0, 0], [1, 2]], r"overlap in page 0"),
        ([[0, 7], [1, 2]], r"block_table\[0, 1\] is page 7, expected one of 4"),
    ],
)
def test_pages_that_are_written_twice_are_refused(table, message):
    paged = partial(
        keep_path_,
        torch.zeros(1, 4, 1, 4, 2),
        torch.tensor([[1, 2], [0, 2]]),
        prefix_lengths=torch.tensor([4, 2]),
    )
    with pytest.raises(KernelError, match=message):
        paged(block_table=torch.tensor(table))


def test_rows_may_share_pages_of_their_prefixes():
    storage = torch.arange(4.0 * 4).view(1, 4, 1, 4, 1)
    keep_path_(
        storage,
        torch.tensor([[1], [-1], [0]]),
        prefix_lengths=torch.tensor([4, 3, 4]),
        block_table=torch.tensor([[0, 1], [0, 9], [0, 2]]),  # the third row's path is in place
    )
    right = torch.arange(4.0 * 4)
    right[4] = 5.0
    assert torch.equal(storage.flatten(), right)


def test_values_are_not_read_where_they_are_not_checked(monkeypatch):
    monkeypatch.setattr("speclm.kernels.keep_path.keep_path_reference", lambda *_, **__: None)
    given_tensors = arguments(CASE, lay_out(CASE))
    for name in ("tolist", "item", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse_to_read)
    with pytest.raises(RuntimeError, match="read on the host"):
        keep_path_(**given_tensors)
    keep_path_(**given_tensors, check_values=False)


def test_storage_that_requires_gradients_is_refused():
    storage = lay_out(CASE).storage.clone().requires_grad_()
    with pytest.raises(KernelError, match="storage requires gradients"):
        call(storage=storage)
    with torch.no_grad():
        call(storage=storage)


def test_a_cpu_moves_slots_in_plain_pytorch(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert keep_path_backend(CPU).backend == "reference"
    with pytest.raises(KernelError, match=r"'triton' cannot be used: .*leave it out"):
        call(backend="triton")
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(KernelError, match=f"'triton' cannot be used: .*unset {VARIABLE}"):
        call()
    with pytest.raises(KernelError, match=r"backend is 'sdpa', expected one of"):
        call(backend="sdpa")


@pytest.mark.parametrize("case", [CASE, PAGED], ids=["contiguous", "paged"])
def test_the_op_is_what_it_is_declared_to_be(case):
    opcheck(op, (*arguments(case, lay_out(case)).values(), "reference"))


def test_shapes_are_checked_where_nothing_is_computed():
    with FakeTensorMode():
        storage, lengths = torch.empty(2, 2, 2, 6, 4), torch.zeros(2, dtype=torch.long)
        paths = torch.zeros(2, 3, dtype=torch.long)
        assert op(storage, paths, lengths, None, None, "auto") is None
        with pytest.raises(KernelError, match="storage has 2 rows, paths 3"):
            op(storage, torch.zeros(3, 3, dtype=torch.long), lengths, None, None, "auto")


@pytest.mark.parametrize("case", [CASE, PAGED], ids=["contiguous", "paged"])
def test_a_compiled_call_moves_the_same_slots(case):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def moved(**given_tensors):
        inspect.unwrap(keep_path_)(**given_tensors)  # shape checks cannot be compiled
        return given_tensors["storage"].view(torch.int32) + 1

    memory = lay_out(case)
    right = memory.cut(move_slot_by_slot(case, memory)).view(torch.int32)
    found = moved(**arguments(case, memory))
    assert torch.equal(memory.storage.view(torch.int32), right)
    assert torch.equal(found, right + 1)
