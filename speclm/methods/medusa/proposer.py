"""Draft trees with Medusa heads, from the target's last hidden state."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import MAX_NODES, ProposerConfig, require_count, require_depth, require_in_range
from speclm.devices import is_host, upload
from speclm.drafting.interface import Draft, Prefill, Proposer, TargetNeeds
from speclm.drafting.levels import least_probability
from speclm.drafting.mixture import Mixture, require_mixture
from speclm.drafting.ranking import LevelRanking, chain_expansions
from speclm.drafting.search import read_candidates
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.methods.medusa.network import MedusaHeads
from speclm.sampling.draws import DraftSampler, DraftSampling, Families
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures, TargetView
from speclm.tree.enclosing import enclosing_tree
from speclm.tree.plan import TreePlan
from speclm.tree.static import (
    RankPaths,
    StaticTree,
    likeliest_paths,
    normalize_paths,
    static_tree,
    trim_paths,
)
from speclm.tree.topology import chain, trees_of

_log = logging.getLogger("speclm")

MAX_RANK = 8
"""Maximum candidates of one head in a dynamic tree."""

_WIDTH = 16
"""Nodes of a level with children among which a device chooses."""

STATIC_TREE: RankPaths = ((0,), (1,), (0, 0), (0, 1), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0))
"""Default static tree, for drawn drafts and in training."""


@dataclass(frozen=True, slots=True)
class MedusaConfig(ProposerConfig):
    """Settings of `MedusaProposer`.

    Args:
        depth: Maximum levels of a tree; as many heads are computed.
        paths: Static tree as paths of ranks, see `speclm.tree.static`; None for trees that
            grow by probability in every round.
        num_draft_tokens: Maximum nodes of a tree that grows by probability.
        min_probability: Minimum estimated acceptance probability of a node in a tree that grows,
            for a single row; higher in a batch.
        mixture: Parameters of the distribution that ranks candidates under sampling; None
            estimates them from what the target chooses.
    """

    depth: int = 4
    paths: RankPaths | None = None
    num_draft_tokens: int = 16
    min_probability: float = 0.07
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)  # super() does not work in a slotted dataclass
        require_count("num_draft_tokens", self.num_draft_tokens, low=1, high=MAX_NODES - 1)
        require_in_range("min_probability", self.min_probability, low=0.0, high=1.0)
        require_mixture(self.mixture)


class MedusaProposer(Proposer):
    """Fills a tree with the best candidates of Medusa heads.

    Head i reads the hidden state from which the target chose the root, and predicts the token at
    depth i + 1. It does not see the tokens in between: all nodes of a depth share one distribution,
    and the probability of a path is estimated as the product of its tokens' probabilities.

    Source: Cai et al. 2024 (Medusa).
    """

    features = TargetFeatures.LAST_HIDDEN
    fills_static_trees = True
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT
    config: MedusaConfig

    def __init__(
        self,
        heads: MedusaHeads,
        *,
        target: PreTrainedModel,
        tree: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        num_draft_tokens: int | None = None,
        min_probability: float = 0.07,
        mixture: Mixture | None = None,
    ) -> None:
        """Wrap trained heads.

        Args:
            heads: Heads trained on the target, on its device.
            target: The model that verifies; heads without an output matrix use its own.
            tree: Name of a preset, the number of children at each depth, or paths of ranks.
                Levels beyond the heads are dropped, with a log line. None for a dynamic tree.
            num_draft_tokens: Maximum nodes; of a static tree the first nodes by depth are
                kept.
            min_probability: See `MedusaConfig`.
            mixture: See `MedusaConfig`.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width, or a rank or option is out of range.
            TopologyError: If `tree` is not a tree.
        """
        self.view = TargetView(target)
        if not isinstance(heads, MedusaHeads):
            raise OptionError(
                f"heads is a {type(heads).__name__}, expected MedusaHeads; for a folder or hub id "
                "use SpecModel.from_pretrained(base, heads)"
            )
        self.heads = heads
        _require_match(heads, self.view)
        self.needs = TargetNeeds(
            vocab_size=heads.config.vocab_size,
            hidden_size=heads.config.hidden_size,
            model=None if heads.config.has_own_lm_head else target,
        )
        if tree is None:
            self.config = MedusaConfig(
                depth=heads.num_heads,
                num_draft_tokens=16 if num_draft_tokens is None else num_draft_tokens,
                min_probability=min_probability,
                mixture=mixture,
            )
        else:
            paths = _fitting(normalize_paths(tree), heads, self.view)
            if num_draft_tokens is not None:
                require_count("num_draft_tokens", num_draft_tokens, low=1, high=MAX_NODES - 1)
                paths = paths[:num_draft_tokens]
            self.config = MedusaConfig(
                depth=max(map(len, paths)),
                paths=paths,
                num_draft_tokens=len(paths),
                mixture=mixture,
            )
        self._hidden: Float[Tensor, "batch hidden"] | None = None
        self._is_idle: list[bool] = []
        self._ranking = LevelRanking(mixture)
        self._sampler: DraftSampler | None = None

    @override
    def begin(self, prompt: Prefill) -> None:
        self._hidden = None
        self._ranking.begin(prompt)
        self._sampler = prompt.sampler

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        if self._hidden is None:
            return Draft(roots[:, None], chain(0, device=roots.device))
        config = _planned(self.config, self.plan, num_heads=self.heads.num_heads)
        if self._sampler is not None:
            drawn = config.paths or trim_paths(STATIC_TREE, max_depth=config.depth)
            tree = static_tree(drawn[: config.num_draft_tokens], device=roots.device)
            return self._draw(roots, self._hidden, tree, self._sampler)
        log_probs = self._rank(self._hidden, noise, depth=config.depth)
        if config.paths is None:
            return self._grow(roots, log_probs, config)
        tree = static_tree(config.paths, device=roots.device)
        candidates = log_probs.topk(tree.max_rank + 1, dim=-1).indices  # [batch, depth, rank]
        tokens = candidates[:, tree.depth_indices, tree.rank_indices]
        return Draft(tokens=torch.cat([roots[:, None], tokens], dim=1), topology=tree.topology)

    @override
    def commit(self, accepted: Accepted) -> None:
        self._ranking.learn(accepted, chain_expansions(accepted))
        last = accepted.last_features
        self._is_idle = [not emitted for emitted in accepted.emitted]
        if self._hidden is None or not any(self._is_idle):
            self._hidden = last
        else:  # a row without new tokens keeps its hidden state, as it keeps its root
            is_idle = upload([[idle] for idle in self._is_idle], last.device) > 0
            self._hidden = torch.where(is_idle, self._hidden, last)

    def _grow(
        self,
        roots: Int[Tensor, " batch"],
        log_probs: Float[Tensor, "batch depth vocab"],
        config: MedusaConfig,
    ) -> Draft:
        """Grow a dynamic tree of each row's most likely paths."""
        best = log_probs.topk(min(MAX_RANK, log_probs.shape[2]), dim=-1)
        if not is_host(roots.device):
            return _choose(roots, best.values, best.indices, num_nodes=config.num_draft_tokens)
        scores, candidates = read_candidates(best.values, best.indices)  # [batch, depth, rank]
        # Nodes of ended rows would slow the others.
        scores = [
            [] if is_idle else row for row, is_idle in zip(scores, self._is_idle, strict=True)
        ]
        num_rows = sum(bool(row) and row[0][0] > -math.inf for row in scores)
        min_probability = config.min_probability
        if self.plan is None or self.plan.min_probability is None:
            min_probability = least_probability(min_probability, num_rows=num_rows)
        min_score = math.log(max(min_probability, 1e-30))
        rows = [
            likeliest_paths(row, num_nodes=config.num_draft_tokens, min_score=min_score)
            for row in scores
        ]
        longest = max(map(len, rows))
        tokens = [
            [row_candidates[node.depth][node.rank] for node in row] + [0] * (longest - len(row))
            for row, row_candidates in zip(rows, candidates, strict=True)
        ]
        node_probs = [
            [1.0, *(math.exp(own[n.depth][n.rank]) for n in row), *[0.0] * (longest - len(row))]
            for row, own in zip(rows, scores, strict=True)
        ]
        found = upload(tokens, roots.device)
        return Draft(
            tokens=torch.cat([roots[:, None], found], dim=1),
            topology=trees_of(
                [[0, *(node.parent for node in row)] for row in rows], device=roots.device
            ),
            node_probs=node_probs,
        )

    def _draw(
        self,
        roots: Int[Tensor, " batch"],
        hidden: Float[Tensor, "batch hidden"],
        tree: StaticTree,
        sampler: DraftSampler,
    ) -> Draft:
        """Draw the children of every node of a static tree."""
        logits: Tensor = self.heads(hidden, lm_head=self.view.head_logits, num_heads=tree.max_depth)
        levels = sampler.distribution(logits)  # [batch, depth, vocab]
        depths = tree.topology.depths[0].clamp(max=tree.max_depth - 1)
        families = Families.of(tree.topology.host_parents[0])
        distributions = levels[:, depths]  # [batch, nodes, vocab]
        drawn = sampler.siblings(distributions[:, families.parents], num=families.max_children)
        tokens = roots[:, None].repeat(1, tree.topology.num_nodes)
        for family, children in enumerate(families.children):
            tokens[:, children] = drawn[:, family, : len(children)]
        return Draft(tokens=tokens, topology=tree.topology, distributions=distributions)

    def _rank(
        self, hidden: Float[Tensor, "batch hidden"], noise: PositionNoise | None, *, depth: int
    ) -> Float[Tensor, "batch depth vocab"]:
        """Return the log-probabilities that rank the candidates at each depth."""
        logits: Tensor = self.heads(hidden, lm_head=self.view.head_logits, num_heads=depth)
        if noise is None and not self._ranking.changes_scores:
            return self._ranking.rank(logits, depth=0, noise=None)
        levels = [
            self._ranking.rank(logits[:, level : level + 1], depth=level, noise=noise)
            for level in range(depth)
        ]
        return torch.cat(levels, dim=1)


