"""Draft chains or trees with a smaller language model."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.cache.tree_cache import TreeCache
from speclm.config import require_known
from speclm.devices import is_host, upload
from speclm.drafting.beam import grow, reads_levels
from speclm.drafting.interface import Draft, Prefill, Proposer, TargetNeeds
from speclm.drafting.levels import (
    LevelBounds,
    RunByLevelConfig,
    planned,
)
from speclm.drafting.ranking import LevelRanking, Nodes, path_expansions
from speclm.engines import Engine
from speclm.errors import VocabularyMismatchError
from speclm.methods.draft_model.network import DraftNetwork
from speclm.methods.draft_model.runs import LevelRun, ModelRun, NetworkRun
from speclm.methods.draft_model.stages import WIDTHS, Best, DraftStages, StagedRun
from speclm.methods.draft_model.structure import CurrentNetwork
from speclm.sampling.draws import DraftSampler, DraftSampling
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetView
from speclm.tree.dynamic import FilledTree, GrownRow, GrownRows, drawn_paths
from speclm.tree.static import RankPaths
from speclm.tree.topology import chain

MAX_PADDING = 512
"""Maximum difference between padded vocabularies of one tokenizer: published families pad weights
to a multiple of 512 or less."""

_MAX_PADDED_SHARE = 0.25  # otherwise small vocabularies of two tokenizers would seem padded


@dataclass(frozen=True, slots=True)
class SharedVocabulary:
    """Vocabularies of a draft model and its target; one of them may end with padding ids.

    Args:
        num_draft: Width of the draft model's logits.
        num_target: Width of the target's.
    """

    num_draft: int
    num_target: int

    @classmethod
    def of(cls, draft: TargetView, target: TargetView) -> "SharedVocabulary":
        """Compare two models.

        Raises:
            VocabularyMismatchError: If they differ by more than padding explains.
        """
        shared = cls(draft.vocab_size, target.vocab_size)
        difference = abs(shared.num_draft - shared.num_target)
        larger = max(shared.num_draft, shared.num_target)
        if difference > min(MAX_PADDING, _MAX_PADDED_SHARE * larger):
            raise VocabularyMismatchError(
                f"draft model {draft.name} has a vocabulary of {shared.num_draft}, the target "
                f"{target.name} one of {shared.num_target}, expected equal ones, or a difference "
                f"of at most {MAX_PADDING} ids and a quarter, which is padding; choose a draft "
                "model that shares the target's tokenizer"
            )
        return shared

    @property
    def num_shared(self) -> int:
        """Number of ids that both have."""
        return min(self.num_draft, self.num_target)

    def readable(self, tokens: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
        """Return tokens in which those that the draft model lacks are replaced by 0.

        This may make drafts worse but does not affect the output.
        """
        if self.num_draft >= self.num_target:
            return tokens
        return tokens.masked_fill(tokens >= self.num_draft, 0)

    def fit(self, logits: Float[Tensor, "*rows draft"]) -> Float[Tensor, "*rows target"]:
        """Return logits in the target's width, minus infinity at ids that the draft model lacks."""
        if self.num_draft >= self.num_target:
            return logits[..., : self.num_target]
        return pad(logits, (0, self.num_target - self.num_draft), value=float("-inf"))


@dataclass(frozen=True, slots=True)
class DraftModelConfig(RunByLevelConfig):
    """Settings of `DraftModelProposer`; a level costs one draft forward of the whole batch."""


