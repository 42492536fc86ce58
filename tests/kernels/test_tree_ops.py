"""Paths and ancestor words in PyTorch, and the calls that are refused before any backend."""

import inspect
import sys

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from speclm.errors import KernelError
from speclm.kernels import keep_path_, tree_words
from speclm.kernels.backends import VARIABLE
from speclm.tree.topology import from_parents
from speclm.tree.words import num_words
from tests.kernels import parent_cases
from tests.kernels.parent_cases import SIZES, chain, scattered, star, trees
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
keep_path_op = torch.ops.speclm.keep_path_.default
words_op = torch.ops.speclm.tree_words.default


def call_op(case: PathCase = CASE, **others: object) -> None:
    """Call the op itself, which checks shapes, where the test's own checks would be first."""
    given_tensors = arguments(case, lay_out(case)) | others
    keep_path_op(*given_tensors.values(), "reference")


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
def test_every_accepted_length_of_a_chain_next_to_siblings(kept):
    assert_moved(accepting(kept))


def test_decoding_goes_on_as_from_a_cache_that_never_held_the_tree():
    assert_decodes_on(backend="reference")


@pytest.mark.parametrize("axis", range(5))
def test_storage_without_values_stays_as_it_is(axis):
    shape = [2, 1, 2, 5, 4]
    shape[axis] = 0
    rows = shape[1]
    paths, lengths = torch.full((rows, 2), -1), torch.zeros(rows, dtype=torch.long)
    keep_path_(torch.empty(shape), paths, prefix_lengths=lengths)


def test_tensors_that_do_not_fit_are_refused():
    cells = [
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
        ({"paths": torch.zeros(2, 3, dtype=torch.long, device="meta")}, "paths is on meta"),
        (
            {"prefix_lengths": torch.zeros(2, dtype=torch.long, device="meta")},
            "prefix_lengths is on meta, storage on cpu",
        ),
    ]
    for change, message in cells:
        with pytest.raises(KernelError, match=message):
            call_op(**change)


def test_numbers_that_do_not_fit_are_refused():
    cells = [
        ({"paths": torch.tensor([[0, 2], [2, 1]])}, r"path of row 1 is \[2, 1\].*ascending"),
        ({"paths": torch.tensor([[0, 0], [1, -1]])}, "path of row 0 .*ascending"),
        ({"paths": torch.tensor([[0, -1, 2], [1, 2, -1]])}, "path of row 0 .*only after"),
        ({"paths": torch.tensor([[0, 2], [-2, -1]])}, "path of row 1 .*only after"),
        ({"paths": torch.tensor([[0, 2], [1, 90]])}, "row 1 needs slots up to 92, the cache has 8"),
        ({"prefix_lengths": torch.tensor([3, 9])}, "row 1 needs slots up to 11, the cache has 8"),
        ({"prefix_lengths": torch.tensor([-1, 1])}, "row 0 has a prefix of -1 slots"),
        ({"tree_starts": torch.tensor([2, 1])}, "row 0 has a prefix of 3 slots .*from slot 2"),
    ]
    for change, message in cells:
        memory = lay_out(CASE)
        before = memory.storage.clone()
        with pytest.raises(KernelError, match=message):
            keep_path_(**(arguments(CASE, memory) | change))
        assert torch.equal(memory.storage.view(torch.uint8), before.view(torch.uint8))


def test_a_prefix_longer_than_the_cache_is_refused_though_nothing_is_kept():
    paths, lengths = torch.full((2, 1), -1), torch.tensor([9, 0])
    with pytest.raises(KernelError, match="row 0 needs slots up to 9"):
        call(paths=paths, prefix_lengths=lengths)


def test_values_are_not_read_where_they_are_not_checked(monkeypatch):
    monkeypatch.setattr("speclm.kernels.tree_ops.keep_path_reference", lambda *_, **__: None)
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
    with pytest.raises(KernelError, match=r"'triton' cannot be used: .*leave it out"):
        call(backend="triton")
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(KernelError, match=f"'triton' cannot be used: .*unset {VARIABLE}"):
        call()
    with pytest.raises(KernelError, match=r"backend is 'sdpa', expected one of"):
        call(backend="sdpa")


def test_the_op_is_what_it_is_declared_to_be():
    opcheck(keep_path_op, (*arguments(CASE, lay_out(CASE)).values(), "reference"))


def test_shapes_are_checked_where_nothing_is_computed():
    with FakeTensorMode():
        storage, lengths = torch.empty(2, 2, 2, 6, 4), torch.zeros(2, dtype=torch.long)
        paths = torch.zeros(2, 3, dtype=torch.long)
        assert keep_path_op(storage, paths, lengths, None, "auto") is None
        with pytest.raises(KernelError, match="storage has 2 rows, paths 3"):
            keep_path_op(storage, torch.zeros(3, 3, dtype=torch.long), lengths, None, "auto")


