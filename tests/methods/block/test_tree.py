"""Trees that block heads draft, node by node, against one pass over the whole text."""

import logging
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from speclm import SpecModel
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.drafting.ranking import LevelRanking
from speclm.errors import OptionError, TopologyError, UnknownNameError
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.block.tree import (
    BlockLogits,
    BlockProposerConfig,
    choose_nodes,
    enclosing_tree_of,
    grow_trees,
)
from speclm.sampling.noise import PositionNoise
from speclm.tree.dynamic import GrownRow
from speclm.tree.enclosing import ChosenNodes, EnclosingTree
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


@pytest.mark.parametrize(
    ("markov", "sampled"),
    [("vanilla", False), ("gated", False), ("rnn", True), ("vanilla", True), (None, True)],
)
def test_the_nodes_that_a_device_chooses_are_those_of_a_search_on_the_host(markov, sampled):
    settings = MARKOV if markov else {"has_confidence": True}
    heads = make_heads(**{**settings, "markov": markov}, draft_vocab_size=7, has_own_lm_head=True)
    heads.set_draft_columns_(torch.tensor([1, 3, 4, 9, 12, 13, 19]))
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, 3, 8, generator=generator, dtype=torch.float64)
    base = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    roots, rankings, found = torch.tensor([2, 0]), [], []
    # Wide enough that both have all paths.
    config = BlockProposerConfig(
        depth=3, width=9, branches=3, num_draft_tokens=7, min_probability=0.0
    )
    tree = enclosing_tree_of(config, heads, depth=3, device=roots.device)
    for is_chosen in (False, True):
        ranking = LevelRanking(vocab_size=20)
        prompt = Prefill(
            roots[:, None], torch.zeros_like(roots), roots, temperature=0.8, max_new_tokens=9
        )
        ranking.begin(prompt)
        noise = None
        if sampled:
            noise = PositionNoise(batch=2, vocab_size=20, device=roots.device)
            torch.manual_seed(0)
            noise.seek([0, 0], live=[True, True])
        logits, options = BlockLogits(heads, hidden, base), {"ranking": ranking, "noise": noise}
        if is_chosen:
            chosen = choose_nodes(logits, roots, tree, config=config, **options)
            found.append(_chosen_paths(chosen, tree))
        else:
            found.append(
                [_grown_paths(row) for row in grow_trees(logits, roots, config=config, **options)]
            )
        rankings.append(ranking)
    for row, (grown, chosen) in enumerate(zip(*found, strict=True)):
        assert grown.keys() == chosen.keys()
        assert len(grown) == 7
        # What the ranking learns from is where the nodes were expanded.
        for path in grown.keys() if sampled else ():
            places = grown[path], chosen[path]
            if None not in places:
                seen = [
                    own._levels[level + 1].log_probs[row, 0 if markov is None else index]
                    for own, (level, index) in zip(rankings, places, strict=True)
                    if level + 1 < 3
                ]
                if seen:
                    torch.testing.assert_close(*seen)


def _grown_paths(row: GrownRow) -> dict[tuple[int, ...], Any]:
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(row.tokens, row.parents, strict=True):
        paths.append((*paths[parent], token))
    return dict(zip(paths[1:], row.expansions, strict=True))


def _chosen_paths(chosen: ChosenNodes, tree: EnclosingTree) -> list[dict[tuple[int, ...], Any]]:
    rows = zip(
        chosen.tokens.tolist(),
        chosen.topology().host_parents,
        chosen.nodes.tolist(),
        strict=True,
    )
    return [
        _grown_paths(
            GrownRow(tokens[1:], parents[1:], [tree.expansions[n - 1] for n in nodes[1:]], [])
        )
        for tokens, parents, nodes in rows
    ]
