"""Trees that EAGLE heads draft, node by node, against one path fed a token at a time."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import OptionError, TopologyError, UnknownNameError
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.sampling import PositionNoise
from speclm.testing import check_proposer
from speclm.tree.plan import TreePlan
from tests.grids import turns
from tests.methods.eagle.eagle_heads import heads_for, logits_along
from tests.models import VOCAB_SIZE, build_model, generate, prompts
from tests.proposers import HittingProposer

LAYERS = (1, 2, 3)
CLOSE = 1e-3  # of log-probabilities of up to 20, summed in another order
FULL = {"min_probability": 0.0, "min_confidence": 0.0}
STATIC = ((0,), (2,), (0, 1), (2, 0), (2, 3), (2, 0, 0))
HEADS: dict[str, dict[str, Any]] = {
    "eagle": {},
    "eagle part": {"draft_vocab_size": 40},
    "eagle3": {"draft_vocab_size": 40},
    "eagle3 window": {"sliding_window": 6},
}


class Watching(Proposer):
    """Calls back with every draft of another proposer and the texts that it continues."""

    def __init__(self, inner: Proposer, see: Callable[[list[list[int]], Draft], None]) -> None:
        self.config, self._inner, self._see = inner.config, inner, see
        self.draft_sampling = inner.draft_sampling

    @property
    @override
    def features(self):
        return self._inner.features

    @override
    def begin(self, prompt: Prefill) -> None:
        self._texts = [
            [*row[padding:], first]
            for row, padding, first in zip(
                prompt.tokens.tolist(),
                prompt.num_padding.tolist(),
                prompt.first_tokens.tolist(),
                strict=True,
            )
        ]
        self._inner.begin(prompt)

    @override
    def propose(self, roots: Tensor, *, noise: PositionNoise | None) -> Draft:
        draft = self._inner.propose(roots, noise=noise)
        self._see(self._texts, draft)
        return draft

    @override
    def commit(self, accepted: Accepted) -> None:
        for text, emitted in zip(self._texts, accepted.emitted, strict=True):
            text.extend(emitted)
        self._inner.commit(accepted)


def watch(kind: str, check: Callable[..., int], *, sampled: bool = False, **options: Any) -> int:
    """Check all nodes of the drafts of a ragged batch; returns how many there were."""
    model = build_model("llama", num_hidden_layers=4)
    heads = heads_for(model, kind.split()[0], layers=LAYERS, **HEADS[kind])
    num_checked = 0

    def see(texts: list[list[int]], draft: Draft) -> None:
        nonlocal num_checked
        for row, text in enumerate(texts):
            shape = row if len(draft.topology.host_parents) > 1 else 0
            paths = draft.topology.path_indices[shape].tolist()
            for node, path in enumerate(paths):
                above = [draft.tokens[row, place].item() for place in path if place > 0]
                if node and path[0] == 0:
                    num_checked += check(model, heads, torch.tensor(text), draft, row, node, above)

    inputs = prompts(7, 3)
    settings: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}
    reference = generate(model, inputs, **settings)[0][:, 7:].tolist()
    proposer: Proposer = Watching(EagleProposer(heads, target=model, **options), see)
    if sampled:
        settings |= {"do_sample": True, "top_k": 0, "acceptance": "rejection"}
    else:
        proposer = HittingProposer(proposer, reference)
    generate(SpecModel(model, proposer), inputs, **settings)
    return num_checked


def log_probs_above(model, heads: EagleHeads, text: Tensor, above: list[int]) -> Tensor:
    return logits_along(model, heads, text, above[:-1]).log_softmax(-1)


@pytest.mark.parametrize("kind", HEADS)
def test_static_trees_hold_the_guess_of_each_rank(kind):
    def check(model, heads, text, draft, row, node, above):
        best = log_probs_above(model, heads, text, above).argsort(descending=True)
        guess = best[STATIC[node - 1][-1]]
        assert draft.tokens[row, node] == heads.target_ids(guess)
        return 1

    assert watch(kind, check, tree=STATIC) > 20


@pytest.mark.parametrize("kind", HEADS)
def test_grown_trees_say_how_likely_the_heads_hold_each_node(kind):
    def check(model, heads, text, draft, row, node, above):
        distribution = log_probs_above(model, heads, text, above)
        columns = heads.target_ids(torch.arange(len(distribution))).tolist()
        expected = distribution[columns.index(above[-1])]
        assert math.log(draft.node_probs[row][node]) == pytest.approx(float(expected), abs=CLOSE)
        return 1

    assert watch(kind, check, width=3, branches=2, depth=4, **FULL) > 20


@pytest.mark.parametrize(
    ("kind", "options"),
    turns(HEADS, [{"tree": [2, 1]}, {"width": 2, "branches": 2, "depth": 3}]),
)
def test_drawn_drafts_come_with_the_distribution_that_the_heads_give(kind, options):
    def check(model, heads, text, draft, row, node, above):
        parent = draft.topology.host_parents[0][node]
        distribution = draft.distributions[row, parent]
        expected = log_probs_above(model, heads, text, above).exp()
        columns = heads.target_ids(torch.arange(len(expected)))
        torch.testing.assert_close(distribution[columns], expected, rtol=1e-3, atol=1e-5)
        assert distribution.sum() == pytest.approx(1.0, abs=1e-5)
        assert distribution[draft.tokens[row, node]] > 0
        return 1

    assert watch(kind, check, sampled=True, **options) > 20


def test_plan_goes_before_the_options():
    model = build_model("llama", num_hidden_layers=4)
    heads = heads_for(model, "eagle3", layers=LAYERS)
    sizes: list[tuple[int, int]] = []
    proposer = EagleProposer(heads, target=model, width=3, **FULL)
    watched = Watching(
        proposer,
        lambda _, draft: sizes.append((draft.topology.num_nodes - 1, draft.topology.max_depth)),
    )
    spec = SpecModel(model, watched)
    inputs = prompts(5, 3)
    expected = generate(model, inputs, max_new_tokens=12, do_sample=False)[0]
    for plan, size in (
        (TreePlan(2, 5), (5, 2)),
        (TreePlan.of(STATIC), (6, 3)),
        (TreePlan(4, 9, min_confidence=1.0), (3, 1)),
        (TreePlan(4, 9, min_probability=1.0), (0, 0)),
        (None, (16, 3)),
    ):
        proposer.plan = plan
        sizes.clear()
        assert torch.equal(generate(spec, inputs, max_new_tokens=12, do_sample=False)[0], expected)
        assert size in sizes


def test_static_trees_keep_the_contract_of_proposers():
    model = build_model("llama", num_hidden_layers=4)
    heads = heads_for(model, "eagle3", layers=LAYERS, draft_vocab_size=40)
    check_proposer(
        lambda: EagleProposer(heads, target=model, tree=STATIC),
        vocab_size=VOCAB_SIZE,
        hidden_size=model.config.hidden_size * len(LAYERS),
        max_length=32,
    )


def test_trees_are_checked():
    model = build_model("llama", num_hidden_layers=4)
    heads = heads_for(model, "eagle3", layers=LAYERS, draft_vocab_size=4)
    with pytest.raises(OptionError, match="rank 4, the draft vocabulary has 4"):
        EagleProposer(heads, target=model, tree=[5])
    with pytest.raises(UnknownNameError, match="'best' is no preset"):
        EagleProposer(heads, target=model, tree="best")
    with pytest.raises(TopologyError, match="hangs in the air"):
        EagleProposer(heads, target=model, paths=((0,), (1, 0)))
    proposer = EagleProposer(heads, target=model, paths=((0, 1), (0,)))
    assert proposer.config.paths == ((0,), (0, 1))
    with pytest.raises(OptionError, match=r"rank 5, the vocabulary has 4"):
        generate(SpecModel(model, proposer), prompts(5), max_new_tokens=3, tree=[[0], [5]])
    config = EagleProposer(heads, target=model, tree=[2, 2], num_draft_tokens=3).config
    assert (config.depth, config.paths) == (2, ((0,), (1,), (0, 0)))
