"""Static trees from how often guesses of each rank were accepted at each depth."""

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.accepted import Accepted
from speclm.config import MAX_NODES, require_count
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import OptionError
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures, TargetView, exclusive
from speclm.tree.plan import TreePlan
from speclm.tree.static import Choices

# The tree to observe with: how deep, how many guesses below the root, and how far off the best
# guesses a path may stray, its ranks added up.
_DEEPEST = 8
_RANKS_BELOW_ROOT = 8
_NEAR_ROOT = 3
_SUM_NEAR_ROOT = 3
_SUM_OF_RANKS = 2

RankAcceptance = Sequence[Sequence[float]]
"""For each depth, the probability that the child of rank 0, 1, ... is accepted where its parent
was."""


def calibrated_choices(acceptance: RankAcceptance, *, num_nodes: int) -> Choices:
    """Return the tree of the paths with the largest products of acceptance.

    Source: Cai et al. 2024 (Medusa), section 2.3.3, trees from the accuracies of heads by rank.

    Args:
        acceptance: By depth and rank.
        num_nodes: Most nodes, the root left out; fewer where nothing more was ever accepted.

    Raises:
        OptionError: If `num_nodes` does not fit into a round, or nothing was accepted.
    """
    require_count("num_nodes", num_nodes, low=1, high=MAX_NODES - 1)
    chosen: list[tuple[int, ...]] = []
    # Entries: minus the probability of the path, its length, the path.
    candidates: list[tuple[float, int, tuple[int, ...]]] = [(-1.0, 0, ())]
    while candidates and len(chosen) <= num_nodes:
        minus_probability, depth, path = heappop(candidates)
        chosen.append(path)
        for rank, share in enumerate(acceptance[depth] if depth < len(acceptance) else ()):
            if share > 0:
                heappush(candidates, (minus_probability * share, depth + 1, (*path, rank)))
    choices = chosen[1:]
    if not choices:
        raise OptionError(
            "no guess was ever accepted, so no tree pays; use prompts of the kind that the heads "
            "were trained for"
        )
    return tuple(sorted(choices, key=lambda path: (len(path), path)))


def expected_tau(acceptance: RankAcceptance, choices: Choices) -> float:
    """Return the tokens a round that the tree gives if ranks are accepted independently."""
    tau = 1.0
    for path in choices:
        probability = 1.0
        for depth, rank in enumerate(path):
            shares = acceptance[depth] if depth < len(acceptance) else ()
            probability *= shares[rank] if rank < len(shares) else 0.0
        tau += probability
    return tau


def observing_choices(*, max_depth: int) -> Choices:
    """Return a tree that shows which ranks are accepted: wide, and deep below the best ranks.

    Args:
        max_depth: Most levels; beyond eight none are added.
    """
    paths: list[tuple[int, ...]] = [(rank,) for rank in range(_RANKS_BELOW_ROOT)]
    level = paths
    for depth in range(2, min(max_depth, _DEEPEST) + 1):
        bound = _SUM_NEAR_ROOT if depth <= _NEAR_ROOT else _SUM_OF_RANKS
        level = [
            (*path, rank)
            for path in level
            for rank in range(bound + 1)
            if sum(path) + rank <= bound
        ]
        paths = [*paths, *level]
    return tuple(paths)


class RankRecorder(Proposer):
    """Has a proposer fill one wide static tree in every round, and counts what is accepted.

    Works with any proposer that fills static trees.
    """

    def __init__(self, inner: Proposer) -> None:
        """Wrap a proposer.

        Args:
            inner: Drafts.

        Raises:
            OptionError: If it does not rank its guesses.
        """
        if not inner.takes_choices:
            raise OptionError(
                f"{type(inner).__name__} does not rank its guesses, expected a proposer that fills "
                'static trees, such as Medusa heads or a draft model; use tree="auto"'
            )
        self.config, self.parts = inner.config, (inner,)
        self._inner = inner
        self._choices: Choices = observing_choices(max_depth=inner.config.depth)
        self._offered: Counter[tuple[int, int]] = Counter()  # by depth and rank
        self._accepted: Counter[tuple[int, int]] = Counter()
        self._children: dict[tuple[int, ...], list[int]] = {}
        for path in self._choices:
            self._children.setdefault(path[:-1], []).append(path[-1])
        self._nodes: tuple[tuple[int, ...], ...] = ((), *self._choices)
        self._has_drafted = False

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # the inner one decides
        return self._inner.features

    @property
    @override
    def needs_lockstep(self) -> bool:  # type: ignore[override]  # the inner one decides
        return self._inner.needs_lockstep

    @override
    def begin(self, prompt: Prefill) -> None:
        self._inner.begin(prompt)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        self._inner.plan = TreePlan.of(self._choices)
        draft = self._inner.propose(roots, noise=noise)
        self._nodes = _paths_of(draft)
        self._has_drafted = draft.topology.max_depth > 0
        return draft

    @override
    def commit(self, accepted: Accepted) -> None:
        if self._has_drafted:
            for path in accepted.paths:
                if path:
                    self._count(self._nodes[path[-1]])
        self._has_drafted = False
        self._inner.commit(accepted)

    @property
    def acceptance(self) -> RankAcceptance:
        """Share of the guesses of each rank that were accepted, by depth."""
        deepest = max((depth for depth, _ in self._accepted), default=-1)
        found = []
        for depth in range(deepest + 1):
            widest = max(rank for level, rank in self._accepted if level == depth)
            found.append(
                [
                    self._accepted[depth, rank] / max(self._offered[depth, rank], 1)
                    for rank in range(widest + 1)
                ]
            )
        return found

    def _count(self, taken: tuple[int, ...]) -> None:
        for depth in range(len(taken) + 1):
            for rank in self._children.get(taken[:depth], ()):
                self._offered[depth, rank] += 1
            if depth < len(taken):
                self._accepted[depth, taken[depth]] += 1