def _choose(
    roots: Int[Tensor, " batch"],
    log_probs: Float[Tensor, "batch depth ranks"],
    candidates: Int[Tensor, "batch depth ranks"],
    *,
    num_nodes: int,
) -> Draft:
    """Return the likeliest paths of each row, chosen on the device.

    They are always as many, because trees of fixed shape would be padded with others.
    """
    tree = enclosing_tree(
        depth=log_probs.shape[1],
        width=_WIDTH,
        num_ranks=log_probs.shape[2],
        is_chained=False,
        device=roots.device,
    )
    tokens = torch.cat([roots[:, None], candidates.flatten(1)], dim=1)
    chosen = tree.choose(log_probs.flatten(1), tokens, num_nodes=num_nodes + 1)
    return Draft(tokens=chosen.tokens, topology=chosen.topology())


@lru_cache(maxsize=64)
def _planned(config: MedusaConfig, plan: TreePlan | None, *, num_heads: int) -> MedusaConfig:
    """Return the settings of the next drafts; a plan overrides those of the config."""
    if plan is None:
        return config
    if plan.paths is not None:
        paths = trim_paths(plan.paths, max_depth=num_heads)
        depth = max(map(len, paths))
        return MedusaConfig(depth=depth, paths=paths, num_draft_tokens=len(paths))
    return MedusaConfig(
        depth=min(plan.depth, num_heads),
        num_draft_tokens=plan.num_draft_tokens,
        min_probability=config.min_probability
        if plan.min_probability is None
        else plan.min_probability,
    )


