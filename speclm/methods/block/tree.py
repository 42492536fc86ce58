"""Draft trees from one pass over a block: each node is scored given the tokens above it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.config import require_in_range
from speclm.drafting.levels import GrownTreeConfig
from speclm.drafting.ranking import LevelRanking, Nodes
from speclm.drafting.search import log_of, search
from speclm.methods.block.layer import MarkovHead
from speclm.methods.block.network import BlockHeads
from speclm.sampling.draws import DraftSampler
from speclm.sampling.noise import PositionNoise
from speclm.tree.dynamic import FilledTree, GrownRow
from speclm.tree.static import RankPaths, likeliest_paths

_TERM_BYTES = 2**25


@dataclass(frozen=True, slots=True)
class BlockProposerConfig(GrownTreeConfig):
    """Settings of `BlockProposer`; a level costs no run of the heads, only its scores.

    Args:
        depth: Maximum levels of the tree, by default all that the heads draft.
        width: Nodes expanded at each level, if tokens depend on each other; else all may be.
        branches: Children considered for each expanded node.
        min_probability: Nodes whose path is less likely than this are not verified.
        min_confidence: A row stops when none of its paths is this likely.
        min_acceptance: Nodes whose path the confidence head gives a lower probability of acceptance
            are left out; 0 to leave that head unused.
    """

    depth: int = 8
    width: int = 4
    branches: int = 4
    min_probability: float = 0.05
    min_confidence: float = 0.0
    min_acceptance: float = 0.0

    def __post_init__(self) -> None:
        GrownTreeConfig.__post_init__(self)  # super() does not work in a slotted dataclass
        require_in_range("min_acceptance", self.min_acceptance, low=0.0, high=1.0)


class MarkovTerms:
    """Terms of a vanilla Markov head, kept for the tokens that were asked for.

    Texts repeat their tokens, and on a CPU the product for a token takes longer than anything else
    at a level of a tree. Only for heads whose weights do not change.
    """

    def __init__(self, markov: MarkovHead) -> None:
        """Start without any term."""
        weight = markov.markov_w2.weight
        num_rows = max(_TERM_BYTES // (weight.element_size() * len(weight)), 1)
        self._markov = markov
        self._rows = weight.new_empty(num_rows, len(weight))
        self._places: dict[int, int] = {}  # row of each token

    def of(self, tokens: Int[Tensor, "batch width"]) -> Float[Tensor, "batch width draft_vocab"]:
        """Return the terms after some tokens, ids of the target; reads them on the host."""
        wanted = tokens.flatten().tolist()
        new = list({token: None for token in wanted if token not in self._places})
        if len(self._places) + len(new) > len(self._rows):  # start afresh
            self._places.clear()
            new = list(dict.fromkeys(wanted))
        if len(new) > len(self._rows):
            return self._compute(tokens)
        if new:
            first = len(self._places)
            self._rows[first : first + len(new)] = self._compute(tokens.new_tensor(new))
            self._places.update(zip(new, range(first, first + len(new)), strict=True))
        found: Tensor = self._rows[tokens.new_tensor([self._places[token] for token in wanted])]
        return found.view(*tokens.shape, -1)

    def _compute(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows draft_vocab"]:
        return self._markov.markov_w2(self._markov.embed(tokens))  # type: ignore[no-any-return]


class BlockLogits:
    """Logits after the nodes of a draft tree, asked for level by level.

    A position of the block gives all nodes of one depth the same logits. The Markov head, if there
    is one, adds a term for each node's own token, and with recurrent states also for those above.
    """

    def __init__(
        self,
        heads: BlockHeads,
        hidden: Float[Tensor, "batch drafts hidden"],
        logits: Float[Tensor, "batch drafts draft_vocab"],
        *,
        terms: MarkovTerms | None = None,
    ) -> None:
        """Start at the roots.

        Args:
            heads: The network.
            hidden: Its result for a block.
            logits: Its logits there, without the term of the Markov head.
            terms: Terms of the heads' vanilla Markov head, if they are kept.
        """
        self.heads, self.hidden, self.without_markov = heads, hidden, logits
        self.num_levels = logits.shape[1]
        self._terms = terms
        self._level = 0
        self._state: Float[Tensor, "batch width rank"] | None = None
        self._acceptance: Float[Tensor, "batch width"] | None = None

    def after(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width draft_vocab"]:
        """Return the logits after the nodes of the next level, at first after the roots.

        Args:
            tokens: The target's tokens.
            parents: Index of each token's parent in the last level.
        """
        level, width, markov = self._level, tokens.shape[1], self.heads.markov_head
        logits = self.without_markov[:, level, None]
        self._level += 1
        if markov is None:
            return logits.expand(-1, width, -1)
        if self._terms is not None:
            return self._terms.of(tokens) + logits
        state = self._state
        if state is not None:
            state = state.gather(1, parents[:, :, None].expand(-1, -1, state.shape[2]))
        term, self._state = markov.bias(tokens, self._hidden_at(level, width), state)
        return term + logits

    def is_doubtful(
        self,
        tokens: Int[Tensor, "batch width"],
        parents: Int[Tensor, "batch width"],
        *,
        min_acceptance: float,
    ) -> Bool[Tensor, "batch width"]:
        """Return below which of the nodes of the last level the confidence head sees no use.

        The head estimates how likely a draft token after each node is accepted; the product along
        the path counts. To be called for every level.

        Args:
            tokens: Arguments of the last call of `after`.
            parents: The same.
            min_acceptance: Least product.
        """
        hidden = self._hidden_at(self._level - 1, tokens.shape[1])
        found = self.heads.confidence(hidden.flatten(0, 1), tokens.flatten()).view(tokens.shape)
        if self._acceptance is not None:
            found = found * self._acceptance.gather(1, parents)
        self._acceptance = found
        return found < min_acceptance

    def are_doubtful(
        self,
        roots: Int[Tensor, " batch"],
        best: Int[Tensor, "batch levels"],
        *,
        min_acceptance: float,
    ) -> Bool[Tensor, "batch levels 1"]:
        """Return at which levels the confidence head sees no use in any node.

        Args:
            roots: Token at the roots.
            best: Likeliest token of each level, an id of the target.
            min_acceptance: Least product of the head's estimates down to a level.
        """
        previous = torch.cat([roots[:, None], best[:, :-1]], dim=1)
        found = self.heads.confidence(self.hidden.flatten(0, 1), previous.flatten())
        return (found.view(best.shape).cumprod(1) < min_acceptance)[:, :, None]

    def _hidden_at(self, level: int, width: int) -> Float[Tensor, "batch width hidden"]:
        return self.hidden[:, level, None].expand(-1, width, -1)


def grow_trees(
    logits: BlockLogits,
    roots: Int[Tensor, " batch"],
    *,
    config: BlockProposerConfig,
    ranking: LevelRanking,
    noise: PositionNoise | None = None,
    levels: Sequence[int] | None = None,
    leaf_tokens: frozenset[int] = frozenset(),
) -> list[GrownRow]:
    """Return the likeliest paths of each row.

    Args:
        logits: Logits of a pass over the blocks of all rows.
        roots: Token at the root of each row.
        config: Size of the trees, and how they are searched.
        ranking: Ranks the candidates of each level.
        noise: Noise of the positions; None if the target decodes greedily.
        levels: Maximum levels of each row; None for those of the pass.
        leaf_tokens: Tokens after which nothing follows, if tokens depend on each other.
    """
    depth = min(config.depth, logits.num_levels)
    bounds = [depth] * len(roots) if levels is None else [min(bound, depth) for bound in levels]
    if logits.heads.markov_head is None:
        return _multiply(logits, roots, config, ranking, noise, bounds)
    num_ranks = min(config.branches, logits.heads.config.draft_vocab_size)

    def candidates(nodes: Nodes, level: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and tokens, ``[batch, width, ranks]``, below some nodes."""
        ranked = ranking.rank(
            logits.after(*nodes),
            depth=level,
            noise=noise,
            columns=logits.heads.draft_columns,
            nodes=nodes,
        )
        if config.min_acceptance > 0 and logits.heads.config.has_confidence:
            doubtful = logits.is_doubtful(*nodes, min_acceptance=config.min_acceptance)
            ranked = ranked.masked_fill(doubtful[:, :, None], -torch.inf)
        found = ranked.topk(num_ranks, dim=-1)
        return found.values, logits.heads.target_ids(found.indices)

    return search(candidates, roots, config=config, bounds=bounds, leaf_tokens=leaf_tokens)


