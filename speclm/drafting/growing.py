"""Grows draft trees on the host from sources of candidates, the likeliest node first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import heappop, heappush

from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import (
    MAX_DEPTH,
    MAX_NODES,
    ProposerConfig,
    require_count,
    require_depth,
    require_in_range,
)
from speclm.devices import upload
from speclm.drafting.hit_rates import NOISE_BOUNDS, HitRates
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.drafting.levels import least_probability
from speclm.drafting.sources import CandidateSource, NoiseRow, State
from speclm.sampling.noise import PositionNoise
from speclm.tree.plan import TreePlan
from speclm.tree.static import RankPaths, normalize_paths
from speclm.tree.topology import trees_of

LEAST_PROBABILITY = 0.001


@dataclass(frozen=True, slots=True)
class GrowthConfig(ProposerConfig):
    """Settings of trees that grow from sources.

    Args:
        depth: Maximum draft tokens on one path.
        num_draft_tokens: Maximum nodes of a tree, root excluded.
        min_probability: Least probability of acceptance at which a node is drafted for a single
            row, in ``[0.001, 1]``; more in a batch. The best value is the time that a node adds to
            a round, in steps of regular generation, times the tokens generated on average in the
            time of such a step.
        paths: Static tree as paths of ranks; None for trees that grow by probability.
    """

    depth: int = 15
    num_draft_tokens: int = 15
    min_probability: float = 0.09
    paths: RankPaths | None = None

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)  # super() does not work in a slotted dataclass
        require_count("num_draft_tokens", self.num_draft_tokens, low=1, high=MAX_NODES - 1)
        require_in_range("min_probability", self.min_probability, low=LEAST_PROBABILITY, high=1.0)
        if self.paths is not None:
            object.__setattr__(self, "paths", normalize_paths(self.paths))


@lru_cache(maxsize=256)
def planned_growth(config: GrowthConfig, plan: TreePlan | None, *, num_rows: int) -> GrowthConfig:
    """Return the settings of the next trees; what a plan leaves open is the config's.

    Args:
        config: The proposer's own settings.
        plan: Plan of the next rounds; None for none.
        num_rows: Rows that are still generated.
    """
    min_probability = least_probability(config.min_probability, num_rows=num_rows)
    if plan is None:
        return replace(config, min_probability=min_probability)
    if plan.min_probability is not None:
        min_probability = max(plan.min_probability, LEAST_PROBABILITY)
    return replace(
        config,
        depth=min(plan.depth, MAX_DEPTH),
        num_draft_tokens=plan.num_draft_tokens,
        min_probability=min_probability,
        paths=plan.paths,
    )


@dataclass(slots=True)
class GrownTree:
    """The tree of one row.

    Args:
        tokens: Token of each node.
        parents: Parent of each node.
        probs: Probability of each node's token given the path to it.
        depths: Depth of each node.
        states: States of the sources at each node.
        children: Node by its parent and its token.
        offered: For expanded nodes, the code of each candidate by token.
    """

    tokens: list[int]
    parents: list[int]
    probs: list[float]
    depths: list[int]
    states: list[list[State]]
    children: dict[tuple[int, int], int] = field(default_factory=dict)
    offered: dict[int, dict[int, int]] = field(default_factory=dict)

    @classmethod
    def only_root(cls, token: int, states: list[State]) -> "GrownTree":
        """Return a tree without draft tokens."""
        return cls([token], [0], [1.0], [0], [states])


class TreeGrower:
    """Grows the trees of all rows, and measures how often the candidates of its sources are right.

    A candidate's score is the product of the hit rates on its path. The hit rates outlive a
    generation; they decide which tokens are drafted, never which are emitted.
    """

    def __init__(self, sources: Sequence[CandidateSource]) -> None:
        self.sources = tuple(sources)
        self.num_observed = max((source.num_observed for source in sources), default=0)
        """Likeliest tokens after each verified node that the sources learn from."""
        self.muted: frozenset[CandidateSource] = frozenset()
        """Sources that suggest nothing in the next trees."""
        self._rates = HitRates([source.start_rates for source in sources])
        indexed = list(
            zip(range(len(self.sources)), self.sources, self._rates.strides, strict=True)
        )
        self._by_text = [part for part in indexed if not part[1].reads_noise]
        self._by_noise = [part for part in indexed if part[1].reads_noise]
        self._ends: frozenset[int] = frozenset()
        self._last: list[list[int]] = []  # the last two tokens of each row
        self._is_waiting: list[bool] = []
        self._remaining: list[int] = []  # most tokens that each row may still emit
        self._trees: list[GrownTree] | None = None
        self._noise: PositionNoise | None = None
        self._noise_rows: dict[tuple[int, int], NoiseRow] = {}

    def begin(self, prompt: Prefill) -> None:
        """Start a generation."""
        key = None if prompt.chooser is None else prompt.chooser.key
        self._rates.begin((prompt.temperature, key))
        self._ends = prompt.eos_token_ids
        # Once per generation: trees grow on the host.
        ends, firsts = prompt.tokens[:, -1:].tolist(), prompt.first_tokens.tolist()
        paddings = prompt.num_padding.tolist()
        num_tokens = prompt.tokens.shape[1]
        self._last = [
            [end[0] if end and padding < num_tokens else -1, first]
            for end, first, padding in zip(ends, firsts, paddings, strict=True)
        ]
        self._is_waiting = [False] * len(firsts)
        self._remaining = [prompt.max_new_tokens] * len(firsts)
        self._trees = None
        for source in self.sources:
            source.begin(prompt)

    def forget(self) -> None:
        """Forget what earlier generations taught: hit rates, and what the sources hold."""
        self._rates.forget()
        for source in self.sources:
            source.forget()

    def describe(self) -> list[str]:
        """Return what the sources hold, one entry for each that has something to say."""
        return [held for source in self.sources if (held := source.describe())]

    @property
    def num_live(self) -> int:
        """Rows that emitted something in the last round."""
        return self._is_waiting.count(False)

    def propose(
        self,
        roots: Int[Tensor, " batch"],
        config: GrowthConfig,
        *,
        noise: PositionNoise | None,
    ) -> Draft:
        """Grow a tree of each row."""
        self._noise, self._noise_rows = noise, {}
        trees = [self._grow(row, config) for row in range(len(roots))]
        self._trees = trees
        num_nodes = max(len(tree.tokens) for tree in trees)
        tokens = [tree.tokens + [0] * (num_nodes - len(tree.tokens)) for tree in trees]
        return Draft(
            tokens=upload(tokens, roots.device),
            topology=trees_of([tree.parents for tree in trees], device=roots.device),
            node_probs=[tree.probs + [0.0] * (num_nodes - len(tree.probs)) for tree in trees],
        )

    def commit(self, accepted: Accepted) -> None:
        """Learn from a round: hit rates, what the target thought likely, and the tokens."""
        trees = self._trees
        if trees is None:
            trees = [self._only_root(row) for row in range(len(self._last))]
        for row, emitted in enumerate(accepted.emitted):
            if emitted and self._trees is not None:
                self._count_hits(row, trees[row], emitted)
        if accepted.candidates is not None and self.num_observed:
            self._observe(accepted, trees)
        for row, emitted in enumerate(accepted.emitted):
            for source in self.sources:
                source.commit(row, emitted)
            self._last[row] = [*self._last[row], *emitted][-2:]
            self._remaining[row] -= len(emitted)
        # A row that was given nothing has most likely ended: nodes for it would slow the others.
        self._is_waiting = [not emitted for emitted in accepted.emitted]
        self._trees, self._noise, self._noise_rows = None, None, {}
        self._rates.end_round()

    def _only_root(self, row: int) -> GrownTree:
        states = [None if source in self.muted else source.root(row) for source in self.sources]
        return GrownTree.only_root(self._last[row][-1], states)

    def _grow(self, row: int, config: GrowthConfig) -> GrownTree:
        tree = self._only_root(row)
        # Deeper nodes are not accepted, and what the target says after them is wrong.
        depth = min(config.depth, self._remaining[row] - 1)
        if self._is_waiting[row] or depth < 1:
            return tree
        if config.paths is not None:
            self._fill(row, tree, [path for path in config.paths if len(path) <= depth])
            return tree
        tokens, depths, ends = tree.tokens, tree.depths, self._ends
        least, num_nodes = config.min_probability, config.num_draft_tokens
        # Minus the probability of the path, order of arrival, token, its probability, parent.
        waiting: list[tuple[float, int, int, float, int]] = []
        node, reached, arrivals = 0, 1.0, 0
        while len(tokens) <= num_nodes:
            if depths[node] < depth and (node == 0 or tokens[node] not in ends):
                least_prob = least / reached
                for token, prob in self._rated(row, tree, node):
                    if prob >= least_prob:
                        arrivals += 1
                        heappush(waiting, (-reached * prob, arrivals, token, prob, node))
            if not waiting:
                break
            minus_reached, _, token, prob, parent = heappop(waiting)
            node, reached = len(tokens), -minus_reached
            self._add(tree, parent, token, prob)
        return tree

    def _fill(self, row: int, tree: GrownTree, paths: Sequence[tuple[int, ...]]) -> None:
        """Fill a static tree by the ranks of the candidates' rates; leave out missing ranks."""
        nodes: dict[tuple[int, ...], int] = {(): 0}
        ranked: dict[int, list[tuple[int, float]]] = {}
        for path in paths:
            parent = nodes.get(path[:-1])
            if parent is None or (parent and tree.tokens[parent] in self._ends):
                continue
            if parent not in ranked:
                rated = self._rated(row, tree, parent)
                ranked[parent] = sorted(rated, key=lambda pair: -pair[1])
            if path[-1] >= len(ranked[parent]):
                continue
            token, prob = ranked[parent][path[-1]]
            nodes[path] = len(tree.tokens)
            self._add(tree, parent, token, prob)

    def _add(self, tree: GrownTree, parent: int, token: int, prob: float) -> None:
        tree.children[parent, token] = len(tree.tokens)
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.probs.append(prob)
        tree.depths.append(tree.depths[parent] + 1)
        states = []
        for source, state in zip(self.sources, tree.states[parent], strict=True):
            states.append(None if state is None else source.advance(state, token))
        tree.states.append(states)

    def _rated(self, row: int, tree: GrownTree, node: int) -> Iterable[tuple[int, float]]:
        """Return the candidates after a node and their probabilities, which sum to 1 at most."""
        offered = self._expand(row, tree, node)
        known, rate = self._rates.known.get, self._rates.rate
        probs = [known(code) or rate(code) for code in offered.values()]
        total = sum(probs)
        if total > 1:
            probs = [prob / total for prob in probs]
        return zip(offered, probs, strict=True)

    def _expand(self, row: int, tree: GrownTree, node: int) -> dict[int, int]:
        """Return the candidates after a node and their codes."""
        states, offered = tree.states[node], dict[int, int]()
        for index, source, stride in self._by_text:
            if states[index] is not None:
                for token, key in source.candidates(states[index], None):
                    offered[token] = offered.get(token, 0) + stride * (key + 1)
        noise, noise_stride = None, self._rates.noise_stride
        if self._noise is not None:
            noise = self._noise_row(row, tree.depths[node])
            first, second, third = NOISE_BOUNDS
            for token in offered:
                drawn = noise.item(token)
                bucket = 1 + (drawn >= first) + (drawn >= second) + (drawn >= third)
                offered[token] += noise_stride * bucket
        for index, source, stride in self._by_noise:
            if states[index] is not None:
                for token, key in source.candidates(states[index], noise):
                    # These keys say what the noise means, so its bucket says no more.
                    offered[token] = offered.get(token, 0) % noise_stride + stride * (key + 1)
        tree.offered[node] = offered
        return offered

    def _noise_row(self, row: int, depth: int) -> NoiseRow:
        found = self._noise_rows.get((row, depth))
        if found is None:
            assert self._noise is not None
            # Syncs: which token is drafted next depends on the noise of the one before.
            found = self._noise.row(row, depth).float().cpu().numpy()
            self._noise_rows[row, depth] = found
        return found

    def _count_hits(self, row: int, tree: GrownTree, emitted: list[int]) -> None:
        node: int | None = 0
        for token in emitted:
            assert node is not None
            offered = tree.offered.get(node)
            if offered is None:
                offered = self._expand(row, tree, node)
            for candidate, code in offered.items():
                self._rates.count(code, is_hit=candidate == token)
            node = tree.children.get((node, token))
            if node is None:
                return

    def _observe(self, accepted: Accepted, trees: list[GrownTree]) -> None:
        """Hand on what the target thought likely after every node, accepted ones last."""
        assert accepted.candidates is not None
        ids, log_probs = accepted.candidates.on_host()  # one transfer a round
        for row, (tree, emitted) in enumerate(zip(trees, accepted.emitted, strict=True)):
            if not emitted:
                continue
            nodes = accepted.candidates.nodes_of(row, num_nodes=len(tree.tokens))
            on_path = set(accepted.paths[row])
            columns = sorted(range(len(nodes)), key=lambda column: nodes[column] in on_path)
            ordered = [nodes[column] for column in columns]
            before = [self._last[row][-2], *(tree.tokens[p] for p in tree.parents[1:])]
            previous = [before[node] for node in ordered]
            tokens = [tree.tokens[node] for node in ordered]
            num_rejected = len(nodes) - sum(node in on_path for node in nodes)
            for source in self.sources:
                if source.num_observed:
                    width = source.num_observed
                    source.observe(
                        previous,
                        tokens,
                        ids[row, columns, :width],
                        log_probs[row, columns, :width],
                        num_rejected=num_rejected,
                    )


class SourceProposer(Proposer):
    """A proposer whose trees grow from sources of its own."""

    fills_static_trees = True
    config: GrowthConfig
    grower: TreeGrower

    @property
    @override
    def num_observed(self) -> int:  # type: ignore[override]  # the sources decide
        return self.grower.num_observed

    @override
    def describe(self) -> str:
        return "; ".join([super().describe(), *self.grower.describe()])

    @override
    def forget(self) -> None:
        self.grower.forget()

    @override
    def begin(self, prompt: Prefill) -> None:
        self.grower.begin(prompt)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        config = planned_growth(self.config, self.plan, num_rows=self.grower.num_live)
        return self.grower.propose(roots, config, noise=noise)

    @override
    def commit(self, accepted: Accepted) -> None:
        self.grower.commit(accepted)
