"""Trees that block heads draft, node by node, against one pass over the whole text."""

import logging
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from speclm import SpecModel
from speclm.drafting.interface import Draft, Proposer
from speclm.errors import OptionError, TopologyError, UnknownNameError
from speclm.methods.block import tree
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.block.tree import MarkovTerms, product_trees
from speclm.tree.plan import TreePlan
from tests.grids import turns
from tests.methods.block.block_heads import MARKOV, make_heads
from tests.methods.block.target_heads import HEADS, heads_for, logits_along, states_at
from tests.methods.eagle.test_trees import Watching
from tests.models import build_model, generate, prompts
from tests.proposers import HittingProposer

CLOSE = 1e-4  # of log-probabilities of up to 20, summed in another order
STATIC = ((0,), (2,), (0, 1), (2, 0), (2, 3), (2, 0, 0))


def watch(kind: str, check: Callable[..., None], *, sampled: bool = False, **options: Any) -> int:
    """Check all nodes of the drafts of a ragged batch; returns how many there were."""
    model = build_model("llama", num_hidden_layers=3)
    heads = heads_for(model, kind)
    num_checked = 0

    def see(texts: list[list[int]], draft: Draft) -> None:
        nonlocal num_checked
        for row, text in enumerate(texts):
            shape = row if len(draft.topology.host_parents) > 1 else 0
            states = states_at(model, heads, torch.tensor(text))[-1]
            for node, path in enumerate(draft.topology.path_indices[shape].tolist()):
                above = [draft.tokens[row, place].item() for place in path if place > 0]
                if node and path[0] == 0:
                    logits = logits_along(model, heads, states, text[-1], above[:-1])
                    check(heads, logits.log_softmax(-1), draft, row, node)
                    num_checked += 1

    inputs = prompts(7, 3)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    reference = generate(model, inputs, **settings)[0][:, 7:].tolist()
    proposer: Proposer = Watching(BlockProposer(heads, target=model, **options), see)
    if sampled:
        settings |= {"do_sample": True, "top_k": 0, "acceptance": "rejection"}
    else:
        proposer = HittingProposer(proposer, reference)
    generate(SpecModel(model, proposer), inputs, **settings)
    return num_checked


@pytest.mark.parametrize("kind", HEADS)
def test_static_trees_hold_the_guess_of_each_rank(kind):
    def check(heads, log_probs, draft, row, node):
        guess = log_probs.argsort(descending=True)[STATIC[node - 1][-1]]
        assert draft.tokens[row, node] == heads.target_ids(guess)

    assert watch(kind, check, tree=STATIC) > 20


@pytest.mark.parametrize("kind", HEADS)
def test_grown_trees_say_how_likely_the_heads_hold_each_node(kind):
    def check(heads, log_probs, draft, row, node):
        columns = heads.target_ids(torch.arange(len(log_probs))).tolist()
        expected = log_probs[columns.index(draft.tokens[row, node].item())]
        assert math.log(draft.node_probs[row][node]) == pytest.approx(float(expected), abs=CLOSE)

    assert watch(kind, check, min_probability=0.0) > 20


@pytest.mark.parametrize(
    ("kind", "options"),
    turns(HEADS, [{"tree": [2, 1]}, {"width": 2, "branches": 2, "depth": 3}]),
)
def test_drawn_drafts_come_with_the_distribution_that_the_heads_give(kind, options):
    def check(heads, log_probs, draft, row, node):
        parent = draft.topology.host_parents[0][node]
        distribution = draft.distributions[row, parent]
        columns = heads.target_ids(torch.arange(len(log_probs)))
        torch.testing.assert_close(distribution[columns], log_probs.exp(), rtol=1e-3, atol=1e-5)
        assert distribution.sum() == pytest.approx(1.0, abs=1e-5)
        assert distribution[draft.tokens[row, node]] > 0

    assert watch(kind, check, sampled=True, **options) > 20