def _multiply(
    logits: BlockLogits,
    roots: Int[Tensor, " batch"],
    config: BlockProposerConfig,
    ranking: LevelRanking,
    noise: PositionNoise | None,
    bounds: list[int],
) -> list[GrownRow]:
    """Return the likeliest paths if tokens do not depend on each other."""
    heads, found = logits.heads, logits.without_markov[:, : max(bounds)]
    levels: tuple[Tensor, ...] = (found,)
    if noise is not None or ranking.changes_scores:  # both differ by level
        levels = found[:, None].unbind(2)
    ranked = [
        ranking.rank(part, depth=depth, noise=noise, columns=heads.draft_columns)
        for depth, part in enumerate(levels)
    ]
    best = torch.cat(ranked, dim=1).topk(
        min(config.branches, heads.config.draft_vocab_size), dim=-1
    )
    scores, tokens = best.values, heads.target_ids(best.indices)
    if config.min_acceptance > 0 and heads.config.has_confidence:
        doubtful = logits.are_doubtful(roots, tokens[:, :, 0], min_acceptance=config.min_acceptance)
        scores = scores.masked_fill(doubtful, -torch.inf)
    return product_trees(
        scores,
        tokens,
        num_nodes=config.num_draft_tokens,
        min_score=log_of(config.min_probability),
        min_best=log_of(config.min_confidence),
        levels=bounds,
    )


