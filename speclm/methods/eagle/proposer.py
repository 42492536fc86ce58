"""Draft trees with EAGLE heads, which continue the target's features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import require_known
from speclm.drafting.beam import grow, reads_levels
from speclm.drafting.interface import Draft, Prefill, Proposer, TargetNeeds
from speclm.drafting.levels import (
    LevelBounds,
    RunByLevelConfig,
    options_with_tree,
    planned,
    require_ranks,
)
from speclm.drafting.ranking import LevelRanking, Nodes, path_expansions
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.context import EagleContext
from speclm.methods.eagle.network import EagleHeads, LevelRun
from speclm.methods.eagle.stages import StagedRun
from speclm.sampling.draws import DraftSampler, DraftSampling
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures, TargetView
from speclm.tree.dynamic import FilledTree, GrownRow, GrownRows, drawn_paths
from speclm.tree.static import RankPaths


@dataclass(frozen=True, slots=True)
class EagleProposerConfig(RunByLevelConfig):
    """Settings of `EagleProposer`; each level costs one run of the heads.

    Args:
        branches: Children considered for each expanded node.
        min_probability: Nodes less likely than this are not verified.
        min_confidence: A row stops when none of its paths is this likely.
    """

    branches: int = 3
    min_probability: float = 0.06
    min_confidence: float = 0.3


class EagleProposer(Proposer):
    """Grows a tree with a small decoder that continues the target's own hidden states.

    Committed positions of the heads' cache are computed from the target's features; positions
    computed from draft tokens are dropped in every round.

    Source: Li et al. 2024 (EAGLE-2), Li et al. 2025 (EAGLE-3).
    """

    fills_static_trees = True
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT
    config: EagleProposerConfig

    def __init__(
        self,
        heads: EagleHeads,
        *,
        target: PreTrainedModel,
        tree: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        """Wrap trained heads.

        Args:
            heads: Heads trained on the target, on its device. Their weights must not change.
            target: The model that verifies.
            tree: Name of a preset, the number of children at each depth, or paths of ranks;
                `num_draft_tokens` keeps the first nodes by depth. None grows trees by
                probability.
            **options: Fields of `EagleProposerConfig`.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If an option is unknown or out of range, a rank exceeds the heads'
                vocabulary, or they have another width.
            TopologyError: If `tree` is not a tree.
            UnsupportedModelError: If the target lacks the layers whose features are read, or its
                embeddings are quantised or offloaded and the heads have none of their own.
        """
        require_known(EagleProposerConfig, options, owner="EagleProposer")
        if tree is not None:
            options = options_with_tree(tree, options)
        self.config = EagleProposerConfig(**options)
        if self.config.paths is not None:
            require_ranks(self.config.paths, heads.config.draft_vocab_size)
        self.heads, self.view = heads.fuse_(), TargetView(target)
        wanted = heads.config
        _require_match(wanted, self.view)
        if heads.embed_tokens is None:
            _ = self.view.embedding_weight  # raises if the target's cannot be read
        self.num_ranks = wanted.draft_vocab_size
        is_eagle3 = wanted.kind == "eagle3"
        self._features = (
            TargetFeatures(wanted.layers_to_read(self.view.num_layers))
            if is_eagle3
            else TargetFeatures.LAST_HIDDEN
        )
        self.needs = TargetNeeds(
            vocab_size=wanted.vocab_size, hidden_size=wanted.target_hidden_size, model=target
        )
        self._ranking = LevelRanking(self.config.mixture, vocab_size=wanted.vocab_size)
        self._context = EagleContext(self.heads, self.view)
        self._grown: GrownRows = list[GrownRow]()
        self._sampler: DraftSampler | None = None
        self._bounds: LevelBounds | None = None
        self._leaf_tokens: frozenset[int] = frozenset()  # tokens that end a row

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # the heads decide
        return self._features

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
            return self._fill(roots, config.paths, noise)
        draft, self._grown = self._grow(roots, config, noise, num_ranks=num_ranks)
        return draft

    @property
    def _num_branches(self) -> int:
        return min(self.config.branches, self.heads.config.draft_vocab_size)

    @override
    def commit(self, accepted: Accepted) -> None:
        self._context.commit(accepted)
        self._ranking.learn(accepted, path_expansions(accepted, self._grown))
        assert self._bounds is not None, "commit before begin"
        self._bounds.commit(accepted.emitted)

    def _grow(
        self,
        roots: Int[Tensor, " batch"],
        config: EagleProposerConfig,
        noise: PositionNoise | None,
        *,
        num_ranks: int | None,
    ) -> tuple[Draft, GrownRows]:
        """Draft level by level from the most likely nodes; tokens are the target's ids.

        Args:
            roots: Root of each row.
            config: Size of the trees.
            noise: Noise of the positions.
            num_ranks: Children that are ranked by the heads' probabilities; None if more decides.
        """
        assert self._bounds is not None
        reads = reads_levels(self.plan, roots.device)
        bounds = self._bounds.levels(config.depth, reads=reads, least=config.min_confidence)
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
            vocabulary=self.heads,
        )

    def _fill(
        self, roots: Int[Tensor, " batch"], paths: RankPaths, noise: PositionNoise | None
    ) -> Draft:
        """Fill a static tree with the best candidates below each node."""
        tree = FilledTree(paths, roots=roots)
        run = self._context.start(tree.widths[1:])
        while True:
            nodes = (tree.expanded_tokens, tree.expanded_parents)
            ranked = self._rank(run, tree.depth, noise, nodes)
            tree.fill(self.heads.target_ids(ranked.topk(tree.num_ranks).indices))
            if tree.is_full:
                self._grown = [GrownRow([], [], tree.expansions, [])] * len(roots)
                return Draft(tokens=tree.tokens, topology=tree.topology)
            run.below(tree.expanded_tokens, tree.expanded_parents)

    def _draw(
        self, roots: Int[Tensor, " batch"], config: EagleProposerConfig, sampler: DraftSampler
    ) -> Draft:
        """Draw the children in a static tree, level by level."""
        paths = config.paths or drawn_paths(
            width=config.width,
            branches=min(config.branches, self.heads.config.draft_vocab_size),
            depth=config.depth,
            num_nodes=config.num_draft_tokens,
        )
        tree = FilledTree(paths, roots=roots, are_drawn=True)
        run = self._context.start(tree.widths[1:])
        distributions: Tensor | None = None
        while True:
            spread = self.heads.spread(run.logits)
            distribution = sampler.distribution(spread)  # [batch, width, vocab]
            if distributions is None:
                distributions = distribution.new_zeros(*tree.tokens.shape, distribution.shape[2])
            distributions.index_copy_(1, tree.expanded_nodes, distribution)
            tree.fill(sampler.siblings(distribution, num=tree.num_ranks))
            if tree.is_full:
                self._grown = [GrownRow([], [], tree.expansions, [])] * len(roots)
                return Draft(tree.tokens, tree.topology, distributions=distributions)
            run.below(tree.expanded_tokens, tree.expanded_parents)

    def _rank(
        self,
        run: LevelRun | StagedRun,
        depth: int,
        noise: PositionNoise | None,
        nodes: Nodes,
    ) -> Float[Tensor, "batch nodes draft_vocab"]:
        return self._ranking.rank(
            run.logits,
            depth=depth,
            noise=noise,
            columns=self.heads.draft_columns,
            nodes=nodes,
        )


def _require_match(wanted: EagleConfig, view: TargetView) -> None:
    if wanted.vocab_size != view.vocab_size:
        raise VocabularyMismatchError(
            f"EAGLE heads have a vocabulary of {wanted.vocab_size}, the target {view.name} one of "
            f"{view.vocab_size}; use heads that were trained on it"
        )
    if wanted.target_hidden_size != view.hidden_size:
        raise OptionError(
            f"EAGLE heads read features of width {wanted.target_hidden_size}, those of {view.name} "
            f"are {view.hidden_size} wide; use heads that were trained on it"
        )
