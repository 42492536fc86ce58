"""A proposer whose network runs once for each level of a draft, from the target's features."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.drafting.beam import grow, reads_levels
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.drafting.levels import LevelBounds, RunByLevelConfig, planned, require_ranks
from speclm.drafting.ranking import LevelRanking, Nodes, path_expansions
from speclm.sampling.draws import DraftSampler, DraftSampling
from speclm.sampling.noise import PositionNoise
from speclm.tree.dynamic import FilledTree, GrownRow, GrownRows, drawn_paths
from speclm.tree.static import RankPaths


@dataclass(frozen=True, slots=True)
class LevelProposerConfig(RunByLevelConfig):
    """Settings of a `LevelProposer`; each level costs one run of the heads.

    Args:
        branches: Children considered for each expanded node.
        min_probability: Nodes less likely than this are not verified.
        min_confidence: A row stops when none of its paths is this likely.
    """

    branches: int = 3
    min_probability: float = 0.06
    min_confidence: float = 0.3


@runtime_checkable
class LevelOutputs(Protocol):
    """A run of the network over the levels of a draft, one after another."""

    @property
    def logits(self) -> Float[Tensor, "batch width draft_vocab"]:
        """Logits after every node of the last level; at first, after the roots."""

    def best(self, num: int) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and columns of the best children, ``[batch, width, num]``."""

    def below(
        self, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> None:
        """Feed the next level: the target's tokens, and each one's parent in the last level."""


@runtime_checkable
class LevelContext(Protocol):
    """Keeps what the network knows of the committed tokens of one generation."""

    def begin(self, prompt: Prefill) -> None:
        """Start a generation."""

    def commit(self, accepted: Accepted) -> None:
        """Drop the nodes of the draft, and keep what was committed for the next one."""

    def catch_up(self, *, num_ranks: int | None = None) -> None:
        """Run the network over what was committed since the last draft; see `start`."""

    def start(
        self, widths: list[int], *, width: int = 0, num_ranks: int | None = None
    ) -> LevelOutputs:
        """Return a run from the roots.

        Args:
            widths: Maximum nodes of each level.
            width: Maximum nodes of any level, if they may be padded to it; 0 if not.
            num_ranks: Children that are ranked by the network's probabilities; None if more
                decides.
        """


@runtime_checkable
class LevelVocabulary(Protocol):
    """The tokens that the network drafts from."""

    @property
    def draft_columns(self) -> Int[Tensor, " draft_vocab"] | None:
        """Token of each column of the logits; None if the columns are the target's tokens."""

    @property
    def host_columns(self) -> list[int] | None:
        """The same on the host."""

    def target_ids(self, draft_ids: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """Return the tokens of some columns."""

    def spread(
        self, logits: Float[Tensor, "batch nodes draft_vocab"]
    ) -> Float[Tensor, "batch nodes vocab"]:
        """Return logits over the target's tokens; absent ones get almost no probability."""


class WholeVocabulary:
    """A `LevelVocabulary` of all tokens of the target."""

    draft_columns: Int[Tensor, " draft_vocab"] | None = None
    host_columns: list[int] | None = None

    def target_ids(self, draft_ids: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """Return the tokens of some columns, which they are."""
        return draft_ids

    def spread(
        self, logits: Float[Tensor, "batch nodes vocab"]
    ) -> Float[Tensor, "batch nodes vocab"]:
        """Return logits over the target's tokens, as they are."""
        return logits


class LevelProposer(Proposer):
    """Grows a tree level by level with a network that continues the target's hidden states.

    A subclass sets the attributes that are listed here and those of `Proposer`, and calls
    `_prepare`.
    """

    fills_static_trees = True
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT
    config: LevelProposerConfig
    max_levels: int | None = None
    """Levels that the network can draft; None for no bound."""

    _context: LevelContext
    _vocabulary: LevelVocabulary

    def _prepare(
        self,
        config: LevelProposerConfig,
        *,
        context: LevelContext,
        vocabulary: LevelVocabulary,
        sizes: tuple[int, int],
    ) -> None:
        """Set what all such proposers have.

        Args:
            config: Settings.
            context: What the network knows of the committed tokens.
            vocabulary: The tokens that it drafts from.
            sizes: Numbers of tokens that it drafts from, and of the target's.

        Raises:
            OptionError: If a rank of the config's tree exceeds the draft vocabulary.
        """
        if config.paths is not None:
            require_ranks(config.paths, sizes[0])
        self.config, self.num_ranks = config, sizes[0]
        self._num_columns = sizes[0]
        self._context, self._vocabulary = context, vocabulary
        self._ranking = LevelRanking(config.mixture, vocab_size=sizes[1])
        self._grown: GrownRows = list[GrownRow]()
        self._sampler: DraftSampler | None = None
        self._bounds: LevelBounds | None = None
        self._leaf_tokens: frozenset[int] = frozenset()  # tokens that end a row

    @override
    def begin(self, prompt: Prefill) -> None:
        self._sampler = prompt.sampler
        self._context.begin(prompt)
        self._ranking.begin(prompt)
        self._bounds = LevelBounds(prompt)
        self._leaf_tokens = prompt.eos_token_ids

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        num_ranks = None
        if noise is None and self._sampler is None and not self._ranking.changes_scores:
            num_ranks = self._num_branches
        self._context.catch_up(num_ranks=num_ranks)
        config = self.config if self.plan is None else planned(self.config, self.plan)
        if self._sampler is not None:
            return self._draw(roots, config, self._sampler)
        if config.paths is not None:
            return self._fill(roots, self._within(config.paths), noise)
        draft, self._grown = self._grow(roots, config, noise, num_ranks=num_ranks)
        return draft

    @override
    def commit(self, accepted: Accepted) -> None:
        self._context.commit(accepted)
        self._ranking.learn(accepted, path_expansions(accepted, self._grown))
        assert self._bounds is not None, "commit before begin"
        self._bounds.commit(accepted.emitted)

    @property
    def _num_branches(self) -> int:
        return min(self.config.branches, self._num_columns)

    def _within(self, paths: RankPaths) -> RankPaths:
        """Return the paths of a static tree that the network can draft."""
        if self.max_levels is None:
            return paths
        return tuple(path for path in paths if len(path) <= self.max_levels)

    def _grow(
        self,
        roots: Int[Tensor, " batch"],
        config: LevelProposerConfig,
        noise: PositionNoise | None,
        *,
        num_ranks: int | None,
    ) -> tuple[Draft, GrownRows]:
        """Draft level by level from the most likely nodes; tokens are the target's ids.

        Args:
            roots: Root of each row.
            config: Size of the trees.
            noise: Noise of the positions.
            num_ranks: Children that are ranked by the network's probabilities; None if more
                decides.
        """
        assert self._bounds is not None
        reads = reads_levels(self.plan, roots.device)
        depth = config.depth if self.max_levels is None else min(config.depth, self.max_levels)
        bounds = self._bounds.levels(depth, reads=reads, least=config.min_confidence)
        num_children = self._num_branches
        widths = [min(config.width, num_children)]
        while len(widths) < max(bounds):
            widths.append(min(config.width, widths[-1] * num_children))
        run = self._context.start(
            widths[: max(max(bounds) - 1, 0)], width=config.width, num_ranks=num_ranks
        )

        def candidates(nodes: Nodes, level: int) -> tuple[Tensor, Tensor]:
            """Return log-probabilities and columns, ``[batch, width, ranks]``, below some nodes."""
            if level:
                run.below(*nodes)
            if num_ranks is not None:
                return run.best(num_ranks)
            found = self._rank(run, level, noise, nodes).topk(num_children, dim=-1)
            return found.values, found.indices

        return grow(
            candidates,
            roots,
            config=config,
            bounds=bounds,
            reads=reads,
            leaf_tokens=self._leaf_tokens,
            vocabulary=self._vocabulary,
        )

    def _fill(
        self, roots: Int[Tensor, " batch"], paths: RankPaths, noise: PositionNoise | None
    ) -> Draft:
        """Fill a static tree with the best candidates below each node."""

        def children(run: LevelOutputs, tree: FilledTree) -> Tensor:
            nodes = (tree.expanded_tokens, tree.expanded_parents)
            ranked = self._rank(run, tree.depth, noise, nodes)
            return self._vocabulary.target_ids(ranked.topk(tree.num_ranks).indices)

        tree = self._filled(FilledTree(paths, roots=roots), children)
        return Draft(tokens=tree.tokens, topology=tree.topology)

    def _draw(
        self, roots: Int[Tensor, " batch"], config: LevelProposerConfig, sampler: DraftSampler
    ) -> Draft:
        """Draw the children in a static tree, level by level."""
        paths = config.paths or drawn_paths(
            width=config.width,
            branches=self._num_branches,
            depth=config.depth,
            num_nodes=config.num_draft_tokens,
        )
        distributions: list[Tensor] = []

        def children(run: LevelOutputs, tree: FilledTree) -> Tensor:
            found = sampler.distribution(self._vocabulary.spread(run.logits))  # [batch, width, …]
            if not distributions:
                distributions.append(found.new_zeros(*tree.tokens.shape, found.shape[2]))
            distributions[0].index_copy_(1, tree.expanded_nodes, found)
            return sampler.siblings(found, num=tree.num_ranks)

        empty = FilledTree(self._within(paths), roots=roots, are_drawn=True)
        tree = self._filled(empty, children)
        return Draft(tree.tokens, tree.topology, distributions=distributions[0])

    def _filled(
        self, tree: FilledTree, children: Callable[[LevelOutputs, FilledTree], Tensor]
    ) -> FilledTree:
        """Fill a static tree; `children` returns the tokens below the nodes of the last level."""
        run = self._context.start(tree.widths[1:])
        while True:
            tree.fill(children(run, tree))
            if tree.is_full:
                self._grown = [GrownRow([], [], tree.expansions, [])] * len(tree.tokens)
                return tree
            run.below(tree.expanded_tokens, tree.expanded_parents)

    def _rank(
        self, run: LevelOutputs, depth: int, noise: PositionNoise | None, nodes: Nodes
    ) -> Float[Tensor, "batch nodes draft_vocab"]:
        return self._ranking.rank(
            run.logits,
            depth=depth,
            noise=noise,
            columns=self._vocabulary.draft_columns,
            nodes=nodes,
        )
