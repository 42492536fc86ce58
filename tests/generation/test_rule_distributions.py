"""Acceptance rules that draw, through the real loop: the distribution of their outputs."""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import AcceptanceRule, Accepted, RejectionRule, rejection
from speclm.config import ProposerConfig
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import DraftError
from speclm.generation import loop
from speclm.sampling import DraftSampling, Draws, PositionNoise
from speclm.sampling.draws import Families
from speclm.stats import SpeculationStats
from speclm.target.session import TreeSession
from speclm.tree.topology import from_parents
from tests import enumeration
from tests.enumeration import (
    EXACT,
    LENGTH,
    PROMPT,
    VOCAB,
    WARPERS,
    WRONG,
    Decisions,
    all_runs,
    distance,
    process,
    run_loop,
    target_probs,
)
from tests.grids import grid, turns

pytestmark = pytest.mark.untraced  # what it runs is traced elsewhere, at half the speed

CHAIN = [0, 0, 1]
WIDE = [0, 0, 0]
SKEWED = [0, 0, 0, 2]  # deepest below what was drawn second
TREES = {
    "2x2": [0, 0, 0, 1, 1, 2, 2],
    "deep first": [0, 0, 0, 1],
    "deep second": [0, 0, 0, 2, 2],
    "more children than tokens": [0, 0, 0, 0, 0, 1],
}
TREE_RULES = ("multi_round", "traversal")
QUICK_TREES = (
    ("2x2", "top-k", "traversal"),
    ("deep second", "plain", "multi_round"),
    ("more children than tokens", "temperature", "traversal"),
)