def _fitting(paths: RankPaths, heads: MedusaHeads, view: TargetView) -> RankPaths:
    """Cut a tree at the depth of the heads, and reject ranks beyond the vocabulary."""
    trimmed = trim_paths(paths, max_depth=heads.num_heads)
    if len(trimmed) < len(paths):
        _log.warning(
            "tree is deeper than %d heads reach; %d of its %d nodes are left out",
            heads.num_heads,
            len(paths) - len(trimmed),
            len(paths),
        )
    rank = max(path[-1] for path in trimmed)
    if rank >= view.vocab_size:
        raise OptionError(
            f"tree asks for rank {rank}, the vocabulary has {view.vocab_size} tokens; "
            "use smaller ranks"
        )
    return trimmed


def _require_match(heads: MedusaHeads, view: TargetView) -> None:
    config = heads.config
    if config.vocab_size != view.vocab_size:
        raise VocabularyMismatchError(
            f"heads are for a vocabulary of {config.vocab_size}, the target {view.name} has one of "
            f"{view.vocab_size}; load them with the base they were trained on"
        )
    if config.hidden_size != view.hidden_size:
        raise OptionError(
            f"heads are {config.hidden_size} wide, the hidden states of {view.name} "
            f"{view.hidden_size}; load them with the base they were trained on"
        )