class DraftModelProposer(Proposer):
    """Drafts a chain or a tree with a separate model and its own cache.

    The tree grows by one level per draft forward. Accepted tokens stay in the draft model's cache,
    so a round starts with the one or two tokens that it has not seen.

    If the acceptance rule needs drawn drafts, all trees of a call have one shape, made from
    depth, number of draft tokens, width and branches, and probabilities prune nothing.
    """

    fills_static_trees = True
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT
    config: DraftModelConfig

    def __init__(self, model: PreTrainedModel, *, target: PreTrainedModel, **options: Any) -> None:
        """Wrap a loaded draft model.

        Args:
            model: Any causal language model with the target's vocabulary; either may have padded
                it further.
            target: The model that verifies.
            **options: Fields of `DraftModelConfig`.

        Raises:
            VocabularyMismatchError: If the two vocabularies differ by more than padding.
            OptionError: If an option is unknown or out of range.
        """
        require_known(DraftModelConfig, options, owner="DraftModelProposer")
        self.config = DraftModelConfig(**options)
        self.view = TargetView(model)
        self._current = CurrentNetwork(self.view)
        self.network: DraftNetwork | None = None
        """Runs levels in place of the draft model's own forward, if it can; set by `begin`."""
        self._stages: DraftStages | None = None  # kept between generations
        self._staged: DraftStages | None = None  # those of this generation
        wanted = TargetView(target)
        self._vocabulary = SharedVocabulary.of(self.view, wanted)
        self.needs = TargetNeeds(vocab_size=wanted.vocab_size)
        self._cache: TreeCache | None = None
        self._prompt: Prefill | None = None  # until it is read
        self._prompt_logits: Tensor | None = None  # what follows the prompt, until it is used
        self._unseen: list[list[int]] = []
        self._bounds: LevelBounds | None = None
        self._is_silent = False
        self._ranking = LevelRanking(self.config.mixture)
        self._sampler: DraftSampler | None = None
        self._leaf_tokens: frozenset[int] = frozenset()  # tokens that end a row
        self._grown: GrownRows = list[GrownRow]()
        self._offsets: list[int] = []

    @property
    def obstacle(self) -> str | None:
        """Why the draft model's own forward runs the levels; None if a network does."""
        return self._current.obstacle

    @override
    def begin(self, prompt: Prefill) -> None:
        self._vocabulary = replace(self._vocabulary, num_draft=self.view.vocab_size)  # resized?
        self.network = self._current.look()
        # On a CPU, calling compiled code takes longer than a small model's calls.
        on_host = is_host(prompt.tokens.device)
        self._staged = self._prepare(None if on_host else prompt.engine)
        allocate = None if self._staged is None else self._staged.allocate
        self._cache = self.view.new_cache(prompt.num_padding, allocate=allocate)
        self._prompt_logits = None
        length, bound = prompt.tokens.shape[1] + 1, self.view.max_positions
        self._is_silent = bound is not None and length > bound  # beyond the learned positions
        self._prompt = None if self._is_silent else prompt  # read by the first draft, if any
        # The draft model works on the host between levels, so one more sync costs nothing.
        self._unseen = [[token] for token in prompt.first_tokens.tolist()]
        self._ranking.begin(prompt)
        self._sampler = prompt.sampler
        self._leaf_tokens = prompt.eos_token_ids
        self._bounds = LevelBounds(prompt)
        self._grown, self._offsets = [], []

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        assert self._cache is not None, "propose before begin"
        if self._prompt is not None:
            self._read(self._prompt, self._cache)
            self._prompt = None
        config = self.config if self.plan is None else planned(self.config, self.plan)
        paths = config.paths
        longest = max(map(len, self._unseen))
        bound = self.view.max_positions
        deepest = self._cache.tree_start + longest + config.depth
        if self._is_silent or (bound is not None and deepest > bound):
            self._grown = [GrownRow([], [], [], []) for _ in self._unseen]
            return Draft(roots[:, None], chain(0, device=roots.device))
        if self._sampler is not None and paths is None:
            paths = drawn_paths(
                width=config.width,
                branches=min(config.branches, self._vocabulary.num_shared),
                depth=config.depth,
                num_nodes=config.num_draft_tokens,
            )
        if paths is not None:
            return self._fill(roots, paths, noise)
        draft, self._grown = self._grow(roots, noise, config)
        return draft

    @override
    def commit(self, accepted: Accepted) -> None:
        assert self._cache is not None, "commit before begin"
        assert self._bounds is not None
        kept: list[list[int]] = []
        expansions = path_expansions(accepted, self._grown)
        for row, (path, emitted) in enumerate(zip(accepted.paths, accepted.emitted, strict=True)):
            if not path or not self._offsets:
                kept.append([])
                self._unseen[row] += emitted
                continue
            nodes = [self._offsets[e[0]] + e[1] for e in expansions[row] if e is not None]
            nodes = [node for node in nodes if node < self._cache.num_pending]
            kept.append([*range(len(self._unseen[row])), *nodes])
            self._unseen[row] = emitted[len(nodes) :]
        if self._prompt is None:
            self._cache.keep(kept)
        self._bounds.commit(accepted.emitted)
        self._prompt_logits, self._offsets = None, []
        self._ranking.learn(accepted, expansions)

    def _prepare(self, engine: Engine | None) -> DraftStages | None:
        """Return the stages of a generation, if it has some; drop those of another network."""
        stages, network = self._stages, self.network
        is_other = stages is not None and engine is not None and stages.engine is not engine
        if stages is not None and (stages.network is not network or is_other):
            stages.close()
            self._stages = stages = None
        if engine is None or network is None:
            return None
        if stages is None:
            self._stages = stages = DraftStages(network, engine)
        return stages if stages.obstacle is None else None

    def _read(self, prompt: Prefill, cache: TreeCache) -> None:
        """Run the prompt, whose last tokens are the first roots."""
        tokens = torch.cat([prompt.tokens, prompt.first_tokens[:, None]], dim=1)
        length = tokens.shape[1]
        indices = torch.arange(length, device=tokens.device)
        is_token = indices >= prompt.num_padding[:, None]
        mask = is_token.long() if cache.has_padding else None
        logits = self._vocabulary.fit(
            self.view.prefill(self._vocabulary.readable(tokens), cache, attention_mask=mask)
        )
        cache.split(length - 1, num_pending=1)  # as if only the roots were unseen
        if all(len(row) == 1 for row in self._unseen):
            self._prompt_logits = logits[:, None]
        else:  # rounds without a draft came first
            cache.keep([[] for _ in self._unseen])

    def _grow(
        self,
        roots: Int[Tensor, " batch"],
        noise: PositionNoise | None,
        config: DraftModelConfig,
    ) -> tuple[Draft, GrownRows]:
        """Feed the unseen tokens, then one level after another."""
        assert self._cache is not None
        assert self._bounds is not None
        cache, depth = self._cache, min(config.depth, config.num_draft_tokens)
        reads = reads_levels(self.plan, roots.device)
        bounds = self._bounds.levels(depth, reads=reads, least=config.min_confidence)
        best = self._best(noise, num_ranks=config.branches)
        run = self._run(depth, width=config.width, max_nodes=depth * config.width, best=best)
        self._offsets = []

        def candidates(nodes: Nodes, level: int) -> tuple[Tensor, Tensor]:
            """Return log-probabilities and tokens, ``[batch, width, ranks]``, below some nodes."""
            logits = self._below(run, *nodes) if level else self._catch_up(run, roots)
            if run.best is not None:
                return run.best
            ranked = self._ranking.rank(logits, depth=level, noise=noise, nodes=nodes)
            found = ranked.topk(config.branches, dim=-1)
            return found.values, found.indices

        draft, grown = grow(
            candidates,
            roots,
            config=config,
            bounds=bounds,
            reads=reads,
            leaf_tokens=self._leaf_tokens,
        )
        self._offsets.append(cache.num_pending)  # the last level is not fed
        return draft, grown

    def _fill(
        self, roots: Int[Tensor, " batch"], paths: RankPaths, noise: PositionNoise | None
    ) -> Draft:
        """Feed the unseen tokens, then fill the levels of a static tree one after another.

        Children are drawn if the rule needs drawn drafts; otherwise they go by rank.
        """
        assert self._cache is not None
        batch, sampler = len(roots), self._sampler
        tree = FilledTree(paths, roots=roots, are_drawn=sampler is not None)
        widths = tree.widths[1:]
        best = self._best(noise, num_ranks=1 + max(map(max, paths)))
        run = self._run(len(widths), width=max(widths, default=1), max_nodes=sum(widths), best=best)
        self._offsets = []
        logits = self._catch_up(run, roots)  # [batch, level, vocab]
        distributions: Tensor | None = None
        while True:
            if sampler is not None:
                distribution = sampler.distribution(logits)
                distributions = (
                    distribution.new_zeros(*tree.tokens.shape, distribution.shape[2])
                    if distributions is None
                    else distributions
                )
                distributions[:, tree.expanded_nodes] = distribution
                tree.fill(sampler.siblings(distribution, num=tree.num_ranks))
            elif run.best is not None:
                tree.fill(run.best[1])
            else:
                nodes = (tree.expanded_tokens, tree.expanded_parents)
                scores = self._ranking.order(logits, depth=tree.depth, noise=noise, nodes=nodes)
                tree.fill(scores.topk(tree.num_ranks, dim=-1).indices)
            if tree.is_full:
                break
            logits = self._below(run, tree.expanded_tokens, tree.expanded_parents)
        self._grown = [GrownRow([], [], tree.expansions, [])] * batch
        self._offsets = self._offsets or [self._cache.num_pending]
        return Draft(tokens=tree.tokens, topology=tree.topology, distributions=distributions)

    def _best(self, noise: PositionNoise | None, *, num_ranks: int) -> Best | None:
        """Return which children a stage ranks by itself; None if more than logits decides."""
        num_columns = self._vocabulary.num_shared
        is_decided = noise is None and self._sampler is None and not self._ranking.changes_scores
        return Best(num_ranks, num_columns) if is_decided and num_ranks <= num_columns else None

    def _run(self, depth: int, *, width: int, max_nodes: int, best: Best | None) -> LevelRun:
        """Return the run of a draft; a network that sees no window runs what fits into it."""
        assert self._cache is not None
        unseen, network = [len(tokens) for tokens in self._unseen], self.network
        window = None if network is None else network.window
        reach = self._cache.tree_start + max(unseen) + depth
        if network is None or (window is not None and reach > window):
            return ModelRun(self.view, self._cache, unseen, is_chain=width == 1)
        if self._staged is not None and self._staged.obstacle is None and width <= WIDTHS[-1]:
            return StagedRun(self._staged, self._cache, unseen, depth=depth, width=width, best=best)
        return NetworkRun(
            network,
            self._cache,
            unseen,
            depth=depth,
            max_nodes=max_nodes,
            is_chain=width == 1,
        )

    def _catch_up(
        self, run: LevelRun, roots: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch 1 vocab"]:
        """Feed committed tokens that the draft model has not seen; short rows end in padding."""
        if self._prompt_logits is not None:
            return self._prompt_logits
        longest, tokens = max(map(len, self._unseen)), roots[:, None]
        if longest > 1:
            padded = [tokens + [0] * (longest - len(tokens)) for tokens in self._unseen]
            tokens = upload(padded, roots.device)
        return self._vocabulary.fit(run.catch_up(self._vocabulary.readable(tokens)))

    def _below(
        self, run: LevelRun, tokens: Int[Tensor, "batch width"], parents: Int[Tensor, "batch width"]
    ) -> Float[Tensor, "batch width vocab"]:
        """Feed a level; its logits are over the target's vocabulary."""
        assert self._cache is not None
        self._offsets.append(self._cache.num_pending)
        return self._vocabulary.fit(run.below(self._vocabulary.readable(tokens), parents))
