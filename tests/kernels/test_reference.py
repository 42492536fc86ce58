from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.kernels import reference
from speclm.kernels.reference import (
    keep_path_reference,
    tree_attention_reference,
    tree_words_reference,
)
from tests.kernels.tree_cases import (
    KINDS,
    TreeCase,
    assert_right,
    attend_densely,
    draw_contents,
    grow,
    largest_error,
    lay_out,
    tree_cases,
    words_and_depths,
)

FLOAT64_ERROR = 1e-12  # of sums in another order


def run(case, contents=None):
    return tree_attention_reference(lay_out(case, contents))


@given(tree_cases(deterministic=False))
def test_reference_agrees_with_a_dense_softmax_over_walks_up_the_tree(case):
    assert_right(case, run(case))


@given(tree_cases(sizes=(1, 4, 7, 17), deterministic=True))
def test_deterministic_reference_agrees_with_a_dense_softmax(case):
    assert_right(case, run(case))


@given(tree_cases(sizes=(1, 4, 17), dtypes=(torch.float64,)), st.booleans())
def test_reference_computes_float64_in_float64(case, deterministic):
    case = replace(case, deterministic=deterministic)
    output, lse = run(case)
    assert output.dtype == lse.dtype == torch.float64
    right = attend_densely(case, draw_contents(case), compute=torch.float64)
    assert max(largest_error((output, lse), right)) < FLOAT64_ERROR


@pytest.mark.parametrize("block", [1, 7, 16])
def test_blocks_of_keys_change_only_the_rounding(block, monkeypatch):
    monkeypatch.setattr(reference, "_BLOCK", block)
    case = TreeCase((grow("near_chain", 9),), (40, 0), starts=(3, 0), window=11, sinks=1.0)
    assert_right(case, run(case))


@given(tree_cases(sizes=(4, 17), deterministic=True), st.sampled_from([1, 3]))
def test_deterministic_reference_gives_the_first_nodes_their_bits(case, how_many):
    case = replace(case, nodes=None)
    contents = draw_contents(case)
    output, lse = run(case, contents)
    part = replace(case, parents=tuple(tree[:how_many] for tree in case.parents))
    found, found_lse = run(part, contents.tree_slots(slice(0, how_many)))
    assert torch.equal(found, output[:, :how_many])
    assert torch.equal(found_lse, lse[:, :, :how_many])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 63, 64, 65, 130])
def test_words_and_depths_are_those_of_walks(kind, slots):
    parents = tuple(grow(kind, slots, seed) for seed in range(2))
    words, depths = words_and_depths(TreeCase(parents, (0, 0)))
    found_words, found_depths = tree_words_reference(torch.tensor(parents))
    assert found_depths.dtype == torch.int32
    assert torch.equal(found_words, words)
    assert torch.equal(found_depths, depths)


@pytest.mark.parametrize("gaps", [None, (0, 3)])
def test_path_moves_to_the_end_of_the_prefix_and_nothing_else_moves(gaps):
    case = TreeCase((grow("chain", 6),), (9, 4), gaps=gaps, kv_heads=2)
    inputs = lay_out(case)
    storage = torch.stack([inputs.key.contiguous(), inputs.value.contiguous()]).nan_to_num()
    expected = storage.clone()
    paths = torch.tensor([[0, 2, 3, 5], [0, 4, -1, -1]])
    for row, path in enumerate(paths.tolist()):
        for offset, slot in enumerate(path):
            if slot >= 0:
                source = storage[:, row, :, case.begins[row] + slot]
                expected[:, row, :, case.lengths[row] + offset] = source
    keep_path_reference(
        storage,
        paths,
        prefix_lengths=inputs.prefix_lengths,
        tree_starts=inputs.tree_starts,
    )
    assert torch.equal(storage, expected)
