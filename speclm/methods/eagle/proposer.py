"""Draft trees with EAGLE heads, which continue the target's features."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.attention import TreeStep
from speclm.cache.tree_cache import TreeCache
from speclm.config import require_known
from speclm.drafting.beam import grow, reads_levels
from speclm.drafting.decoder_parts import CausalMasks
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
from speclm.methods.eagle.network import EagleHeads, LevelRun
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
        self._causal = CausalMasks()
        self._grown: GrownRows = list[GrownRow]()
        self._prompt: Prefill | None = None
        self._cache: TreeCache | None = None
        self._unseen_tokens: list[list[int]] = []
        self._unseen_features: list[list[Tensor]] = []
        self._hidden: Tensor | None = None  # at the position before each root
        self._bounds: LevelBounds | None = None
        self._leaf_tokens: frozenset[int] = frozenset()  # tokens that end a row

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # the heads decide
        return self._features

    @override
    def begin(self, prompt: Prefill) -> None:
        self._prompt, self._cache, self._hidden = prompt, None, None
        self._ranking.begin(prompt)
        batch = len(prompt.first_tokens)
        self._unseen_tokens = [[] for _ in range(batch)]
        self._unseen_features = [[] for _ in range(batch)]
        self._bounds = LevelBounds(prompt)
        self._leaf_tokens = prompt.eos_token_ids

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        assert self._prompt is not None, "propose before begin"
        if self._cache is None:
            self._cache = self._read(self._prompt)
        self._catch_up(roots.device)
        config = self.config if self.plan is None else planned(self.config, self.plan)
        if self._prompt.sampler is not None:
            return self._draw(roots, config, self._prompt.sampler)
        if config.paths is not None:
            return self._fill(roots, config.paths, noise)
        draft, self._grown = self._grow(roots, config, noise)
        return draft

    @override
    def commit(self, accepted: Accepted) -> None:
        if self._cache is not None:
            self._cache.keep([[] for _ in accepted.emitted])  # of draft tokens
        self._ranking.learn(accepted, path_expansions(accepted, self._grown))
        assert self._bounds is not None, "commit before begin"
        assert accepted.features is not None
        for row, emitted in enumerate(accepted.emitted):
            if emitted:
                self._unseen_tokens[row] += emitted
                self._unseen_features[row].append(accepted.features[row, : len(emitted)])
        self._bounds.commit(accepted.emitted)

    def _read(self, prompt: Prefill) -> TreeCache:
        """Run the heads over the prompt's features, each joined with the token after it."""
        features = prompt.features
        assert features is not None
        following = torch.cat([prompt.tokens[:, 1:], prompt.first_tokens[:, None]], dim=1)
        length = features.shape[1]  # only the last positions if a cache held the first ones
        padding = (prompt.num_padding - (prompt.tokens.shape[1] - length)).clamp(min=0)
        cache = TreeCache(num_layers=self.heads.config.num_layers, num_padding=padding)
        self._hidden = None
        if length > 0:
            indices = torch.arange(length, device=padding.device)
            visible = (indices[:, None] >= indices) & (indices >= padding[:, None])[:, None]
            visible |= torch.eye(length, dtype=torch.bool, device=padding.device)
            hidden = self._run(
                following[:, -length:], self.heads.fuse(features), visible, indices[None], cache
            )
            cache.keep([list(range(length))] * len(padding))
            self._hidden = hidden[:, -1]
        return cache

    def _catch_up(self, device: torch.device) -> None:
        """Run the heads over the features of tokens committed since the last draft."""
        assert self._cache is not None
        counts = [len(tokens) for tokens in self._unseen_tokens]
        longest = max(counts)
        if longest == 0:
            return
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in self._unseen_tokens]
        tokens = torch.tensor(padded, device=device, dtype=torch.long)
        if len(counts) == 1 and not self._cache.has_padding:
            parts = self._unseen_features[0]
            self._hidden = self._read_row(tokens, parts[0] if len(parts) == 1 else torch.cat(parts))
        else:
            self._hidden = self._read_rows(tokens, counts)
        self._cache.keep([range(count) for count in counts])
        self._unseen_tokens = [[] for _ in counts]
        self._unseen_features = [[] for _ in counts]

    def _read_row(
        self, tokens: Int[Tensor, "1 new"], features: Float[Tensor, "new features"]
    ) -> Float[Tensor, "1 hidden"]:
        """Run the heads over new positions of the only row; return the last output."""
        cache, num_new, mask = self._cache, len(features), None
        assert cache is not None
        start = cache.tree_start
        if self.heads.config.sliding_window is None and num_new > 1:
            mask = self._causal.cut(num_new, num_cached=start, like=self.heads.fc.weight)
        cache.reserve(num_new)
        hidden: Tensor = self.heads(
            self.heads.fuse(features),
            self._embed(tokens[0]),
            rotation=self.heads.rotation_from(start, num_new),
            attention_mask=mask,
            past_key_values=cache,
            batch=1,
        )
        cache.append(num_new)
        return hidden[-1:]

    def _read_rows(
        self, tokens: Int[Tensor, "batch new"], counts: list[int]
    ) -> Float[Tensor, "batch hidden"]:
        """Run the heads over new positions; return the last output of each row."""
        assert self._cache is not None
        device, num_new = tokens.device, tokens.shape[1]
        width = self.heads.config.num_features * self.heads.config.target_hidden_size
        features = torch.zeros(len(counts), num_new, width, device=device, dtype=self.heads.dtype)
        for row, parts in enumerate(self._unseen_features):
            if parts:
                features[row, : counts[row]] = torch.cat(parts)
        hidden = self._run(
            tokens,
            self.heads.fuse(features),
            torch.ones(1, num_new, num_new, dtype=torch.bool, device=device).tril(),
            torch.arange(num_new, device=device)[None],
            self._cache,
        )
        last = torch.tensor(
            [max(count - 1, 0) for count in counts], device=device, dtype=torch.long
        )
        newest = hidden[torch.arange(len(counts), device=device), last]
        if self._hidden is None or min(counts) > 0:
            return newest
        is_new = torch.tensor([count > 0 for count in counts], device=device, dtype=torch.bool)
        return torch.where(is_new[:, None], newest, self._hidden)

    def _grow(
        self,
        roots: Int[Tensor, " batch"],
        config: EagleProposerConfig,
        noise: PositionNoise | None,
    ) -> tuple[Draft, GrownRows]:
        """Draft level by level from the most likely nodes; tokens are the target's ids."""
        assert self._bounds is not None
        reads = reads_levels(self.plan, roots.device)
        bounds = self._bounds.levels(config.depth, reads=reads, least=config.min_confidence)
        num_ranks = min(config.branches, self.heads.config.draft_vocab_size)
        widths = [min(config.width, num_ranks)]
        while len(widths) < max(bounds):
            widths.append(min(config.width, widths[-1] * num_ranks))
        run = self._start(widths[: max(max(bounds) - 1, 0)])

        def candidates(nodes: Nodes, level: int) -> tuple[Tensor, Tensor]:
            """Return log-probabilities and columns, ``[batch, width, ranks]``, below some nodes."""
            hidden = run.below(*nodes) if level else run.hidden
            found = self._rank(hidden, level, noise, nodes).topk(num_ranks, dim=-1)
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
        run = self._start(tree.widths[1:])
        while True:
            nodes = (tree.expanded_tokens, tree.expanded_parents)
            ranked = self._rank(run.hidden, tree.depth, noise, nodes)
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
        run = self._start(tree.widths[1:])
        distributions: Tensor | None = None
        while True:
            logits = self._logits(run.hidden, batch=len(roots))
            distribution = sampler.distribution(self.heads.spread(logits))  # [batch, width, vocab]
            if distributions is None:
                distributions = distribution.new_zeros(*tree.tokens.shape, distribution.shape[2])
            distributions.index_copy_(1, tree.expanded_nodes, distribution)
            tree.fill(sampler.siblings(distribution, num=tree.num_ranks))
            if tree.is_full:
                self._grown = [GrownRow([], [], tree.expansions, [])] * len(roots)
                return Draft(tree.tokens, tree.topology, distributions=distributions)
            run.below(tree.expanded_tokens, tree.expanded_parents)

    def _start(self, widths: list[int]) -> LevelRun:
        """Return a run of the heads from the roots, over levels of these widths."""
        assert self._cache is not None
        assert self._hidden is not None
        return LevelRun(
            self.heads,
            self._cache,
            hidden=self._hidden,
            widths=widths,
            embedding=partial(F.embedding, weight=self.view.embedding_weight),
        )

    def _run(
        self,
        tokens: Int[Tensor, "batch nodes"],
        hidden: Float[Tensor, "batch nodes hidden"],
        visible: Bool[Tensor, "rows nodes kv_len"],
        kv_depths: Int[Tensor, "depth_rows kv_len"],
        cache: TreeCache,
    ) -> Float[Tensor, "batch nodes hidden"]:
        """Run the heads over new nodes, which become pending."""
        num_nodes = tokens.shape[1]
        cache.reserve(num_nodes)
        first = cache.lengths - cache.num_padding
        positions = (first[:, None] + kv_depths[:, -num_nodes:]).clamp(min=0)
        step = TreeStep(visible, kv_depths, cache)
        output: Tensor = self.heads(
            hidden,
            self._embed(tokens),
            position_ids=positions.expand(len(tokens), -1),
            attention_mask=step.bias(self.heads.config.sliding_window, self.heads.dtype),
            past_key_values=cache,
        )
        cache.append(num_nodes)
        return output

    def _embed(self, tokens: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows hidden"]:
        return self.heads.embed(tokens, embedding=self.view.stored_embeddings)

    def _logits(
        self, hidden: Float[Tensor, "rows hidden"], *, batch: int
    ) -> Float[Tensor, "batch nodes draft_vocab"]:
        logits = self.heads.logits(hidden, lm_head=self.view.head_logits)
        return logits.view(batch, -1, logits.shape[1])

    def _rank(
        self,
        hidden: Float[Tensor, "rows hidden"],
        depth: int,
        noise: PositionNoise | None,
        nodes: Nodes,
    ) -> Float[Tensor, "batch nodes draft_vocab"]:
        return self._ranking.rank(
            self._logits(hidden, batch=len(nodes[0])),
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
