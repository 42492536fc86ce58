"""Proposes what Medusa heads guess from the target's last hidden state."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance.accepted import Accepted
from speclm.config import ProposerConfig, require_depth
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.heads.medusa import MedusaHeads
from speclm.proposers.interface import Draft, Prefill, Proposer
from speclm.proposers.ranking import rank_log_probs
from speclm.sampling.drafts import DraftSampler, DraftSampling, Families
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures, TargetView
from speclm.tree.choices import Choices, StaticTree, normalize_choices, static_tree, trim_choices
from speclm.tree.topology import chain

_log = logging.getLogger("speclm")

DEFAULT_TREE: Choices = ((0,), (1,), (0, 0), (0, 1), (0, 0, 0), (0, 0, 1), (0, 0, 0, 0))
"""Seven guesses for heads that no better tree is known of."""


@dataclass(frozen=True, slots=True)
class MedusaConfig(ProposerConfig):
    """Settings of `MedusaProposer`.

    Args:
        depth: Levels of the tree; as many heads are computed.
        choices: Paths of ranks, see `speclm.tree.choices`.
    """

    depth: int = 4
    choices: Choices = DEFAULT_TREE

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)  # super() does not work in a slotted dataclass


class MedusaProposer(Proposer):
    """Fills a static tree with the best guesses of Medusa heads.

    Head i sees the hidden state that the target's last root was chosen from, and guesses the
    token of depth i + 1. It does not see the tokens between: all nodes of a depth share one law.

    Source: Cai et al. 2024 (Medusa).
    """

    features = TargetFeatures.LAST_HIDDEN
    draft_sampling = DraftSampling.WITHOUT_REPLACEMENT
    config: MedusaConfig

    def __init__(
        self,
        heads: MedusaHeads,
        *,
        target: PreTrainedModel,
        tree: str | Sequence[int] | Sequence[Sequence[int]] | None = None,
        num_draft_tokens: int | None = None,
    ) -> None:
        """Wrap trained heads.

        Args:
            heads: Heads trained on the target, on its device.
            target: The model that will verify; heads without an output matrix use its own.
            tree: Name of a preset, the number of children at each depth, or paths of ranks; by
                default `DEFAULT_TREE`. Levels beyond the heads are left out, with a log line.
            num_draft_tokens: Most nodes; the first of the tree, by depth, are kept.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width, or a rank exceeds the vocabulary.
            TopologyError: If the tree is none.
        """
        self.view = TargetView(target)
        self.heads = heads
        _require_match(heads, self.view)
        choices = DEFAULT_TREE if tree is None else normalize_choices(tree)
        trimmed = trim_choices(choices, max_depth=heads.num_heads)
        if len(trimmed) < len(choices) and tree is not None:
            _log.warning(
                "tree is deeper than %d heads reach; %d of its %d nodes are left out",
                heads.num_heads,
                len(choices) - len(trimmed),
                len(choices),
            )
        trimmed = trimmed[:num_draft_tokens]
        rank = max(path[-1] for path in trimmed)
        if rank >= self.view.vocab_size:
            raise OptionError(
                f"tree asks for rank {rank}, the vocabulary has {self.view.vocab_size} tokens; "
                "use smaller ranks"
            )
        self.config = MedusaConfig(depth=max(map(len, trimmed)), choices=trimmed)
        self._hidden: Float[Tensor, "batch hidden"] | None = None
        self._temperature = 0.0
        self._sampler: DraftSampler | None = None

    @override
    def begin(self, prompt: Prefill) -> None:
        self._hidden = None
        self._temperature = prompt.temperature
        self._sampler = prompt.sampler

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        if self._hidden is None:
            return Draft(roots[:, None], chain(0, device=roots.device), probs=None)
        tree = static_tree(self.config.choices, device=roots.device)
        if self._sampler is not None:
            return self._draw(roots, self._hidden, tree, self._sampler)
        guesses = self._rank(self._hidden, tree, noise)  # [batch, depth, rank]
        tokens = guesses[:, tree.depth_indices, tree.rank_indices]
        return Draft(
            tokens=torch.cat([roots[:, None], tokens], dim=1), topology=tree.topology, probs=None
        )

    @override
    def commit(self, accepted: Accepted) -> None:
        last = accepted.last_features
        if self._hidden is None:
            self._hidden = last.clone()
        else:  # a row that was given nothing keeps its hidden state, as it keeps its root
            is_kept = (accepted.num_tokens == 0)[:, None]
            self._hidden = torch.where(is_kept, self._hidden, last)

    def _draw(
        self,
        roots: Int[Tensor, " batch"],
        hidden: Float[Tensor, "batch hidden"],
        tree: StaticTree,
        sampler: DraftSampler,
    ) -> Draft:
        """Draw the children of every node, the j-th drawn in the place of the j-th child."""
        logits: Tensor = self.heads(hidden, lm_head=self.view.head_logits, num_heads=tree.max_depth)
        levels = sampler.law(logits)  # [batch, depth, vocab]
        depths = tree.topology.depths[0].clamp(max=tree.max_depth - 1)
        families = Families.of(tree.topology.host_parents[0])
        laws = levels[:, depths]  # [batch, nodes, vocab]
        drawn = sampler.siblings(laws[:, families.parents], num=families.max_children)
        tokens = roots[:, None].repeat(1, tree.topology.num_nodes)
        for family, children in enumerate(families.children):
            tokens[:, children] = drawn[:, family, : len(children)]
        return Draft(tokens=tokens, topology=tree.topology, probs=None, laws=laws)

    def _rank(
        self, hidden: Float[Tensor, "batch hidden"], tree: StaticTree, noise: PositionNoise | None
    ) -> Int[Tensor, "batch depth rank"]:
        """Return the best tokens of each depth, best first."""
        logits: Tensor = self.heads(
            hidden, lm_head=self.view.head_logits, num_heads=tree.max_depth
        )  # [batch, depth, vocab]
        num_ranks = tree.max_rank + 1
        if noise is None:
            return logits.topk(num_ranks, dim=-1).indices
        levels = [
            rank_log_probs(
                logits[:, depth : depth + 1],
                temperature=self._temperature,
                noise=noise.at_depth(depth),
            )
            for depth in range(tree.max_depth)
        ]
        return torch.cat(levels, dim=1).topk(num_ranks, dim=-1).indices


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