@pytest.mark.parametrize("kind", ["vanilla", "rnn", "both ways"])
def test_grown_trees_hold_the_likeliest_paths_of_all(kind):
    vocab_size = 6
    model = build_model("llama", num_hidden_layers=3, vocab_size=vocab_size)
    heads = heads_for(model, kind, block_size=4, draft_vocab_size=None)
    drafts: list[tuple[list[int], Draft]] = []
    options = {"num_draft_tokens": 8, "width": 8, "branches": 6, "min_probability": 0.0}
    proposer = Watching(
        BlockProposer(heads, target=model, **options),
        lambda texts, draft: drafts.append((list(texts[0]), draft)),
    )
    inputs = {name: value % vocab_size for name, value in prompts(6).items()}
    generate(SpecModel(model, proposer), inputs, max_new_tokens=6, do_sample=False)
    text, draft = drafts[0]  # later ones may be cut at the end of the text
    states = states_at(model, heads, torch.tensor(text))[-1]
    scored: dict[tuple[int, ...], float] = {(): 0.0}
    for depth in range(heads.config.num_drafts):
        for path in product(range(vocab_size), repeat=depth):
            log_probs = logits_along(model, heads, states, text[-1], list(path)).log_softmax(-1)
            for token, score in enumerate(log_probs.tolist()):
                scored[(*path, token)] = scored[path] + score
    best = sorted(scored, key=lambda path: -scored[path])[:9]
    paths = draft.topology.path_indices[0].tolist()
    tokens = draft.tokens[0].tolist()
    assert {tuple(tokens[place] for place in path if place > 0) for path in paths} == set(best)


def test_products_are_searched_best_first_within_the_levels_of_each_row():
    scores = torch.tensor([[[0.6, 0.32], [0.5, 0.4], [0.9, 0.05]]]).log().expand(2, -1, -1)
    tokens = torch.tensor([[[7, 5], [3, 4], [9, 2]]]).expand(2, -1, -1)
    limits = {"num_nodes": 6, "min_score": -10.0, "min_best": -9.0}
    whole, short = product_trees(scores, tokens, levels=[3, 1], **limits)
    assert whole.tokens == [7, 5, 3, 9, 4, 9]
    assert whole.parents == [0, 0, 1, 3, 1, 5]
    expected = [0.6, 0.32, 0.3, 0.27, 0.24, 0.216]
    assert [math.exp(score) for score in whole.scores] == pytest.approx(expected)
    assert whole.expansions[2:4] == [(1, 0), (2, 0)]
    assert short.tokens == [7, 5]
    limits = {"num_nodes": 6, "min_score": math.log(0.28), "min_best": -9.0}
    (few,) = product_trees(scores[:1], tokens[:1], levels=[3], **limits)
    assert few.tokens == [7, 5, 3]


def test_kept_terms_are_those_of_the_markov_head(monkeypatch):
    markov = make_heads(**MARKOV).markov_head
    monkeypatch.setattr(tree, "_TERM_BYTES", 3 * 20 * 8)  # three rows
    terms, counted = MarkovTerms(markov), []
    embed = markov.embed
    monkeypatch.setattr(markov, "embed", lambda ids: counted.append(ids.numel()) or embed(ids))
    for tokens in ([[4], [7]], [[7], [4]], [[4, 9], [9, 7]], [[5, 4]], [[1, 2, 3, 4]], [[4, 4]]):
        found = terms.of(torch.tensor(tokens))
        torch.testing.assert_close(found, markov.markov_w2(embed(torch.tensor(tokens))))
    assert counted == [2, 1, 2, 4, 1]


@pytest.mark.parametrize("kind", ["vanilla", "both ways"])
def test_plan_goes_before_the_options(kind):
    model = build_model("llama", num_hidden_layers=3)
    sizes: list[tuple[int, int]] = []
    proposer = BlockProposer(heads_for(model, kind), target=model, min_probability=0.0)
    depth = proposer.heads.config.num_drafts
    watched = Watching(
        proposer,
        lambda _, draft: sizes.append((draft.topology.num_nodes - 1, draft.topology.max_depth)),
    )
    spec, inputs = SpecModel(model, watched), prompts(5, 3)
    expected = generate(model, inputs, max_new_tokens=12, do_sample=False)[0]
    long = (*STATIC, *((0,) * length for length in range(3, depth + 3)), (0, 0))
    for plan, largest in (
        (TreePlan(2, 5), (5, 2)),
        (TreePlan.of(STATIC), (6, 3)),
        (TreePlan.of(long), (len(set(long)) - 2, depth)),  # two levels are beyond the block
        (TreePlan(4, 9, min_probability=1.0), (0, 0)),
        (None, (16, depth)),
    ):
        proposer.plan = plan
        sizes.clear()
        assert torch.equal(generate(spec, inputs, max_new_tokens=12, do_sample=False)[0], expected)
        assert max(size for size, _ in sizes) == largest[0]
        assert max(levels for _, levels in sizes) <= largest[1]