def tables(seed: int, *, likeness: float = 0.5) -> tuple[Tensor, Tensor]:
    """Return the target's and the draft's logits, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    target, other = 1.5 * torch.randn(
        2, VOCAB, VOCAB, VOCAB, dtype=torch.float64, generator=generator
    )
    return target, likeness * target + (1 - likeness) * other


class EnumeratedDraws(Draws):
    """Makes every draw a decision."""

    def __init__(self, decisions: Decisions) -> None:
        self._decisions = decisions

    @override
    def bernoulli(self, probability: float) -> bool:
        assert probability >= 0
        return self._decisions.draw((min(probability, 1.0), 1 - min(probability, 1.0))) == 0

    @override
    def categorical(self, probs: Tensor) -> int:
        return self._decisions.draw(probs.tolist())

    @override
    def without_replacement(self, probs: Tensor, *, num: int) -> Tensor:
        return torch.tensor([self._row(row.tolist(), num) for row in probs])

    def _row(self, distribution: list[float], num: int) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < min(num, sum(probability > 0 for probability in distribution)):
            left = [
                0.0 if token in drawn else probability
                for token, probability in enumerate(distribution)
            ]
            drawn.append(self._decisions.draw([probability / sum(left) for probability in left]))
        return drawn + [0] * (num - len(drawn))  # any others follow


class SettledError(Exception):
    """The first round is over; what follows it starts afresh."""


class DrawnProposer(Proposer):
    """Draws trees of one shape from a table over the last two tokens.

    Levels of which no token could be emitted are left out. After the first round it ends the run,
    unless it is to draft in every round.
    """

    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT

    def __init__(self, parents: list[int], table: Tensor, *, every_round: bool = False) -> None:
        self.config = ProposerConfig(depth=len(parents))
        self._parents, self._table, self._every_round = parents, table, every_round
        self.emitted: list[int] = []
        self._asked = False

    @override
    def begin(self, prompt: Prefill) -> None:
        self.sampler = prompt.sampler

    @override
    def propose(self, roots: Tensor, *, noise: PositionNoise | None) -> Draft:
        assert noise is None
        if self._asked and not self._every_round:
            raise SettledError
        self._asked = True
        text = [*PROMPT[0], *self.emitted]
        topology = from_parents([self._parents], device=roots.device)
        room = LENGTH - len(self.emitted) - 1
        kept = int((topology.depths[0] <= room).sum())  # shapes here are listed level by level
        topology = from_parents([self._parents[:kept]], device=roots.device)
        paths = topology.path_indices[0].tolist()
        tokens, distributions = roots[:, None].repeat(1, kept), torch.zeros(1, kept, VOCAB).double()
        families = Families.of(self._parents[:kept])
        for parent, children in zip(families.parents, families.children, strict=True):
            above = [int(tokens[0, node]) for node in paths[parent][1:] if node >= 0]
            context = [*text, *above][-2:]
            distribution = self.sampler.distribution(
                self._table[context[0], context[1]][None, None]
            )
            distributions[:, parent] = distribution[:, 0]
            tokens[:, children] = self.pick(distribution, len(children))
        return self.shape(Draft(tokens=tokens, topology=topology, distributions=distributions))

    @override
    def commit(self, accepted: Accepted) -> None:
        self.emitted += accepted.emitted[0]

    def pick(self, distribution: Tensor, num: int) -> Tensor:
        return self.sampler.siblings(distribution, num=num)[:, 0]

    def shape(self, draft: Draft) -> Draft:
        return draft


class RankedProposer(DrawnProposer):
    """Drafts the likeliest tokens, as if they had been drawn."""

    def pick(self, distribution: Tensor, num: int) -> Tensor:
        return distribution[:, 0].topk(num).indices


class PrunedProposer(DrawnProposer):
    """Leaves out children that its own distribution thinks little of."""

    def shape(self, draft: Draft) -> Draft:
        assert draft.distributions is not None
        parents = draft.topology.host_parents[0]
        tokens = draft.tokens[0].tolist()
        kept = [
            node if node and float(draft.distributions[0, parent, tokens[node]]) < 0.4 else parent
            for node, parent in enumerate(parents)
        ]
        for node, parent in enumerate(kept):
            if node and kept[parent] == parent != 0:  # below one that was left out
                kept[node] = node
        return Draft(
            draft.tokens,
            from_parents([kept], device=draft.tokens.device),
            None,
            draft.distributions,
        )


def distribution_of(
    monkeypatch: pytest.MonkeyPatch,
    rule: AcceptanceRule,
    make: Callable[[], DrawnProposer],
    *,
    table: Tensor,
    warpers: Sequence[Any] = (),
) -> tuple[dict[tuple[int, ...], float], float]:
    """Return the probability of every output, and the accepted length expected of round one."""

    def run(decisions: Decisions) -> tuple[tuple[int, ...], int]:
        monkeypatch.setattr(loop, "seeded_draws", lambda device: EnumeratedDraws(decisions))
        proposer, stats = make(), SpeculationStats()
        try:
            output = run_loop(proposer, warpers, rule=rule, table=table, stats=stats)
            emitted = output[0, len(PROMPT[0]) :].tolist()
        except SettledError:
            emitted = proposer.emitted
        return tuple(emitted), stats.rows[0].prefill_tokens - 1

    expected = target_probs(warpers, table=table)
    distribution: dict[tuple[int, ...], float] = defaultdict(float)
    accepted = 0.0
    for (emitted, length), weight in all_runs(run):
        accepted += weight * length
        following = {out: w for out, w in expected.items() if out[: len(emitted)] == emitted}
        total = sum(following.values())
        for output, probability in following.items():
            distribution[output] += weight * probability / total
    return distribution, accepted


@pytest.mark.parametrize(
    ("warpers", "variant"), turns(WARPERS, ["multi_round", "block", "traversal"])
)
def test_drawn_chains_leave_the_targets_distribution_over_all_rounds(variant, warpers, monkeypatch):
    target, draft = tables(1)
    distribution, _ = distribution_of(
        monkeypatch,
        RejectionRule(variant),
        lambda: DrawnProposer(CHAIN, draft, every_round=True),
        table=target,
        warpers=WARPERS[warpers],
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs(WARPERS[warpers], table=target)) <= EXACT


@pytest.mark.parametrize("variant", TREE_RULES)
def test_drawn_siblings_leave_the_targets_distribution_over_all_rounds(variant, monkeypatch):
    target, draft = tables(2)
    distribution, _ = distribution_of(
        monkeypatch,
        RejectionRule(variant),
        lambda: DrawnProposer(WIDE, draft, every_round=True),
        table=target,
    )
    assert distance(distribution, target_probs(table=target)) <= EXACT


@pytest.mark.parametrize(
    ("tree", "warpers", "seed", "variant"),
    grid(
        [
            (*cell, variant)
            for cell in (
                ("2x2", "top-k", 1),
                ("2x2", "plain", 1),
                ("deep first", "temperature", 2),
                ("deep second", "plain", 3),
                ("deep second", "top-k", 4),
                ("more children than tokens", "temperature", 6),
                ("more children than tokens", "top-k", 7),
            )
            for variant in TREE_RULES
        ],
        runs=lambda tree, warpers, _, variant: (tree, warpers, variant) in QUICK_TREES,
    ),
)
def test_drawn_trees_leave_the_targets_distribution(variant, tree, warpers, seed, monkeypatch):
    target, draft = tables(seed)
    distribution, _ = distribution_of(
        monkeypatch,
        RejectionRule(variant),
        lambda: DrawnProposer(TREES[tree], draft),
        table=target,
        warpers=WARPERS[warpers],
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs(WARPERS[warpers], table=target)) <= EXACT


@pytest.mark.parametrize("variant", ["multi_round", "block"])
def test_drawn_trees_that_become_chains_leave_the_targets_distribution(variant, monkeypatch):
    monkeypatch.setattr(TreeSession, "needs_lockstep", True)  # as if the target took chains alone
    for module in (enumeration, sys.modules[__name__]):
        monkeypatch.setattr(module, "LENGTH", LENGTH + 1)  # the prompt's forward gives the first
    target, draft = tables(5)
    distribution, _ = distribution_of(
        monkeypatch, RejectionRule(variant), lambda: DrawnProposer(SKEWED, draft), table=target
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs(table=target)) <= EXACT


@pytest.mark.parametrize("variant", ["multi_round", "block", "traversal"])
def test_harness_catches_ranked_chains_that_pass_for_drawn_ones(variant, monkeypatch):
    target, draft = tables(1)
    distribution, _ = distribution_of(
        monkeypatch, RejectionRule(variant), lambda: RankedProposer(CHAIN, draft), table=target
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs(table=target)) > WRONG


@pytest.mark.parametrize(("cheat", "variant"), turns([RankedProposer, PrunedProposer], TREE_RULES))
def test_harness_catches_trees_that_are_not_as_drawn(variant, cheat, monkeypatch):
    target, draft = tables(2)
    distribution, _ = distribution_of(
        monkeypatch, RejectionRule(variant), lambda: cheat(TREES["deep first"], draft), table=target
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs(table=target)) > WRONG


@pytest.mark.parametrize("variant", TREE_RULES)
def test_harness_catches_a_sibling_that_is_not_removed_from_the_distribution(variant, monkeypatch):
    target, draft = tables(7)  # two tokens are left after the first rejection
    monkeypatch.setattr(rejection, "_without", lambda distribution, token: distribution)
    distribution, _ = distribution_of(
        monkeypatch, RejectionRule(variant), lambda: DrawnProposer(WIDE, draft), table=target
    )
    assert distance(distribution, target_probs(table=target)) > WRONG


def expected_length(monkeypatch, variant: str, tree: list[int], seed: int) -> float:
    target, draft = tables(seed)
    return distribution_of(
        monkeypatch, RejectionRule(variant), lambda: DrawnProposer(tree, draft), table=target
    )[1]


def test_one_drawn_token_is_accepted_as_often_as_the_distributions_overlap(monkeypatch):
    target, draft = tables(3)
    distributions = [process([], table[PROMPT[0][0], PROMPT[0][1]]) for table in (target, draft)]
    overlap = float(torch.minimum(*distributions).sum())
    for variant in ("multi_round", "block", "traversal"):
        assert expected_length(monkeypatch, variant, [0, 0], 3) == pytest.approx(overlap)


@pytest.mark.parametrize("seed", grid(range(3), runs=lambda seed: seed == 0))
def test_block_keeps_more_of_a_chain_than_tokens_one_by_one(seed, monkeypatch):
    one_by_one, block, traversal = (
        expected_length(monkeypatch, variant, CHAIN, seed)
        for variant in ("multi_round", "block", "traversal")
    )
    assert block > one_by_one + 1e-3
    assert traversal == pytest.approx(block, abs=EXACT)


@pytest.mark.parametrize("seed", grid(range(2), runs=lambda seed: seed == 0))
def test_traversal_keeps_more_of_a_tree_than_multi_round_and_both_more_than_a_chain(
    seed, monkeypatch
):
    chain = expected_length(monkeypatch, "block", CHAIN, seed)
    multi_round, traversal = (
        expected_length(monkeypatch, variant, TREES["deep first"], seed) for variant in TREE_RULES
    )
    assert chain < multi_round < traversal


def test_draft_without_its_distributions_is_refused():
    class Silent(DrawnProposer):
        def shape(self, draft: Draft) -> Draft:
            return Draft(draft.tokens, draft.topology, None)

    target, draft = tables(0)
    with pytest.raises(DraftError, match=r"distributions of shape None.*expected \(1, 3, 3\)"):
        run_loop(Silent(CHAIN, draft), [], rule=RejectionRule(), table=target)
