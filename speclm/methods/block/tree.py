"""Draft trees from one pass over a block: each node is scored given the tokens above it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.config import require_in_range
from speclm.devices import is_host
from speclm.drafting.levels import GrownTreeConfig
from speclm.drafting.ranking import LevelRanking, Nodes
from speclm.drafting.search import ChildTable, log_of, product_trees, search, search_tables
from speclm.methods.block.layer import MarkovTerms
from speclm.methods.block.network import BlockHeads
from speclm.sampling.draws import DraftSampler
from speclm.sampling.noise import PositionNoise
from speclm.tree.dynamic import FilledTree, GrownRow
from speclm.tree.static import RankPaths

_MAX_TABLE = 2**26
"""Most logits that are computed at once for the nodes that a tree may have."""


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
        state = self._state
        if state is not None:
            state = state.gather(1, parents[:, :, None].expand(-1, -1, state.shape[2]))
        term, self._state = markov.bias(tokens, self._hidden_at(level, width), state)
        return term + logits

    def after_all(
        self, tokens: Int[Tensor, "batch nodes"], levels: Int[Tensor, " nodes"]
    ) -> Float[Tensor, "batch nodes draft_vocab"]:
        """Return the logits after nodes of any levels, if the Markov head has no state.

        Args:
            tokens: The target's tokens.
            levels: Level of each node; 0 for the root.
        """
        markov = self.heads.markov_head
        assert markov is not None, "the heads have no Markov head"
        if markov.kind == "gated":
            code, _ = markov.code(tokens, self.hidden.index_select(1, levels))
        else:
            code = markov.embed(tokens)
        terms: Tensor = markov.markov_w2(code.flatten(0, 1))
        base = self.without_markov.index_select(1, levels)
        return base + terms.view(base.shape)

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
    if _has_tables(logits, config, ranking):
        tables = _tables(logits, roots, config, ranking, noise, max(bounds))
        return search_tables(tables, config=config, bounds=bounds, leaf_tokens=leaf_tokens)

    def candidates(nodes: Nodes, level: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and columns, ``[batch, width, ranks]``, below some nodes."""
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
        return found.values, found.indices

    return search(
        candidates,
        roots,
        config=config,
        bounds=bounds,
        leaf_tokens=leaf_tokens,
        vocabulary=logits.heads,
    )


def _has_tables(logits: BlockLogits, config: BlockProposerConfig, ranking: LevelRanking) -> bool:
    """Return whether the children of all likely nodes are computed at once, and read once.

    They are where reading waits, unless they depend on more than the token before them, or are too
    many.
    """
    markov, found = logits.heads.markov_head, logits.without_markov
    if is_host(found.device) or ranking.changes_scores or config.min_acceptance > 0:
        return False
    is_recurrent = markov is not None and markov.kind == "rnn"
    return not is_recurrent and 2 * config.width * found.numel() <= _MAX_TABLE


def _tables(
    logits: BlockLogits,
    roots: Int[Tensor, " batch"],
    config: BlockProposerConfig,
    ranking: LevelRanking,
    noise: PositionNoise | None,
    depth: int,
) -> list[list[ChildTable]]:
    """Return the likeliest children of the likeliest tokens of each level, for every row.

    These tokens are the likeliest without the term of the token before them, twice as many as may
    be expanded.
    """
    heads, vocab_size = logits.heads, logits.without_markov.shape[2]
    width, num_ranks = min(2 * config.width, vocab_size), min(config.branches, vocab_size)
    above = logits.without_markov[:, : max(depth - 1, 0)].topk(width, dim=-1).indices.flatten(1)
    tokens = torch.cat([roots[:, None], heads.target_ids(above)], dim=1)
    after = logits.after_all(tokens, _level_indices(depth, width, roots.device))
    levels: tuple[Tensor, ...] = (after,)
    if noise is not None:  # which differs by level
        levels = tuple(after.split_with_sizes([1] + [width] * (depth - 1), dim=1))
    ranked = [
        ranking.rank(part, depth=level, noise=noise, columns=heads.draft_columns)
        for level, part in enumerate(levels)
    ]
    best = torch.cat(ranked, dim=1).topk(num_ranks, dim=-1)
    # One transfer; as float32, which has all integers below 2^24.
    packed = torch.cat([best.values.flatten(1), best.indices.flatten(1), above], dim=1).tolist()
    return [
        _tables_of(row, heads.host_columns, depth=depth, width=width, num_ranks=num_ranks)
        for row in packed
    ]


def _tables_of(
    packed: list[float], columns: list[int] | None, *, depth: int, width: int, num_ranks: int
) -> list[ChildTable]:
    num_nodes = 1 + width * (depth - 1)
    num_children = num_nodes * num_ranks
    ids = [int(column) for column in packed[num_children:]]
    if columns is not None:
        ids = [columns[column] for column in ids]
    tables: list[ChildTable] = [{} for _ in range(depth)]
    for node, token in enumerate([0, *ids[num_children:]]):  # a table has the root as token 0
        level, index = divmod(node - 1, width) if node else (-1, 0)
        children = slice(node * num_ranks, (node + 1) * num_ranks)
        tables[level + 1][token] = index, packed[children], ids[children]
    return tables


@lru_cache(maxsize=64)
def _level_indices(depth: int, width: int, device: torch.device) -> Int[Tensor, " nodes"]:
    """Return the level of the root and of `width` nodes of each further level."""
    levels = [0, *(level for level in range(1, depth) for _ in range(width))]
    return torch.tensor(levels, device=device, dtype=torch.long)


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