def product_trees(
    scores: Float[Tensor, "batch levels ranks"],
    tokens: Int[Tensor, "batch levels ranks"],
    *,
    num_nodes: int,
    min_score: float,
    min_best: float,
    levels: Sequence[int],
) -> list[GrownRow]:
    """Return the likeliest paths if the tokens of a block do not depend on each other.

    Args:
        scores: Log-probabilities of the best candidates of each level, best first.
        tokens: The candidates.
        num_nodes: Maximum nodes of a row.
        min_score: Log-probability below which a path is left out.
        min_best: A row ends with the level whose likeliest path is below this.
        levels: Maximum levels of each row.

    Source: Ringel et al. 2026 (DDTree).
    """
    found = scores.nan_to_num(nan=-torch.inf, posinf=0.0, neginf=-torch.inf).clamp_(max=0)
    rows = zip(found.tolist(), tokens.tolist(), levels, strict=True)  # the host builds the tree
    return [
        _product_row(
            row[: _num_levels(row[:depth], min_best)],
            ids,
            num_nodes=num_nodes,
            min_score=min_score,
        )
        for row, ids, depth in rows
    ]


def _num_levels(scores: list[list[float]], min_best: float) -> int:
    best = 0.0
    for level, ranks in enumerate(scores, start=1):
        best += ranks[0]
        if best < min_best:
            return level
    return len(scores)


def fill_tree(
    logits: BlockLogits,
    roots: Int[Tensor, " batch"],
    paths: RankPaths,
    *,
    ranking: LevelRanking,
    noise: PositionNoise | None,
) -> FilledTree:
    """Return a static tree with the best candidates below each node."""
    tree, heads = FilledTree(paths, roots=roots), logits.heads
    while not tree.is_full:
        nodes = tree.expanded_tokens, tree.expanded_parents
        ranked = ranking.rank(
            logits.after(*nodes),
            depth=tree.depth,
            noise=noise,
            columns=heads.draft_columns,
            nodes=nodes,
        )
        tree.fill(heads.target_ids(ranked.topk(tree.num_ranks).indices))
    return tree


def draw_tree(
    logits: BlockLogits,
    roots: Int[Tensor, " batch"],
    paths: RankPaths,
    *,
    sampler: DraftSampler,
) -> tuple[FilledTree, Float[Tensor, "batch nodes vocab"]]:
    """Return a static tree of drawn children, and the distribution below each node."""
    tree = FilledTree(paths, roots=roots, are_drawn=True)
    distributions: Tensor | None = None
    while not tree.is_full:
        after = logits.after(tree.expanded_tokens, tree.expanded_parents)
        distribution = sampler.distribution(logits.heads.spread(after))
        if distributions is None:
            distributions = distribution.new_zeros(*tree.tokens.shape, distribution.shape[2])
        distributions.index_copy_(1, tree.expanded_nodes, distribution)
        tree.fill(sampler.siblings(distribution, num=tree.num_ranks))
    assert distributions is not None, "a static tree has nodes"
    return tree, distributions


def _product_row(
    scores: list[list[float]], tokens: list[list[int]], *, num_nodes: int, min_score: float
) -> GrownRow:
    nodes = likeliest_paths(scores, num_nodes=num_nodes, min_score=min_score)
    reached = [0.0]
    for node in nodes:
        reached.append(reached[node.parent] + scores[node.depth][node.rank])
    return GrownRow(
        tokens=[tokens[node.depth][node.rank] for node in nodes],
        parents=[node.parent for node in nodes],
        expansions=[(node.depth, 0) for node in nodes],
        scores=reached[1:],
    )