def _paths_of(draft: Draft) -> tuple[tuple[int, ...], ...]:
    """Return each node's path of ranks; a proposer may have left out what is too deep for it."""
    parents = draft.topology.host_parents[0]
    paths: list[tuple[int, ...]] = [()]
    num_children = [0] * len(parents)
    for node in range(1, len(parents)):
        parent = parents[node]
        paths.append((*paths[parent], num_children[parent]))
        num_children[parent] += 1
    return tuple(paths)


Ranks = Sequence[Sequence[int]]
"""For each root of one text the rank that head 0, 1, ... gave to the token 1, 2, ... after it; -1
where the text ends before."""

_REPLAYS = 3  # rounds start where the tree before ended them, which settles quickly


@torch.no_grad()
def measure_ranks(
    view: TargetView, heads: Any, prompt: Sequence[int], answer: Sequence[int]
) -> Ranks:
    """Return the rank that each head gave to what came, at every root of an answer.

    Args:
        view: The target that wrote the answer.
        heads: Its heads.
        prompt: Token ids that the answer was written for.
        answer: Token ids of the answer.

    Raises:
        OptionError: If the prompt is empty or the answer has fewer than two tokens.
    """
    if not prompt or len(answer) < 2:
        raise OptionError(
            f"prompt has {len(prompt)} tokens and the answer {len(answer)}, expected at least 1 "
            "and 2; leave such texts out"
        )
    tokens = torch.tensor([[*prompt, *answer]], device=view.device, dtype=torch.long)
    no_padding = torch.zeros(1, dtype=torch.long, device=view.device)
    with exclusive([(view.model, view.name)]), view.decoding(TargetFeatures.LAST_HIDDEN):
        view.prefill(tokens, view.new_cache(no_padding))
        assert view.features is not None
        hidden = view.features[0, len(prompt) - 1 : -2]  # what chose the answer's tokens but one
        logits = heads(hidden, lm_head=view.head_logits)  # [roots, heads, vocab]
    following = F.pad(tokens[0, len(prompt) + 1 :], (0, heads.num_heads - 1), value=-1)
    wanted = following.unfold(0, heads.num_heads, 1)  # [roots, heads]
    right = logits.gather(2, wanted.clamp(min=0)[:, :, None])
    ranks: Ranks = (logits > right).sum(2).masked_fill(wanted < 0, -1).tolist()
    return ranks


def replay_rounds(ranks: Ranks, choices: Choices) -> list[int]:
    """Return the accepted length of each round over one text.

    Args:
        ranks: Ranks at each root, from the text's first token on.
        choices: The tree that is drafted every round.
    """
    nodes = set(choices)
    accepted_lengths = []
    position = 0
    while position < len(ranks):
        path = tuple(rank for rank in ranks[position] if rank >= 0)
        length = 0
        while length < len(path) and path[: length + 1] in nodes:
            length += 1
        accepted_lengths.append(length)
        position += length + 1
    return accepted_lengths


def estimate_tau(texts: Sequence[Ranks], choices: Choices) -> float:
    """Return the tokens per target forward that decoding the texts with the tree would have.

    Like the measured tau it counts the bonus token and leaves the prefill out; a round that ends
    its text counts the tokens that it still had.

    Raises:
        OptionError: If the texts have no tokens.
    """
    num_rounds = sum(len(replay_rounds(ranks, choices)) for ranks in texts)
    if num_rounds == 0:
        raise OptionError("no text has a token to guess; give texts of at least two tokens")
    return sum(map(len, texts)) / num_rounds


def calibrate_choices(
    texts: Sequence[Ranks], *, num_nodes: int, max_rank: int = 32, max_depth: int | None = None
) -> Choices:
    """Return the static tree with the highest expected tau on the texts.

    The probability that a node is accepted is how often its path of ranks is the right one where
    rounds start. A prefix is at least as frequent as what follows it, so the most frequent paths
    are a tree. Where rounds start depends on the tree; counting is repeated with the tree found.

    Args:
        texts: Ranks at each root of each text.
        num_nodes: Nodes, the root left out.
        max_rank: Largest rank that is considered, exclusive.
        max_depth: Most levels; None for as many as there are heads.

    Raises:
        OptionError: If `num_nodes` does not fit into a round, or the texts have no tokens.
    """
    if not 1 <= num_nodes < MAX_NODES:
        raise OptionError(
            f"num_nodes is {num_nodes!r}, expected 1 to {MAX_NODES - 1}; choose one in range"
        )
    choices: Choices = ()
    for _ in range(_REPLAYS):
        counts: Counter[tuple[int, ...]] = Counter()
        for ranks in texts:
            for root in _round_starts(ranks, choices):
                path = tuple(ranks[root][:max_depth])
                for length in range(1, len(path) + 1):
                    if not 0 <= path[length - 1] < max_rank:
                        break
                    counts[path[:length]] += 1
        if not counts:
            raise OptionError("no text has a token to guess; give texts of at least two tokens")
        # Of equally frequent paths the shorter ones come first, so that prefixes are kept.
        best = sorted(counts, key=lambda path: (-counts[path], len(path), path))[:num_nodes]
        choices = tuple(sorted(best, key=lambda path: (len(path), path)))
    return choices


def _round_starts(ranks: Ranks, choices: Choices) -> list[int]:
    """Return the roots of the rounds that the tree leads to; every one without a tree."""
    if not choices:
        return list(range(len(ranks)))
    starts, position = [], 0
    for length in replay_rounds(ranks, choices):
        starts.append(position)
        position += length + 1
    return starts
