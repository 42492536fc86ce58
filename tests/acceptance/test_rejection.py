"""Rejection, where it is certain; its distribution is enumerated in
`tests/generation/test_rules.py`."""

import math

import jaxtyping
import pytest
import torch

from speclm.acceptance import RejectionRule, Verified
from speclm.errors import DraftError, OptionError
from speclm.sampling import GeneratorDraws, TokenChooser
from speclm.tree import chain, from_parents

CPU = torch.device("cpu")
VARIANTS = ("multi_round", "block", "traversal")


def accept(variant, tokens, target, draft, topology, *, is_live=None, seed=0):
    tokens, draft = torch.tensor(tokens), torch.tensor(draft)
    draws = GeneratorDraws(torch.Generator().manual_seed(seed))
    return RejectionRule(variant).accept(
        Verified(
            draft_tokens=tokens,
            topology=topology,
            logits=torch.tensor(target).log(),
            chooser=TokenChooser([], is_greedy=False),
            is_live=is_live or [True] * len(tokens),
            draws=draws,
            draft_distributions=draft,
        )
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_draft_from_the_targets_own_distribution_is_kept(variant, seed):
    distributions = [[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]]
    accepted = accept(variant, [[0, 1, 2]], distributions, distributions, chain(2), seed=seed)
    assert accepted.emitted == [[1, 2, 2]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_that_the_target_excludes_is_never_kept(variant):
    target = [[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]]
    draft = [[[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]]
    assert accept(variant, [[2, 0]], target, draft, chain(1)).emitted == [[1]]


@pytest.mark.parametrize("variant", ["multi_round", "traversal"])
def test_padding_and_tokens_that_no_distribution_had_left_are_skipped(variant):
    topology = from_parents([[0, 0, 2, 0]], device=CPU)  # node 2 is padding, node 3 repeats
    target = [[[0.0, 1.0, 0.0]] * 4]
    draft = [[[1.0, 0.0, 0.0]] * 4]
    assert accept(variant, [[2, 0, 1, 1]], target, draft, topology).paths == [[0]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_not_live_draw_nothing(variant):
    distributions = [[[0.2, 0.8], [0.5, 0.5]]] * 2
    both = accept(
        variant, [[0, 1]] * 2, distributions, distributions, chain(1), is_live=[False, True]
    )
    alone = accept(variant, [[0, 1]], distributions[:1], distributions[:1], chain(1))
    assert both.emitted[1] == alone.emitted[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("node", range(3))
def test_nan_on_the_way_is_reported(variant, node):
    distributions = [[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]]
    target = [[list(distribution) for distribution in distributions[0]]]
    target[0][node] = [math.nan] * 2
    assert accept(variant, [[0, 1, 1]], target, distributions, chain(2)).emitted[0][-1] == -1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("node", range(2))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_draft_distribution_that_is_not_finite_is_refused_by_every_variant(variant, node, value):
    target = [[[0.2, 0.3, 0.5]] * 3] * 2
    draft = [[[0.2, 0.3, 0.5] for _ in range(3)] for _ in range(2)]
    draft[1][node][2] = value  # of a token that is not drafted, behind one that is never kept
    words = rf"distribution that.*not finite after node {node} of row 1.*bfloat16.*'exact'"
    with pytest.raises(DraftError, match=words) as caught:
        accept(variant, [[0, 1, 1]] * 2, target, draft, chain(2))
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("variant", VARIANTS)
def test_distributions_of_leaves_and_of_rows_that_are_not_live_may_hold_anything(variant):
    distributions = [[[0.5, 0.5], [0.5, 0.5]] for _ in range(2)]
    draft = [[[0.5, 0.5], [math.nan] * 2], [[math.nan] * 2] * 2]
    is_live = [True, False]
    accepted = accept(variant, [[0, 1]] * 2, distributions, draft, chain(1), is_live=is_live)
    assert accepted.paths[0] == [0, 1]


@pytest.mark.parametrize("seed", range(3))
def test_block_ends_a_chain_before_a_token_that_no_distribution_had_left(seed):
    target = [[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]]
    draft = [[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]]
    accepted = accept("block", [[0, 1, 2]], target, draft, chain(2), seed=seed)
    assert accepted.emitted == [[1, 2]]


def test_block_takes_chains_alone():
    topology = from_parents([[0, 0, 0]], device=CPU)
    distributions = [[[0.5, 0.5]] * 3]
    with pytest.raises(OptionError, match=r"2 children.*expected a chain.*traversal"):
        accept("block", [[0, 0, 1]], distributions, distributions, topology)


def test_unknown_variant_is_refused():
    with pytest.raises(OptionError, match=r"variant is 'naive', expected one of \['block'"):
        RejectionRule("naive")


@pytest.mark.parametrize("variant", [["block"], None, 3])
def test_variant_that_is_no_name_is_refused(variant, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match=r"variant is .*, expected one of \['block'"):
        RejectionRule(variant)
