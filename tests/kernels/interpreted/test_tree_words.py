"""The Triton kernel that makes words of parents, in the interpreter, against paths one by one."""

import pytest
import torch
from hypothesis import given

from speclm.kernels import tree_words
from speclm.kernels._triton_tree_ops import tree_words_launch
from tests.kernels.interpreted.launching import search
from tests.kernels.parent_cases import SIZES, assert_right, chain, scattered, star, trees


@search
@given(parents=trees(most_nodes=130))
def test_words_and_depths_are_those_of_walks_to_the_root(parents):
    assert_right(tree_words(torch.tensor(parents), backend="triton"), parents)


@pytest.mark.parametrize("nodes", SIZES)
def test_every_number_of_words(nodes):
    parents = [chain(nodes), star(nodes), scattered(nodes), list(range(nodes))]
    integers = torch.int32 if nodes % 2 else torch.int64
    found = tree_words(torch.tensor(parents, dtype=integers), backend="triton")
    assert_right(found, parents)


def test_parents_may_have_strides_of_their_own():
    parents = [scattered(70, seed) for seed in range(3)]
    turned = torch.tensor(parents).T.contiguous().T
    assert_right(tree_words(turned, backend="triton"), parents)
    assert_right(tree_words(torch.tensor(parents[:1]).expand(2, -1), backend="triton"), parents[:1])


def test_one_program_makes_a_row_and_no_number_is_read():
    parents = torch.empty(5, 70, dtype=torch.int64, device="meta")
    words, depths = parents.new_empty(5, 70, 2), parents.new_empty(5, 70, dtype=torch.int32)
    assert tree_words_launch(parents, words, depths).grid == (5,)


def test_parents_that_nobody_checked_end_too_and_read_nothing_outside():
    parents = torch.tensor([[0, 2, 1, -1, 99, 3]])  # a circle, and two outside
    words, depths = tree_words(parents, check_values=False, backend="triton")
    assert words[0, 3:, 0].tolist() == [0b001000, 0b010000, 0b101000]
    assert depths[0].tolist() == [0, 6, 6, 0, 0, 1]