def test_a_compiled_call_moves_the_same_slots():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def moved(**given_tensors):
        inspect.unwrap(keep_path_)(**given_tensors)  # shape checks cannot be compiled
        return given_tensors["storage"].view(torch.int32) + 1

    memory = lay_out(CASE)
    right = memory.cut(move_slot_by_slot(CASE, memory)).view(torch.int32)
    found = moved(**arguments(CASE, memory))
    assert torch.equal(memory.storage.view(torch.int32), right)
    assert torch.equal(found, right + 1)


@given(parents=trees(most_nodes=256))
def test_words_and_depths_are_those_of_walks_to_the_root(parents):
    parent_cases.assert_right(tree_words(torch.tensor(parents)), parents)


@given(parents=trees(most_nodes=65))
def test_words_and_depths_are_those_of_a_topology(parents):
    topology = from_parents(parents, device=CPU)
    words, depths = tree_words(topology.parents)
    assert torch.equal(words, topology.ancestor_words)
    assert torch.equal(depths, topology.depths.to(torch.int32))


@pytest.mark.parametrize("nodes", SIZES)
def test_every_number_of_words(nodes):
    parents = [chain(nodes), star(nodes), scattered(nodes), list(range(nodes))]
    integers = torch.int32 if nodes % 2 else torch.int64
    words, depths = tree_words(torch.tensor(parents, dtype=integers))
    assert words.dtype == torch.int64
    assert depths.dtype == torch.int32
    assert words.is_contiguous()
    parent_cases.assert_right((words, depths), parents)


def test_no_rows_have_no_words():
    words, depths = tree_words(torch.empty(0, 70, dtype=torch.int64))
    assert words.shape == (0, 70, 2)
    assert depths.shape == (0, 70)


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), r"parents is torch.int64 of shape \(3,\)"),
        (torch.zeros(1, 3), "parents is torch.float32"),
        (torch.zeros(1, 257, dtype=torch.int64), "parents has 257 nodes, expected 1 to 256"),
        (torch.zeros(1, 0, dtype=torch.int64), "parents has 0 nodes"),
    ],
)
def test_parents_of_another_shape_or_type_are_refused(parents, message):
    with pytest.raises(KernelError, match=message):
        words_op(parents, "reference")


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([[0, 0], [1, 0]], "node 0 of row 1 has parent 1, expected 0 at node 0"),
        ([[0, 2, 1]], "node 1 of row 0 has parent 2, expected .* an earlier node"),
        ([[0, -1]], "node 1 of row 0 has parent -1"),
        ([[0, 1, 1]], "node 2 of row 0 has parent 1, which is its own parent and so padding"),
    ],
)
def test_parents_of_no_tree_are_refused(parents, message):
    with pytest.raises(KernelError, match=message):
        tree_words(torch.tensor(parents))


def test_parents_are_not_read_where_they_are_not_checked(monkeypatch):
    parents = torch.tensor([chain(5)])
    for name in ("tolist", "item", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse_to_read)
    with pytest.raises(RuntimeError, match="read on the host"):
        tree_words(parents)
    tree_words(parents, check_values=False)


def test_a_cpu_computes_words_in_plain_pytorch(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(KernelError, match=r"'triton' cannot be used: .*leave it out"):
        tree_words(torch.tensor([[0]]), backend="triton")


def test_the_op_of_words_is_what_it_is_declared_to_be(monkeypatch):
    # To shape checks a size that is not known yet is no int.
    module = sys.modules["speclm.kernels.tree_ops"]
    monkeypatch.setattr(module, "num_words", inspect.unwrap(num_words))
    opcheck(words_op, (torch.tensor([scattered(70)]), "reference"))


def test_shapes_are_known_where_nothing_is_computed():
    with FakeTensorMode():
        words, depths = words_op(torch.zeros(3, 130, dtype=torch.int32), "auto")
        with pytest.raises(KernelError, match="parents has 257 nodes"):
            words_op(torch.zeros(1, 257, dtype=torch.int32), "auto")
    assert (words.shape, words.dtype) == ((3, 130, 3), torch.int64)
    assert (depths.shape, depths.dtype) == ((3, 130), torch.int32)


def test_a_compiled_call_returns_the_same_words():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(parents):
        return inspect.unwrap(tree_words)(parents)  # shape checks cannot be compiled

    parents = [scattered(70)]
    parent_cases.assert_right(compiled(torch.tensor(parents)), parents)