def test_rows_stop_where_their_best_path_is_too_unlikely():
    model = build_model("llama", num_hidden_layers=3)
    proposer = BlockProposer(heads_for(model, "vanilla"), target=model, min_probability=0.0)
    proposer.plan = TreePlan(5, 30, min_confidence=0.5)
    stopped: list[int] = []

    def see(_: object, draft: Draft) -> None:
        parents, probs = draft.topology.host_parents, draft.node_probs
        for row, own in enumerate(probs):
            above = parents[row if len(parents) > 1 else 0]
            reached, depths = [1.0], [0]
            for node in range(1, len(own)):
                is_padding = above[node] == node
                reached.append(0.0 if is_padding else reached[above[node]] * own[node])
                depths.append(0 if is_padding else depths[above[node]] + 1)
            levels = range(1, max(depths))
            best = [
                max(r for r, d in zip(reached, depths, strict=True) if d == level)
                for level in levels
            ]
            assert all(probability >= 0.5 for probability in best)
            stopped.append(max(depths))

    inputs = prompts(5, 3)
    generate(SpecModel(model, Watching(proposer, see)), inputs, max_new_tokens=12, do_sample=False)
    assert len(set(stopped)) > 1


def test_trees_are_checked(caplog):
    model = build_model("llama", num_hidden_layers=3)
    heads = heads_for(model, "rnn", draft_vocab_size=4)
    with pytest.raises(OptionError, match="rank 4, the draft vocabulary has 4"):
        BlockProposer(heads, target=model, tree=[5])
    with pytest.raises(UnknownNameError, match="'best' is no preset"):
        BlockProposer(heads, target=model, tree="best")
    with pytest.raises(TopologyError, match="hangs in the air"):
        BlockProposer(heads, target=model, paths=((0,), (1, 0)))
    config = BlockProposer(heads, target=model, tree=[2, 2], num_draft_tokens=3).config
    assert (config.depth, config.paths) == (2, ((0,), (1,), (0, 0)))
    with caplog.at_level(logging.WARNING, logger="speclm"):
        config = BlockProposer(heads, target=model, tree=[1] * 7).config
    assert (config.depth, config.num_draft_tokens) == (5, 5)
    assert "deeper than the 5 tokens of a block; 2 of its 7 nodes" in caplog.text


def test_products_end_with_the_level_whose_best_path_is_too_unlikely():
    scores = torch.tensor([[[0.6, 0.32], [0.5, 0.4], [0.9, 0.05]]]).log()
    tokens = torch.tensor([[[7, 5], [3, 4], [9, 2]]])
    for least, depth in ((0.7, 1), (0.5, 2), (0.2, 3)):
        limits = {"num_nodes": 6, "min_score": -10.0, "min_best": math.log(least)}
        (row,) = product_trees(scores, tokens, levels=[3], **limits)
        assert max(level for level, _ in row.expansions) == depth - 1


def test_min_confidence_ends_rows_of_every_kind_of_heads():
    model = build_model("llama", num_hidden_layers=3)
    for kind in ("vanilla", "both ways"):
        depths: list[int] = []
        proposer = BlockProposer(
            heads_for(model, kind), target=model, min_probability=0.0, min_confidence=1.0
        )
        watched = Watching(proposer, lambda _, draft, d=depths: d.append(draft.topology.max_depth))
        generate(SpecModel(model, watched), prompts(5), max_new_tokens=8, do_sample=False)
        assert max(depths) == 1
