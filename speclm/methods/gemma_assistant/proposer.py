"""Draft trees with the assistants of Gemma 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.cache.tree_cache import TreeCache
from speclm.config import require_known
from speclm.devices import upload
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
from speclm.errors import UnsupportedModelError
from speclm.methods.gemma_assistant.checkpoint import num_assistant_tokens, require_match
from speclm.methods.gemma_assistant.network import AssistantNetwork, LevelRun
from speclm.sampling.draws import DraftSampler, DraftSampling
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures, TargetView
from speclm.tree.dynamic import FilledTree, GrownRow, GrownRows, drawn_paths
from speclm.tree.static import RankPaths
from speclm.tree.topology import chain


@dataclass(frozen=True, slots=True)
class GemmaAssistantConfig(RunByLevelConfig):
    """Settings of `GemmaAssistantProposer`; each level costs one run of the assistant.

    Args:
        depth: Maximum levels of the tree; by default `num_draft_tokens`.
        num_draft_tokens: Maximum nodes; by default the assistant's own ``num_assistant_tokens``.
    """

    depth: int = 8
    num_draft_tokens: int = 8


class GemmaAssistantProposer(Proposer):
    """Grows a tree with a small model that reads the target's keys and values.

    It has no cache of its own, so it costs nothing at the prompt and nothing while drafts pause.
    All nodes of a draft are computed as if they were at the position of the root.

    Source: ``SinglePositionMultiTokenCandidateGenerator`` of Transformers, which drafts chains for
    one row.
    """

    features = TargetFeatures.LAST_HIDDEN
    fills_static_trees = True
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT
    config: GemmaAssistantConfig

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        target: PreTrainedModel,
        tree: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        """Wrap a loaded assistant.

        Args:
            model: A Gemma 4 assistant of Transformers.
            target: The Gemma 4 model that verifies.
            tree: Name of a preset, the number of children at each depth, or paths of ranks;
                `num_draft_tokens` keeps the first nodes by depth. None grows trees by
                probability.
            **options: Fields of `GemmaAssistantConfig`.

        Raises:
            UnsupportedModelError: If the target is no Gemma 4.
            VocabularyMismatchError: If the assistant was made for another vocabulary.
            OptionError: If an option is unknown or out of range, or the assistant was made for
                another target.
            CheckpointError: If its clusters do not hold each token once.
            TopologyError: If `tree` is not a tree.
        """
        require_known(GemmaAssistantConfig, options, owner="GemmaAssistantProposer")
        self.view = TargetView(target)
        layers = require_match(model, self.view)
        if tree is not None:
            options = options_with_tree(tree, options)
        options.setdefault("num_draft_tokens", num_assistant_tokens(model))
        options.setdefault("depth", options["num_draft_tokens"])
        self.config = GemmaAssistantConfig(**options)
        if self.config.paths is not None:
            require_ranks(self.config.paths, self.view.vocab_size)
        self.model = model
        self.network = AssistantNetwork(model, layers=layers)
        self.needs = TargetNeeds(
            vocab_size=self.view.vocab_size, hidden_size=self.view.hidden_size, model=target
        )
        self._ranking = LevelRanking(self.config.mixture)
        self._cache: ref[TreeCache] | None = None  # which is freed with the call
        self._hidden: Float[Tensor, "batch hidden"] | None = None  # that the roots come from
        self._grown: GrownRows = list[GrownRow]()
        self._sampler: DraftSampler | None = None
        self._bounds: LevelBounds | None = None
        self._leaf_tokens: frozenset[int] = frozenset()  # tokens that end a row

    @override
    def begin(self, prompt: Prefill) -> None:
        if prompt.cache is None:
            raise UnsupportedModelError(
                f"the target {self.view.name} gives no keys and values of committed tokens, "
                "expected one that verifies trees, because the assistant reads them; see "
                "self_check of the model, and use other heads"
            )
        features = prompt.features
        has_features = features is not None and features.shape[1] > 0
        self._cache = ref(prompt.cache)
        self._hidden = features[:, -1] if features is not None and has_features else None
        self._grown, self._sampler = [], prompt.sampler
        self._ranking.begin(prompt)
        self._bounds = LevelBounds(prompt)
        self._leaf_tokens = prompt.eos_token_ids

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        if self._hidden is None or self._committed.tree_start == 0:
            self._grown = [GrownRow([], [], [], []) for _ in roots.tolist()]
            return Draft(roots[:, None], chain(0, device=roots.device))
        config = self.config if self.plan is None else planned(self.config, self.plan)
        if self._sampler is not None:
            return self._draw(roots, config, self._sampler)
        if config.paths is not None:
            return self._fill(roots, config.paths, noise)
        draft, self._grown = self._grow(roots, config, noise)
        return draft

    @override
    def commit(self, accepted: Accepted) -> None:
        assert accepted.features is not None
        assert self._bounds is not None, "commit before begin"
        self._follow(accepted.features, [len(emitted) for emitted in accepted.emitted])
        self._ranking.learn(accepted, path_expansions(accepted, self._grown))
        self._bounds.commit(accepted.emitted)

    def _follow(self, features: Float[Tensor, "batch path hidden"], num_emitted: list[int]) -> None:
        """Keep the hidden state that each row's last token was chosen from."""
        most = max(num_emitted)
        if most == 0:
            return
        if min(num_emitted) == most:
            self._hidden = features[:, most - 1]
            return
        sent = upload(num_emitted, features.device)[:, None]
        last = (sent - 1).clamp_(min=0)[:, :, None].expand(-1, -1, features.shape[2])
        newest = features.gather(1, last)[:, 0]
        before = newest if self._hidden is None else self._hidden
        self._hidden = torch.where(sent > 0, newest, before)

    def _start(self, roots: Int[Tensor, " batch"]) -> LevelRun:
        """Return a run that has computed the roots."""
        assert self._hidden is not None
        embed, seen = self.view.model.get_input_embeddings(), self.network.read(self._committed)
        return LevelRun(self.network, embed, seen, roots=roots, hidden=self._hidden)

    @property
    def _committed(self) -> TreeCache:
        cache = None if self._cache is None else self._cache()
        assert cache is not None, "propose outside a generation"
        return cache

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_cache": None}  # that of a call, which a copy has no part in

    def _grow(
        self,
        roots: Int[Tensor, " batch"],
        config: GemmaAssistantConfig,
        noise: PositionNoise | None,
    ) -> tuple[Draft, GrownRows]:
        """Draft level by level from the most likely nodes."""
        assert self._bounds is not None
        depth = min(config.depth, config.num_draft_tokens)
        reads = reads_levels(self.plan, roots.device)
        bounds = self._bounds.levels(depth, reads=reads, least=config.min_confidence)
        num_children = min(config.branches, self.view.vocab_size)
        run = self._start(roots) if max(bounds) else None

        def candidates(nodes: Nodes, level: int) -> tuple[Tensor, Tensor]:
            """Return log-probabilities and tokens, ``[batch, width, ranks]``, below some nodes."""
            assert run is not None, "no level may be drafted"
            if level:
                run.below(*nodes)
            ranked = self._ranking.rank(run.logits, depth=level, noise=noise, nodes=nodes)
            found = ranked.topk(num_children, dim=-1)
            return found.values, found.indices

        return grow(
            candidates,
            roots,
            config=config,
            bounds=bounds,
            reads=reads,
            leaf_tokens=self._leaf_tokens,
        )

    def _fill(
        self, roots: Int[Tensor, " batch"], paths: RankPaths, noise: PositionNoise | None
    ) -> Draft:
        """Fill a static tree with the best candidates below each node."""
        tree, run = FilledTree(paths, roots=roots), self._start(roots)
        while True:
            nodes = (tree.expanded_tokens, tree.expanded_parents)
            ranked = self._ranking.order(run.logits, depth=tree.depth, noise=noise, nodes=nodes)
            tree.fill(ranked.topk(tree.num_ranks, dim=-1).indices)
            if tree.is_full:
                self._grown = [GrownRow([], [], tree.expansions, [])] * len(roots)
                return Draft(tokens=tree.tokens, topology=tree.topology)
            run.below(tree.expanded_tokens, tree.expanded_parents)

    def _draw(
        self, roots: Int[Tensor, " batch"], config: GemmaAssistantConfig, sampler: DraftSampler
    ) -> Draft:
        """Draw the children in a static tree, level by level."""
        paths = config.paths or drawn_paths(
            width=config.width,
            branches=min(config.branches, self.view.vocab_size),
            depth=config.depth,
            num_nodes=config.num_draft_tokens,
        )
        tree = FilledTree(paths, roots=roots, are_drawn=True)
        run, distributions = self._start(roots), None
        while True:
            distribution = sampler.distribution(run.logits)  # [batch, width, vocab]
            if distributions is None:
                distributions = distribution.new_zeros(*tree.tokens.shape, distribution.shape[2])
            distributions.index_copy_(1, tree.expanded_nodes, distribution)
            tree.fill(sampler.siblings(distribution, num=tree.num_ranks))
            if tree.is_full:
                self._grown = [GrownRow([], [], tree.expansions, [])] * len(roots)
                return Draft(tree.tokens, tree.topology, distributions=distributions)
            run.below(tree.expanded_tokens, tree.expanded_parents)
