"""Tree attention in the interpreter against a dense softmax over paths up the tree."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speclm.kernels._triton_attention import tree_attention_triton
from tests.grids import turns
from tests.kernels.interpreted.launching import (
    attend,
    attend_as_planned,
    plan,
    plans,
    quick_search,
    search,
)
from tests.kernels.tree_cases import (
    EPSILON,
    GROUPS,
    HEAD_DIMS,
    Contents,
    TreeCase,
    assert_right,
    draw_contents,
    grow,
    lay_out,
    tree_cases,
    walk_up,
)

CHAIN_ERROR = 1e-5  # of float32 sums over other tiles
BLOCK = 16


def assert_attends_right(case, how):
    assert_right(case, attend(case, how))


@search
@given(st.data(), st.sampled_from([16, 32, 64]))
def test_every_feature_agrees_with_a_dense_softmax_over_walks_up_the_tree(data, block):
    case = data.draw(tree_cases(block=block))
    assert_attends_right(case, data.draw(plans(block_keys=block)))


@search
@given(tree_cases(most_rows=32))
def test_plan_of_the_launcher_agrees_with_a_dense_softmax(case):
    assert_right(case, attend_as_planned(case))


@search
@given(tree_cases(deterministic=True, most_rows=32))
def test_deterministic_plan_agrees_with_a_dense_softmax(case):
    assert_right(case, attend_as_planned(case))


@pytest.mark.parametrize(("head_dim", "dtype"), turns(HEAD_DIMS, EPSILON))
def test_every_width_of_heads_in_every_type(head_dim, dtype):
    case = TreeCase((grow("top_k", 7),), (BLOCK + 1,), head_dim=head_dim, dtype=dtype, sinks=1.0)
    assert_attends_right(case, plan(2))


@pytest.mark.parametrize("groups", GROUPS)
def test_any_number_of_query_heads_shares_a_key_head(groups):
    case = TreeCase((grow("uniform", 5),), (BLOCK,), groups=groups, kv_heads=2, sinks=1.0)
    assert_attends_right(case, plan())


@pytest.mark.parametrize(("window", "length"), turns([16, 17, 24, 33, 48], [64, 80, 100, 128]))
def test_window_begins_anywhere_in_a_tile(length, window):
    case = TreeCase((grow("near_chain", 17),), (length,), window=window)
    assert_attends_right(case, plan(block_rows=32))


@pytest.mark.parametrize(("window", "start"), turns([None, 1, 16, 40], [0, 1, 16, 33]))
def test_padding_on_the_left_and_a_window_at_once(start, window):
    case = TreeCase((grow("near_chain", 9),), (33,), starts=(start,), window=window)
    assert_attends_right(case, plan(2))


@pytest.mark.parametrize("kind", ["chain", "padded"])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_window_smaller_than_the_tree_is_deep_hides_ancestors(kind, window):
    case = TreeCase((grow(kind, 20),), (5,), window=window, groups=2)
    assert_attends_right(case, plan(2))


def test_window_counts_depth_and_not_places_in_the_tree():
    # All children are one position behind the root, however many there are.
    case = TreeCase((grow("star", 20),), (24,), window=8, groups=2)
    assert_attends_right(case, plan())


@pytest.mark.parametrize(
    ("slots", "kind"), turns([63, 64, 65, 128, 130], ["chain", "star", "top_k"])
)
def test_last_bit_of_a_word_and_further_words(kind, slots):
    case = TreeCase((grow(kind, slots),), (3,), nodes=min(slots, 70))
    assert_attends_right(case, plan(block_rows=64, block_keys=64))


def test_sign_bit_names_an_ancestor_like_any_other():
    parents = (*grow("uniform", 64), *[63] * 6, 64, 69, 70)  # a second level below slot 63
    assert_attends_right(TreeCase((parents,), (17,), nodes=9), plan(2))


def test_as_many_slots_as_there_may_be():
    case = TreeCase((grow("top_k", 256),), (100,), window=90)
    assert_attends_right(case, plan(2, block_rows=64, block_keys=64))


@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_no_prefix_at_all_in_some_rows(num_splits):
    case = TreeCase((grow("uniform", 7),), (0, 17, 0), sinks=1.0, groups=2)
    assert_attends_right(case, plan(num_splits))


@pytest.mark.parametrize("num_splits", [3, 16, 17])
def test_more_splits_than_tiles(num_splits):
    case = TreeCase((grow("uniform", 7),), (1, 40), window=9)
    assert_attends_right(case, plan(num_splits, min_tiles=2))


def test_padding_that_is_all_of_the_prefix():
    case = TreeCase((grow("uniform", 7),), (17, 40), starts=(17, 40), gaps=(0, 2))
    assert_attends_right(case, plan(3))


@pytest.mark.parametrize(
    ("sinks", "dtype", "num_splits"),
    turns([1e-3, 30.0, 1e4], [torch.float32, torch.bfloat16], [1, 3]),
)
def test_sinks_small_and_huge(sinks, num_splits, dtype):
    case = TreeCase((grow("uniform", 7),), (0, 33), groups=3, kv_heads=2, sinks=sinks, dtype=dtype)
    assert_attends_right(case, plan(num_splits))


def test_sinks_that_leave_nothing_to_any_key():
    case = TreeCase((grow("uniform", 7),), (20,), sinks=1.0)
    contents = replace(draw_contents(case), sinks=torch.tensor([1e4]))
    for num_splits in (1, 2):
        output, lse = attend(case, plan(num_splits), contents)
        assert (output == 0).all()
        torch.testing.assert_close(lse, torch.full_like(lse, 1e4), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # NumPy: an infinity is meant
def test_scores_of_ten_thousand(num_splits, softcap):
    case = TreeCase((grow("uniform", 9),), (40,), logits=1e4, softcap=softcap, head_dim=64)
    assert_attends_right(case, plan(num_splits))


def test_keys_that_drown_all_others_come_last_and_come_first():
    case = TreeCase((grow("chain", 3),), (40,))
    for slot in (0, 39):
        contents = draw_contents(case)
        contents.prefix_key[:, :, slot] = 100 * contents.query[:, :, 0]
        assert_right(case, attend(case, plan(2), contents), contents)


@pytest.mark.parametrize(
    ("softcap", "logits"), turns([0.1, 1.0, 50.0, 1000.0], [0.01, 1.0, 1000.0])
)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_softcap_far_above_and_far_below_the_scores(softcap, logits):
    case = TreeCase((grow("uniform", 9),), (20,), softcap=softcap, logits=logits, groups=2)
    assert_attends_right(case, plan())


@pytest.mark.parametrize("scale", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scale_is_the_factor_of_the_scores(scale, softcap):
    case = TreeCase((grow("uniform", 9),), (20,), softcap=softcap, groups=2)
    factor = case.head_dim**0.5 * scale
    contents = draw_contents(case)
    inputs = replace(lay_out(case, contents), scale=scale)
    scaled = replace(contents, query=contents.query * factor)
    assert_right(case, tree_attention_triton(inputs, plan()), scaled)


@quick_search
@given(
    st.data(),
    tree_cases(sizes=(4, 7, 17), dtypes=(torch.float32,), groups=1, starts=None, gaps=None),
)
def test_tree_is_the_set_of_its_chains(data, case):
    how = data.draw(plans(block_keys=BLOCK))
    contents = draw_contents(case)
    output, lse = attend(case, how, contents)
    for row in range(case.batch):
        parents = case.parents[row % len(case.parents)]
        chains = [walk_up(parents, slot)[::-1] for slot in range(case.slots)][-case.attending :]
        last_tokens = replace(
            case,
            parents=((0,),),
            nodes=None,
            lengths=tuple(case.lengths[row] + len(chain) - 1 for chain in chains),
        )
        alone, alone_lse = attend(last_tokens, how, as_chains(case, contents, row, chains))
        torch.testing.assert_close(output[row], alone[:, 0], rtol=0, atol=CHAIN_ERROR)
        torch.testing.assert_close(lse[row].T, alone_lse[:, :, 0], rtol=1e-5, atol=CHAIN_ERROR)


def as_chains(case, contents, row, chains):
    """Contents of a batch of chains, in which only the last token attends."""
    length = case.lengths[row]
    longest = length + max(map(len, chains))
    prefixes = torch.full((2, len(chains), case.kv_heads, longest, case.head_dim), torch.nan)
    prefixes[:, :, :, :length] = torch.stack(
        [contents.prefix_key[row, :, :length], contents.prefix_value[row, :, :length]]
    )[:, None]
    tree = torch.stack([contents.tree_key[row], contents.tree_value[row]])
    for at, chain in enumerate(chains):
        prefixes[:, at, :, length : length + len(chain)] = tree[:, :, chain]
    last = [chain[-1] for chain in chains]
    query = contents.query[row][:, last].transpose(0, 1)[:, :, None]
    own = tree[:, :, last].transpose(1, 2)[:, :, :, None]
    return Contents(query, *own, *prefixes, contents.sinks)
