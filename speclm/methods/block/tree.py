"""Draft trees from one pass over a block: each node is scored given the tokens above it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.config import require_in_range
from speclm.drafting.levels import GrownTreeConfig
from speclm.drafting.ranking import LevelRanking, Nodes
from speclm.drafting.search import log_of, product_trees, search_on_host
from speclm.methods.block.layer import MarkovTerms
from speclm.methods.block.network import BlockHeads
from speclm.sampling.draws import DraftSampler
from speclm.sampling.noise import PositionNoise
from speclm.tree.dynamic import FilledTree, GrownRow
from speclm.tree.enclosing import ChosenNodes, EnclosingTree, enclosing_tree
from speclm.tree.static import RankPaths

_PRODUCT_WIDTH = 8
"""Nodes of a level with children among which a device chooses, if tokens do not depend on each
other: scoring more costs little, and few others are chosen."""


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
        self._by_level = logits[:, :, None].unbind(1)  # [batch, 1, draft_vocab] each
        self._terms = terms
        self._level = 0
        self._matrix: Float[Tensor, "batch rank draft_vocab"] | None = None
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
        logits = self._by_level[level]
        self._level += 1
        if markov is None:
            return logits.expand(-1, width, -1)
        if self._terms is not None:
            return self._terms.of(tokens) + logits
        if self._matrix is None:
            self._matrix = markov.matrix(len(tokens))
        if markov.kind == "vanilla":
            return markov.added(logits, markov.embed(tokens), self._matrix)
        state = self._state
        if state is not None:
            state = state.gather(1, parents[:, :, None].expand(-1, -1, state.shape[2]))
        code, self._state = markov.code(tokens, self._hidden_at(level, width), state)
        return markov.added(logits, code, self._matrix)

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
    return search_on_host(
        lambda nodes, level: _best_below(
            logits, nodes, level, config=config, ranking=ranking, noise=noise
        ),
        roots,
        config=config,
        bounds=bounds,
        leaf_tokens=leaf_tokens,
        vocabulary=logits.heads,
    )


def _best_below(
    logits: BlockLogits,
    nodes: Nodes,
    level: int,
    *,
    config: BlockProposerConfig,
    ranking: LevelRanking,
    noise: PositionNoise | None,
) -> tuple[Float[Tensor, "batch width ranks"], Int[Tensor, "batch width ranks"]]:
    """Return log-probabilities and columns of the likeliest children of the nodes of a level."""
    heads = logits.heads
    ranked = ranking.rank(
        logits.after(*nodes), depth=level, noise=noise, columns=heads.draft_columns, nodes=nodes
    )
    if config.min_acceptance > 0 and heads.config.has_confidence:
        doubtful = logits.is_doubtful(*nodes, min_acceptance=config.min_acceptance)
        ranked = ranked.masked_fill(doubtful[:, :, None], -torch.inf)
    found = ranked.topk(min(config.branches, heads.config.draft_vocab_size), dim=-1)
    return found.values, found.indices


def _best_of_levels(
    logits: BlockLogits,
    roots: Int[Tensor, " batch"],
    *,
    config: BlockProposerConfig,
    ranking: LevelRanking,
    noise: PositionNoise | None,
    depth: int,
) -> tuple[Float[Tensor, "batch levels ranks"], Int[Tensor, "batch levels ranks"]]:
    """Return log-probabilities and tokens of the likeliest candidates of each level.

    Only if tokens do not depend on each other.
    """
    heads, found = logits.heads, logits.without_markov[:, :depth]
    levels: tuple[Tensor, ...] = (found,)
    if noise is not None or ranking.changes_scores:  # both differ by level
        levels = found[:, None].unbind(2)
    ranked = [
        ranking.rank(part, depth=level, noise=noise, columns=heads.draft_columns)
        for level, part in enumerate(levels)
    ]
    best = torch.cat(ranked, dim=1).topk(
        min(config.branches, heads.config.draft_vocab_size), dim=-1
    )
    scores, tokens = best.values, heads.target_ids(best.indices)
    if config.min_acceptance > 0 and heads.config.has_confidence:
        doubtful = logits.are_doubtful(roots, tokens[:, :, 0], min_acceptance=config.min_acceptance)
        scores = scores.masked_fill(doubtful, -torch.inf)
    return scores, tokens


def enclosing_tree_of(
    config: BlockProposerConfig, heads: BlockHeads, *, depth: int, device: torch.device
) -> EnclosingTree:
    """Return the tree among whose nodes `choose_nodes` chooses."""
    is_chained = heads.config.markov is not None
    return enclosing_tree(
        depth=depth,
        # Which nodes have children is decided before their scores are known, so twice as many do.
        width=2 * config.width if is_chained else _PRODUCT_WIDTH,
        num_ranks=min(config.branches, heads.config.draft_vocab_size),
        is_chained=is_chained,
        device=device,
    )


def choose_nodes(
    logits: BlockLogits,
    roots: Int[Tensor, " batch"],
    tree: EnclosingTree,
    *,
    config: BlockProposerConfig,
    ranking: LevelRanking,
    noise: PositionNoise | None = None,
) -> ChosenNodes:
    """Return the likeliest nodes of each row; reads nothing on the host.

    They are always as many, because trees of fixed shape would be padded with others.

    Args:
        logits: Logits of a pass over the blocks of all rows.
        roots: Token at the root of each row.
        tree: Result of `enclosing_tree_of` for these heads.
        config: Size of the trees.
        ranking: Ranks the candidates of each level.
        noise: Noise of the positions; None if the target decodes greedily.
    """
    heads, depth = logits.heads, len(tree.expanded) + 1
    batch = len(roots)
    scores: list[Tensor] = []
    found: list[Tensor] = [roots[:, None]]
    if heads.markov_head is None:
        best = _best_of_levels(
            logits, roots, config=config, ranking=ranking, noise=noise, depth=depth
        )
        scores.append(best[0])
        found.append(best[1].flatten(1))
    else:
        nodes = found[0], torch.zeros_like(found[0])
        for level in range(depth):
            if level:
                parents = tree.parents[level - 1]
                expanded = found[level].index_select(1, tree.expanded[level - 1])
                nodes = expanded, parents if batch == 1 else parents.expand(batch, -1)
            values, columns = _best_below(
                logits, nodes, level, config=config, ranking=ranking, noise=noise
            )
            scores.append(values)
            found.append(heads.target_ids(columns.flatten(1)))
    log_probs = torch.cat(scores, dim=1).flatten(1)
    return tree.choose(log_probs, torch.cat(found, dim=1), num_nodes=config.num_draft_tokens + 1)


def _multiply(
    logits: BlockLogits,
    roots: Int[Tensor, " batch"],
    config: BlockProposerConfig,
    ranking: LevelRanking,
    noise: PositionNoise | None,
    bounds: list[int],
) -> list[GrownRow]:
    """Return the likeliest paths if tokens do not depend on each other."""
    scores, tokens = _best_of_levels(
        logits, roots, config=config, ranking=ranking, noise=noise, depth=max(bounds)
    )
    return product_trees(
        scores,
        tokens,
        num_nodes=config.num_draft_tokens,
        min_score=log_of(config.min_probability),
        min_best=log_of(config.min_confidence),
        levels=bounds,
    )


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
