"""Draft trees with block heads, which draft a whole block in one pass."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import require_known
from speclm.devices import is_host
from speclm.drafting.interface import Draft, Prefill, Proposer, TargetNeeds
from speclm.drafting.levels import (
    LevelBounds,
    assemble,
    options_with_tree,
    planned,
    require_ranks,
)
from speclm.drafting.ranking import LevelRanking, path_expansions
from speclm.engines import Engine
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.context import BlockContext
from speclm.methods.block.layer import MarkovTerms
from speclm.methods.block.network import BlockHeads
from speclm.methods.block.stages import BlockStages, positions_of
from speclm.methods.block.tree import (
    BlockLogits,
    BlockProposerConfig,
    choose_nodes,
    draw_tree,
    enclosing_tree_of,
    fill_tree,
    grow_trees,
)
from speclm.sampling.draws import DraftSampler, DraftSampling
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures, TargetView
from speclm.tree.dynamic import FilledTree, GrownRow, drawn_paths
from speclm.tree.enclosing import EnclosingTree
from speclm.tree.plan import TreePlan
from speclm.tree.static import RankPaths, normalize_paths, trim_paths
from speclm.tree.topology import TreeTopology, chain

_log = logging.getLogger("speclm")


class BlockProposer(Proposer):
    """Drafts a block of tokens in one pass, and makes a tree of their distributions.

    The heads' keys and values of committed tokens are computed once, from the target's features;
    those of a block are dropped after its pass. With a Markov head, the distribution of a node's
    children depends on its token. Without one it is the same for all nodes of a level.

    Source: Chen et al. 2026 (DFlash); the code of DSpark and JetSpec.
    """

    fills_static_trees = True
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT
    config: BlockProposerConfig

    def __init__(
        self,
        heads: BlockHeads,
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
                `num_draft_tokens` keeps the first nodes by depth. Levels beyond the heads' block
                are dropped, with a log line. None grows trees by probability.
            **options: Fields of `BlockProposerConfig`.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If an option is unknown or out of range, a rank exceeds the heads'
                vocabulary, or they have another width.
            TopologyError: If `tree` is not a tree.
            UnsupportedModelError: If the target lacks the layers whose features are read, or its
                embeddings are quantised or offloaded and the heads have none of their own.
        """
        wanted = heads.config
        require_known(BlockProposerConfig, options, owner="BlockProposer")
        if tree is not None:
            paths = _within_block(normalize_paths(tree), wanted.num_drafts)
            options = options_with_tree(paths, options)
        self.config = BlockProposerConfig(**{"depth": wanted.num_drafts, **options})
        _require_drafted(self.config, wanted)
        self.heads, self.view = heads.fuse_(), TargetView(target)
        _require_match(wanted, self.view)
        if heads.embed_tokens is None:
            _ = self.view.embedding_weight  # raises if the target's cannot be read
        self.num_ranks = wanted.draft_vocab_size
        self._features = TargetFeatures(wanted.layers_to_read(self.view.num_layers))
        self.needs = TargetNeeds(
            vocab_size=wanted.vocab_size, hidden_size=wanted.hidden_size, model=target
        )
        self._ranking = LevelRanking(self.config.mixture, vocab_size=wanted.vocab_size)
        self._terms: MarkovTerms | None = None
        self._grown: list[GrownRow] = []
        self._choice: tuple[TreeTopology, EnclosingTree] | None = None  # the last draft
        self._prompt: Prefill | None = None  # until its features are read
        self._context: BlockContext | None = None
        self._unseen: list[tuple[Tensor, list[int]]] = []  # features of rounds, and their numbers
        self._batch = 0
        self._kept: BlockStages | None = None  # for the next call with its engine
        self._stages: BlockStages | None = None  # those of this call
        self._bounds: LevelBounds | None = None
        self._leaf_tokens: frozenset[int] = frozenset()  # tokens that end a row
        self._sampler: DraftSampler | None = None

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # the heads decide
        return self._features

    @override
    def begin(self, prompt: Prefill) -> None:
        self._prompt, self._context, self._sampler = prompt, None, prompt.sampler
        self._ranking.begin(prompt)
        self._grown, self._choice = [], None
        self._unseen, self._batch = [], len(prompt.first_tokens)
        engine = None if is_host(prompt.tokens.device) else prompt.engine
        self._stages = None if engine is None else self._staged(engine)
        self._bounds = LevelBounds(prompt)
        self._leaf_tokens = prompt.eos_token_ids

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        config = _planned(self.config, self.plan, max_depth=self.heads.config.num_drafts)
        assert self._bounds is not None, "propose before begin"
        levels = self._bounds.within(config.depth)
        depth = max(levels)
        if depth < 1:
            self._catch_up()
            self._grown = [GrownRow([], [], [], [])] * len(roots)
            return Draft(roots[:, None], chain(0, device=roots.device))
        is_chosen = not is_host(roots.device) and config.paths is None and self._sampler is None
        if is_chosen and noise is None and self._stages is not None:
            draft = self._run_stage(roots, config, self._stages)
            if draft is not None:
                return draft
        logits = self._run(roots, self._catch_up(), config.depth if is_chosen else depth)
        if is_chosen:
            return self._choose(logits, roots, config, noise)
        if self._sampler is not None:
            paths = config.paths or drawn_paths(
                width=config.width,
                branches=min(config.branches, self.heads.config.draft_vocab_size),
                depth=depth,
                num_nodes=config.num_draft_tokens,
            )
            drawn, distributions = draw_tree(
                logits, roots, trim_paths(paths, max_depth=depth), sampler=self._sampler
            )
            return self._static(drawn, distributions)
        if config.paths is not None:
            paths = trim_paths(config.paths, max_depth=depth)
            return self._static(fill_tree(logits, roots, paths, ranking=self._ranking, noise=noise))
        self._grown = grow_trees(
            logits,
            roots,
            config=config,
            ranking=self._ranking,
            noise=noise,
            levels=levels,
            leaf_tokens=self._leaf_tokens,
        )
        return assemble(self._grown, roots)

    @override
    def commit(self, accepted: Accepted) -> None:
        self._know_choice()
        expansions = path_expansions(accepted, self._grown) if self._grown else []
        self._ranking.learn(accepted, expansions)
        assert self._bounds is not None, "commit before begin"
        assert accepted.features is not None
        counts = [len(emitted) for emitted in accepted.emitted]
        if any(counts):
            self._unseen.append((accepted.features, counts))
        self._bounds.commit(accepted.emitted)

    def _staged(self, engine: Engine) -> BlockStages:
        """Return the stages of an engine, new ones for other weights."""
        before = self._kept
        if before is not None:
            if before.serves(engine):
                return before
            before.close()
        self._kept = BlockStages(self.heads, self.view, engine)
        return self._kept

    def _catch_up(self) -> BlockContext:
        """Add what was committed since the last draft to the context, at first the prompt."""
        context = self._begun()
        features, counts = self._take_unseen()
        if features is not None:
            context.append(features, counts)
        return context

    def _begun(self) -> BlockContext:
        """Return the context, which has the prompt but not what was committed since."""
        if self._context is None:
            assert self._prompt is not None, "propose before begin"
            self._context = self._read(self._prompt)
            self._prompt = None
        return self._context

    def _take_unseen(self) -> tuple[Float[Tensor, "batch seq features"] | None, list[int]]:
        """Return the features since the last draft, and how many each row has."""
        rounds, self._unseen = self._unseen, []
        if not rounds:
            return None, [0] * self._batch
        if len(rounds) == 1:
            return rounds[0]
        counts = [sum(own) for own in zip(*(own for _, own in rounds), strict=True)]
        joined = rounds[0][0].new_zeros(len(counts), max(counts), rounds[0][0].shape[2])
        for row, count in enumerate(counts):
            parts = [features[row, : own[row]] for features, own in rounds]
            joined[row, :count] = torch.cat(parts)
        return joined, counts

    def _run_stage(
        self, roots: Int[Tensor, " batch"], config: BlockProposerConfig, stages: BlockStages
    ) -> Draft | None:
        """Return a draft by the engine of the call; None if it cannot be run."""
        if config.min_acceptance > 0 or self._ranking.changes_scores:
            return None
        if stages.obstacle is not None:
            return None
        context, (features, counts) = self._begun(), self._take_unseen()
        if features is not None and features.shape[1] > config.depth + 1:  # of several rounds
            context.append(features, counts)
            features, counts = None, [0] * len(counts)
        inputs = stages.inputs(context, features, counts, roots, depth=config.depth)
        stage = stages.stage_of(config, depth=config.depth)
        if stage is not None:
            chosen = stages.draft(stage, inputs, context)
            if chosen is not None:
                context.advance(counts)
                self._grown, self._choice = [], None
                return Draft(chosen.tokens, chosen.topology())
        if features is not None:
            context.append(features, counts)
        logits = self._run(roots, context, config.depth)
        if stage is None:
            stages.prove(config, inputs, context, logits.hidden)
        return self._choose(logits, roots, config, None)

    def _read(self, prompt: Prefill) -> BlockContext:
        features = prompt.features
        assert features is not None
        length = features.shape[1]  # only the last positions if a cache held the first ones
        first = prompt.tokens.shape[1] - length - prompt.num_padding
        # Once a generation: the context is addressed from the host.
        context = BlockContext(
            self.heads,
            first_positions=first.tolist(),
            allocate=None if self._stages is None else self._stages.allocate,
        )
        context.append(features, [length] * len(first))
        return context

    def _run(
        self, roots: Int[Tensor, " batch"], context: BlockContext, num_drafts: int
    ) -> BlockLogits:
        """Run the heads over a block; if it is causal, only as far as it is needed."""
        heads, num_positions = self.heads, positions_of(self.heads, num_drafts)
        keys, values = context.with_room(num_positions)
        hidden: Tensor = heads(
            heads.embed_blocks(
                roots[:, None], num_positions=num_positions, embedding=self.view.stored_embeddings
            ),
            context.rotation(num_positions),
            keys,
            values,
            context.masks(num_positions),
            has_room=True,
        )
        if num_drafts < hidden.shape[1]:
            hidden = hidden[:, :num_drafts]
        logits = heads.logits(hidden, lm_head=self.view.head_logits)
        return BlockLogits(heads, hidden, logits, terms=self._kept_terms(roots.device))

    def _kept_terms(self, device: torch.device) -> MarkovTerms | None:
        """Return the terms of tokens met before; None where reading tokens takes longer."""
        markov = self.heads.markov_head
        if markov is None or markov.kind != "vanilla" or not is_host(device):
            return None
        if self._terms is None or not self._terms.is_current:
            self._terms = MarkovTerms(markov)
        return self._terms

    def _choose(
        self,
        logits: BlockLogits,
        roots: Int[Tensor, " batch"],
        config: BlockProposerConfig,
        noise: PositionNoise | None,
    ) -> Draft:
        """Return the likeliest nodes, chosen on the device."""
        tree = enclosing_tree_of(config, self.heads, depth=config.depth, device=roots.device)
        chosen = choose_nodes(
            logits, roots, tree, config=config, ranking=self._ranking, noise=noise
        )
        topology = chosen.topology(is_labelled=noise is not None)
        # Only with noise does the ranking learn.
        self._grown, self._choice = [], None if noise is None else (topology, tree)
        return Draft(chosen.tokens, topology)

    def _know_choice(self) -> None:
        """Note where the nodes of a draft were expanded, if the ranking learns from it."""
        if self._choice is None:
            return
        topology, tree = self._choice
        self._choice = None
        # The host was told them together with the round's result.
        for nodes in topology.host_labels:
            expansions = [tree.expansions[node - 1] for node in nodes[1:]]
            self._grown.append(GrownRow([], [], expansions, []))

    def _static(self, tree: FilledTree, distributions: Tensor | None = None) -> Draft:
        self._grown = [GrownRow([], [], tree.expansions, [])] * len(tree.tokens)
        return Draft(tokens=tree.tokens, topology=tree.topology, distributions=distributions)


