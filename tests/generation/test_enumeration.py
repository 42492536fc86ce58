"""The output distribution of the real loop, by exact enumeration on a target of three tokens.

The target is a table over the last two tokens. Nothing is sampled: a run of the loop follows one
list of decisions (which token each row of noise favours, what is drafted), each with its exact
probability, and all lists are run through.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import ProposerConfig
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.generation import loop
from speclm.sampling import PositionNoise, TokenChooser
from speclm.tree.topology import chain, from_parents
from tests.enumeration import (
    EXACT,
    LENGTH,
    PROMPT,
    TABLE,
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
from tests.grids import grid

pytestmark = pytest.mark.untraced  # what it runs is traced elsewhere, at half the speed

FAVOUR = 2.0**-60  # noise of a favoured token; times 2 a step, so that it names its step
DRAFT_PROBS = (0.5, 0.3, 0.2)
TWO_TOKENS = (0.6, 0.4, 0.0)
TREE = [0, 0, 0, 1]
QUICK = (
    ("none", "plain"),
    ("chain", "top-k"),
    ("tree", "plain"),
    ("peeking tree", "temperature"),
)


class TableProposer(Proposer):
    """Drafts a tree whose tokens are drawn from a distribution of its own, or follow the noise.

    Tokens after the last position are not drawn: they must not matter. A chain that is cut ends
    there.
    """

    def __init__(
        self,
        decisions: Decisions,
        parents: list[int],
        *,
        peeks: bool = False,
        is_cut: bool = False,
        probs: Sequence[float] = DRAFT_PROBS,
    ) -> None:
        self.config = ProposerConfig(depth=len(parents))
        self._decisions, self._parents, self._peeks = decisions, parents, peeks
        self._is_cut, self._remaining, self._probs = is_cut, 0, probs

    @override
    def begin(self, prompt: Prefill) -> None:
        assert prompt.tokens.tolist() == [PROMPT[0][:-1]]
        assert prompt.first_tokens.tolist() == PROMPT[0][-1:]
        self._remaining = prompt.max_new_tokens

    @override
    def propose(self, roots: Tensor, *, noise: PositionNoise | None) -> Draft:
        parents = self._parents[: self._remaining] if self._is_cut else self._parents
        topology = from_parents([parents], device=roots.device)
        drafted = [self._draft_token(depth - 1, noise) for depth in topology.depths[0, 1:].tolist()]
        tokens = torch.tensor([[int(roots), *drafted]])
        return Draft(tokens=tokens, topology=topology)

    @override
    def commit(self, accepted: Accepted) -> None:
        self._remaining -= len(accepted.emitted[0])

    def _draft_token(self, depth: int, noise: PositionNoise | None) -> int:
        if depth >= self._remaining - 1:  # the last token is the bonus token
            return 0
        if self._peeks and noise is not None:
            favoured = int(noise.at_depth(depth)[0].argmin())
            return (favoured + self._decisions.draw((0.6, 0.4))) % VOCAB
        return self._decisions.draw(self._probs)


def enumerate_distribution(
    monkeypatch: pytest.MonkeyPatch,
    *,
    proposer: Callable[[Decisions], Proposer | None],
    warpers: Sequence[Any] = (),
    greedy: bool = False,
    accept: Callable[[Decisions], Any] | None = None,
) -> dict[tuple[int, ...], float]:
    """Return the probability of every output of the real loop."""
    choose, used = TokenChooser.choose, []

    def run(decisions: Decisions) -> Tensor:
        def matrix(noise: PositionNoise, step: int) -> Tensor:
            if step not in noise._matrices:
                rows = torch.ones(1, VOCAB)
                if step < LENGTH:  # what lies beyond must not matter
                    rows[0, decisions.take(VOCAB)] = FAVOUR * 2.0**step
                noise._matrices[step] = rows
            return noise._matrices[step]

        def weighing_choose(
            chooser: TokenChooser, logits: Tensor, noise: Tensor | None, **_: object
        ) -> Tensor:
            if noise is not None:
                for scores, row in zip(logits, noise, strict=True):
                    distribution = process(chooser.processors, scores)
                    lowest, token = row.min(0)
                    if float(lowest) < 1:
                        used.append(round(math.log2(float(lowest) / FAVOUR)))
                        decisions.weight *= float(distribution[token])
            return choose(chooser, logits, noise)

        monkeypatch.setattr(PositionNoise, "_matrix", matrix)
        monkeypatch.setattr(TokenChooser, "choose", weighing_choose)
        if accept is not None:
            monkeypatch.setattr(loop.Generation, "_accept", accept(decisions))
        used.clear()
        output = run_loop(proposer(decisions), warpers, greedy=greedy)
        assert len(used) == len(set(used)), "noise of one position decided twice"
        return output

    distribution: dict[tuple[int, ...], float] = defaultdict(float)
    for output, weight in all_runs(run):
        distribution[tuple(output[0, len(PROMPT[0]) :].tolist())] += weight
    return distribution


DRAFTERS: dict[str, Callable[[Decisions], Proposer | None]] = {
    "none": lambda decisions: None,
    "chain": lambda decisions: TableProposer(decisions, [0, 0, 1], probs=TWO_TOKENS),
    "chain of all tokens": lambda decisions: TableProposer(decisions, [0, 0, 1]),
    "deep chain": lambda decisions: TableProposer(decisions, [0, 0, 1, 2]),
    "tree": lambda decisions: TableProposer(decisions, TREE, probs=TWO_TOKENS),
    "tree of all tokens": lambda decisions: TableProposer(decisions, TREE),
    "peeking tree": lambda decisions: TableProposer(decisions, TREE, peeks=True),
}


@pytest.mark.parametrize(
    ("drafter", "warpers"),
    grid(
        [(drafter, "plain") for drafter in DRAFTERS]
        + [("peeking tree", "temperature"), ("chain", "top-k"), ("chain of all tokens", "top-k")],
        runs=lambda drafter, warpers: (drafter, warpers) in QUICK,  # all tokens take minutes
    ),
)
def test_sampled_outputs_have_the_product_distribution_of_the_target(drafter, warpers, monkeypatch):
    distribution = enumerate_distribution(
        monkeypatch, proposer=DRAFTERS[drafter], warpers=WARPERS[warpers]
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs(WARPERS[warpers])) <= EXACT


@pytest.mark.parametrize("drafter", ["none", "chain of all tokens", "deep chain", "tree"])
def test_greedy_output_is_the_most_likely_path_whatever_is_drafted(drafter, monkeypatch):
    distribution = enumerate_distribution(monkeypatch, proposer=DRAFTERS[drafter], greedy=True)
    path = list(PROMPT[0])
    for _ in range(LENGTH):
        path.append(int(TABLE[path[-2], path[-1]].argmax()))
    assert set(distribution) == {tuple(path[len(PROMPT[0]) :])}
    assert abs(sum(distribution.values()) - 1) <= EXACT


def ratio_test(decisions: Decisions) -> Callable[[Any, Draft, Tensor], Accepted]:
    """Return the acceptance rule of speculative sampling for a chain.

    Source: Leviathan et al. 2023, Alg. 1.
    """
    draft_probs = torch.tensor(DRAFT_PROBS, dtype=torch.float64)

    def accept(run: loop.Generation, draft: Draft, logits: Tensor) -> Accepted:
        emitted: list[int] = []
        drafted = draft.tokens[0, 1:].tolist()
        for node in range(len(drafted) + 1):
            distribution = process(run.chooser.processors, logits[0, node])
            if node == len(drafted):
                emitted.append(decisions.draw(distribution.tolist()))
                break
            probability = min(1.0, float(distribution[drafted[node]] / draft_probs[drafted[node]]))
            if decisions.draw((probability, 1 - probability)) == 0:
                emitted.append(drafted[node])
                continue
            rest = (distribution - draft_probs).clamp(min=0)
            emitted.append(decisions.draw((rest / rest.sum().clamp(min=1e-300)).tolist()))
            break
        path = torch.arange(len(emitted))[None]
        return Accepted(path=path, tokens=torch.tensor([emitted]))

    return accept


class LikeliestProposer(TableProposer):
    """Drafts the likeliest token of its distribution, as if it had been drawn."""

    @override
    def propose(self, roots: Tensor, *, noise: PositionNoise | None) -> Draft:
        tokens = torch.tensor([[int(roots), 0, 0]])
        return Draft(tokens=tokens, topology=chain(2))


def test_harness_passes_the_ratio_test_with_a_drawn_draft(monkeypatch):
    distribution = enumerate_distribution(
        monkeypatch,
        proposer=lambda decisions: TableProposer(decisions, [0, 0, 1], is_cut=True),
        accept=ratio_test,
    )
    assert distance(distribution, target_probs()) <= EXACT


def test_harness_catches_the_ratio_test_with_a_deterministic_draft(monkeypatch):
    distribution = enumerate_distribution(
        monkeypatch,
        proposer=lambda decisions: LikeliestProposer(decisions, [0, 0, 1]),
        accept=ratio_test,
    )
    assert abs(sum(distribution.values()) - 1) <= EXACT
    assert distance(distribution, target_probs()) > WRONG


def test_harness_catches_a_draft_that_is_accepted_unseen(monkeypatch):
    def accept_all(decisions: Decisions) -> Any:
        def accept(run: loop.Generation, draft: Draft, logits: Tensor) -> Accepted:
            tokens = torch.cat([draft.tokens[:, 1:], draft.tokens[:, -1:]], dim=1)
            return Accepted(path=torch.arange(tokens.shape[1])[None], tokens=tokens)

        return accept

    distribution = enumerate_distribution(
        monkeypatch, proposer=DRAFTERS["chain"], accept=accept_all
    )
    assert distance(distribution, target_probs()) > WRONG
