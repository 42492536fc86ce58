"""Words and depths from parents in plain PyTorch, and what is refused before it computes."""

import inspect
import sys

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from speclm.errors import KernelError
from speclm.kernels import tree_words
from speclm.kernels.backends import VARIABLE
from speclm.kernels.tree_words import tree_words_backend
from speclm.tree.topology import from_parents, num_words
from tests.kernels.parent_cases import SIZES, assert_right, chain, scattered, star, trees

CPU = torch.device("cpu")
op = torch.ops.speclm.tree_words.default


def refuse_to_read(*_: object) -> None:
    raise RuntimeError("read on the host")


@given(parents=trees(most_nodes=256))
def test_words_and_depths_are_those_of_walks_to_the_root(parents):
    assert_right(tree_words(torch.tensor(parents)), parents)


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
    assert_right((words, depths), parents)


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
def test_tensors_that_do_not_fit_are_refused(parents, message):
    with pytest.raises(KernelError, match=message):
        op(parents, "reference")


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


def test_values_are_not_read_where_they_are_not_checked(monkeypatch):
    parents = torch.tensor([chain(5)])
    for name in ("tolist", "item", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse_to_read)
    with pytest.raises(RuntimeError, match="read on the host"):
        tree_words(parents)
    tree_words(parents, check_values=False)


def test_a_cpu_computes_words_in_plain_pytorch(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert tree_words_backend(CPU).backend == "reference"
    with pytest.raises(KernelError, match=r"'triton' cannot be used: .*leave it out"):
        tree_words(torch.tensor([[0]]), backend="triton")


def test_the_op_is_what_it_is_declared_to_be(monkeypatch):
    # To shape checks a size that is not known yet is no int.
    module = sys.modules["speclm.kernels.tree_words"]  # next to the function of that name
    monkeypatch.setattr(module, "num_words", inspect.unwrap(num_words))
    opcheck(op, (torch.tensor([scattered(70)]), "reference"))


def test_shapes_are_known_where_nothing_is_computed():
    with FakeTensorMode():
        words, depths = op(torch.zeros(3, 130, dtype=torch.int32), "auto")
        with pytest.raises(KernelError, match="parents has 257 nodes"):
            op(torch.zeros(1, 257, dtype=torch.int32), "auto")
    assert (words.shape, words.dtype) == ((3, 130, 3), torch.int64)
    assert (depths.shape, depths.dtype) == ((3, 130), torch.int32)


def test_a_compiled_call_returns_the_same():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(parents):
        return inspect.unwrap(tree_words)(parents)  # shape checks cannot be compiled

    parents = [scattered(70)]
    assert_right(compiled(torch.tensor(parents)), parents)