@lru_cache(maxsize=64)
def _planned(
    config: BlockProposerConfig, plan: TreePlan | None, *, max_depth: int
) -> BlockProposerConfig:
    """Return the settings of the next drafts; a plan overrides those of the config."""
    if plan is None:
        return config
    found: BlockProposerConfig = planned(config, plan)
    paths = found.paths and trim_paths(found.paths, max_depth=max_depth)
    return replace(found, depth=min(found.depth, max_depth), paths=paths)


def _within_block(paths: RankPaths, num_drafts: int) -> RankPaths:
    """Cut a tree at the end of the heads' block."""
    trimmed = trim_paths(paths, max_depth=num_drafts)
    if len(trimmed) < len(paths):
        _log.warning(
            "tree is deeper than the %d tokens of a block; %d of its %d nodes are left out",
            num_drafts,
            len(paths) - len(trimmed),
            len(paths),
        )
    return trimmed


def _require_drafted(config: BlockProposerConfig, wanted: BlockConfig) -> None:
    if config.depth > wanted.num_drafts:
        raise OptionError(
            f"depth is {config.depth}, the block heads draft {wanted.num_drafts} tokens; lower it"
        )
    if config.min_acceptance > 0 and not wanted.has_confidence:
        raise OptionError(
            f"min_acceptance is {config.min_acceptance}, which only a confidence head estimates, "
            "found block heads without one; leave it out"
        )
    if config.paths is not None:
        require_ranks(config.paths, wanted.draft_vocab_size)


def _require_match(wanted: BlockConfig, view: TargetView) -> None:
    if wanted.vocab_size != view.vocab_size:
        raise VocabularyMismatchError(
            f"block heads have a vocabulary of {wanted.vocab_size}, the target {view.name} one of "
            f"{view.vocab_size}; use heads that were trained on it"
        )
    if wanted.hidden_size != view.hidden_size:
        raise OptionError(
            f"block heads read features of width {wanted.hidden_size}, those of {view.name} are "
            f"{view.hidden_size} wide; use heads that were trained on it"
        )
