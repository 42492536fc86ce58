"""Training objective of block heads: many blocks of each text in one pass of the heads."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.config import require_count, require_in_range, require_positive
from speclm.drafting.heads_folder import hub_id
from speclm.errors import OptionError
from speclm.methods.block.blocks import Blocks, accepted_lengths, count_blocks, find_blocks
from speclm.methods.block.checkpoint import block_checkpoint, write_block
from speclm.methods.block.config import KINDS
from speclm.methods.block.network import BlockHeads, block_masks
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.block.tree import BlockProposerConfig
from speclm.target import stored_matrices
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.targets import IGNORED, until_first_difference
from speclm.training.training_model import (
    MAX_LOGITS,
    BaseGoals,
    TrainingModel,
    rank_columns,
    score_in_chunks,
    soft_cross_entropy,
    token_cross_entropy,
)

MAX_ANCHORS = 512
"""Maximum blocks that are drafted from one text in a training step."""


@dataclass(frozen=True, slots=True)
class BlockObjective:
    """Settings of the loss.

    Args:
        token_weight: Weight of the cross-entropy of the texts' own tokens.
        distribution_weight: Weight of the cross-entropy against the base's distribution.
        distance_weight: Weight of the sum of absolute differences to the base's probabilities,
            twice the total variation.
        confidence_weight: Weight of the cross-entropy of the confidence head, whose target is the
            probability that rejection sampling accepts a draft token.
        temperature: Divides the logits of both distributions in the second term.
        decay_length: Position k of a block, counted from 0, weighs ``exp(-k / decay_length)``;
            None for equal weights.
        max_anchors: Blocks of each text in a training step, drawn at random; evaluation drafts all.
    """

    token_weight: float = 0.1
    distribution_weight: float = 0.0
    distance_weight: float = 0.9
    confidence_weight: float = 1.0
    temperature: float = 1.0
    decay_length: float | None = 4.0
    max_anchors: int = MAX_ANCHORS

    def __post_init__(self) -> None:
        names = ("token_weight", "distribution_weight", "distance_weight", "confidence_weight")
        for name in names:
            require_in_range(name, getattr(self, name), low=0.0, high=1e6)
        require_positive("temperature", self.temperature)
        if self.decay_length is not None:
            require_positive("decay_length", self.decay_length)
        require_count("max_anchors", self.max_anchors, low=1, high=2**20)
        if not any(getattr(self, name) for name in names[:3]):
            raise OptionError(
                "token_weight, distribution_weight and distance_weight are all 0, expected one "
                "above 0, or the heads learn nothing; raise one"
            )

    @classmethod
    def usual(cls, kind: str, *, num_drafts: int) -> Self:
        """Return the objective of the authors of a kind of heads.

        Source: the code of DSpark, Chen et al. 2026 (DFlash), the code of JetSpec.

        Args:
            kind: One of `KINDS`.
            num_drafts: Draft tokens of one pass.

        Raises:
            OptionError: If the kind is unknown.
        """
        if kind == "dspark":
            return cls()
        if kind == "dflash":  # 4 for blocks of 8 and 7 for blocks of 16
            length = 4.0 if num_drafts < 12 else 7.0
            return cls(token_weight=1.0, distance_weight=0.0, decay_length=length)
        if kind == "jetspec":
            return cls(
                token_weight=0.0, distribution_weight=1.0, distance_weight=0.0, decay_length=None
            )
        raise OptionError(f"kind is {kind!r}, expected one of {KINDS!r}; choose one")


class BlockTrainingModel(TrainingModel):
    """Computes the loss of block heads from one forward of the base.

    Embeddings and an output matrix of the heads themselves are not trained.
    """

    heads: BlockHeads

    def __init__(
        self,
        base: PreTrainedModel,
        heads: BlockHeads,
        *,
        objective: BlockObjective,
        tree: BlockProposerConfig | None = None,
    ) -> None:
        """Put heads on a base, and freeze the base.

        Args:
            base: The target.
            heads: Heads to train, see `new_block_heads` and `load_block_heads`.
            objective: Settings of the loss.
            tree: Settings of the trees whose tau an evaluation estimates; None for the default.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base, or it has too few layers
                for their features.
        """
        BlockProposer(heads, target=base)  # checks that they fit
        super().__init__(base, heads.train())
        for part in (heads.embed_tokens, heads.lm_head):
            if part is not None:
                part.requires_grad_(requires_grad=False)
        self.objective = objective
        self._layers = heads.config.layers_to_read(self.view.num_layers)
        num_drafts = heads.config.num_drafts
        weights = torch.ones(num_drafts, dtype=torch.float32, device="cpu")
        if objective.decay_length is not None:
            weights = torch.exp(-torch.arange(num_drafts, device="cpu") / objective.decay_length)
        self._weights = weights
        self._tree = tree or BlockProposerConfig(depth=num_drafts)
        ends: Any = getattr(base.generation_config, "eos_token_id", None)  # there may be none
        self._ends = ends if isinstance(ends, list) else [] if ends is None else [ends]

    @property
    @override
    def layers_read(self) -> tuple[int, ...]:
        return (*self._layers, -1)

    @property
    @override
    def max_length(self) -> int | None:
        bounds = (self.view.max_positions, self.heads.config.max_position_embeddings)
        return min(bound for bound in bounds if bound is not None)

    @override
    def count_targets(self, loss_mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "1"]:
        return count_blocks(loss_mask, self._weights, max_anchors=self.objective.max_anchors)

    @override
    def new_meter(self) -> AcceptanceMeter:
        num_drafted = self.heads.config.num_drafts
        chain = tuple((0,) * depth for depth in range(1, num_drafted + 1))
        return AcceptanceMeter(chain, num_drafted=num_drafted, name="position")

    @override
    def write(self, folder: Path) -> None:
        base = self.view.model
        base_id = hub_id(base.config.name_or_path)  # paths are not written
        checkpoint = block_checkpoint(self.heads, base_name_or_path=base_id)
        checkpoint = checkpoint.share(**stored_matrices(base))
        write_block(folder, checkpoint, num_target_layers=self.view.num_layers)

    @override
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
        shares: Float[Tensor, " parts"] | None = None,
    ) -> dict[str, Tensor]:
        device, num_drafts = self.heads.fc.weight.device, self.heads.config.num_drafts
        features, last = self.read_base(input_ids, attention_mask, self._layers)
        tokens, loss_mask = input_ids.to(device), loss_mask.to(device)
        blocks = find_blocks(
            tokens,
            loss_mask,
            num_drafts=num_drafts,
            max_anchors=self.objective.max_anchors if self.training else None,
        )
        hidden = self.draft(features.to(device), tokens, blocks)
        ahead = torch.arange(num_drafts, device=device)
        logits, goals = self.base_goals(
            last, blocks.anchors[:, :, None] + ahead, loss_mask, columns=self.heads.draft_columns
        )
        sums, ranks = self._score_blocks(hidden, blocks, goals, logits)
        losses, counts = sums
        weights = self._weights.to(losses)
        total = (weights * losses).sum() / (weights * counts).sum().clamp(min=1e-6)
        if shares is not None:
            total = total * shares.to(total.device).squeeze()
        # The draft from anchor p is measured as one from the hidden state before it.
        shape = (*tokens.shape, num_drafts)
        measured = torch.full(shape, -1, device=device, dtype=torch.long)
        before = (blocks.anchors - 1).clamp(min=0)[:, :, None].expand(-1, -1, num_drafts)
        measured.scatter_reduce_(1, before, ranks, reduce="amax")
        grown = {} if self.training else self._grown(hidden, tokens, blocks, goals)
        return {
            **grown,
            "loss": total,
            "loss_sums": losses.detach(),
            "counts": counts.long(),
            "ranks": measured,
            "base_tokens": goals.base_tokens,
            # Rounds cannot be replayed over a text of which only some blocks were drafted.
            "loss_mask": loss_mask & blocks.is_complete[:, None],
        }

    def draft(
        self,
        features: Float[Tensor, "batch seq features"],
        tokens: Int[Tensor, "batch seq"],
        blocks: Blocks,
    ) -> Float[Tensor, "batch blocks drafts hidden"]:
        """Return the heads' states at the positions that draft.

        If all blocks together have too many scores of attention, the backward pass recomputes them
        part by part.
        """
        heads, (batch, length) = self.heads, tokens.shape
        context_positions = torch.arange(length, device=tokens.device)[None]
        keys, values = heads.context(features, heads.rotation(context_positions))
        run = partial(self._run, tokens, context_positions)
        num_positions = heads.config.block_size
        size = MAX_LOGITS // (batch * heads.config.num_heads * (length + num_positions))
        size = max(1, size // num_positions)
        if blocks.anchors.shape[1] <= size:
            return run(keys, values, blocks.anchors)
        parts = torch.split(blocks.anchors, size, dim=1)
        hidden = [checkpoint(run, keys, values, part, use_reentrant=False) for part in parts]
        return torch.cat(hidden, dim=1)

    def _run(
        self,
        tokens: Int[Tensor, "batch seq"],
        context_positions: Int[Tensor, "1 seq"],
        keys: Float[Tensor, "layers batch kv_heads seq head_dim"],
        values: Float[Tensor, "layers batch kv_heads seq head_dim"],
        anchors: Int[Tensor, "batch blocks"],
    ) -> Float[Tensor, "batch blocks drafts hidden"]:
        heads, num_positions = self.heads, self.heads.config.block_size
        masks = block_masks(
            heads.config,
            context_positions[:, None] < anchors[:, :, None],
            context_positions=context_positions,
            anchors=anchors,
            num_positions=num_positions,
        )
        embeds = heads.embed_blocks(
            tokens.gather(1, anchors), num_positions=num_positions, embedding=self._embed
        )
        within = torch.arange(num_positions, device=tokens.device)
        positions = (anchors[:, :, None] + within).flatten(1)
        hidden: Tensor = heads(
            embeds, heads.rotation(positions), keys, values, masks, num_blocks=anchors.shape[1]
        )
        return hidden.view(*anchors.shape, heads.config.num_drafts, -1)

    def _grown(
        self,
        hidden: Float[Tensor, "batch blocks drafts hidden"],
        tokens: Int[Tensor, "batch seq"],
        blocks: Blocks,
        goals: BaseGoals,
    ) -> dict[str, Tensor]:
        """Return how much of the tree of each block would be accepted."""
        is_block = (blocks.targets >= 0).any(-1)
        wanted = until_first_difference(goals.chosen[goals.indices], blocks.targets)
        wanted = wanted.masked_fill(blocks.targets < 0, IGNORED)
        found = accepted_lengths(
            self.heads,
            hidden[is_block],
            tokens.gather(1, blocks.anchors)[is_block],
            wanted[is_block],
            config=self._tree,
            lm_head=self.lm_head,
            end_ids=self._ends,
        )
        lengths = torch.full_like(tokens, -1)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(is_block)
        # As the ranks: at the position before the anchor.
        lengths[rows[is_block], blocks.anchors[is_block] - 1] = found
        return {"tree_lengths": lengths}

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.view.stored_embeddings(tokens.to(self.view.device)).to(tokens.device)

    def _score_blocks(
        self,
        hidden: Float[Tensor, "batch blocks drafts hidden"],
        blocks: Blocks,
        goals: BaseGoals,
        base_logits: Float[Tensor, "positions draft_vocab"],
    ) -> tuple[Float[Tensor, "2 drafts"], Int[Tensor, "batch blocks drafts"]]:
        """Return sum and number of the losses at each position of a block, and the ranks."""
        targets, previous = blocks.targets, blocks.previous
        is_target = targets >= 0
        depths = torch.arange(targets.shape[2], device=targets.device).expand_as(targets)
        codes = self._codes(previous, hidden)
        pairs = torch.stack((previous, targets), dim=-1)
        rows = (part[is_target] for part in (hidden, codes, pairs, depths))
        sums, found = score_in_chunks(
            partial(self._score, goals, base_logits),
            *rows,
            goals.indices[is_target],
            logits_per_row=4 * self.heads.config.draft_vocab_size,
        )
        ranks = torch.full_like(targets, -1)
        ranks[is_target] = found
        return sums, ranks

    def _codes(
        self,
        previous: Int[Tensor, "batch blocks drafts"],
        hidden: Float[Tensor, "batch blocks drafts hidden"],
    ) -> Float[Tensor, "batch blocks drafts rank"]:
        """Return what the Markov head says of the true tokens before each position."""
        head = self.heads.markov_head
        if head is None:
            return hidden.new_empty((*previous.shape, 0))
        codes, state = [], None
        for depth in range(previous.shape[2]):
            code, state = head.code(previous[:, :, depth], hidden[:, :, depth], state)
            codes.append(code)
        return torch.stack(codes, dim=2)

    def _score(
        self,
        goals: BaseGoals,
        all_logits: Float[Tensor, "positions draft_vocab"],
        hidden: Float[Tensor, "rows hidden"],
        codes: Float[Tensor, "rows rank"],
        tokens: Int[Tensor, "rows 2"],
        depths: Int[Tensor, " rows"],
        indices: Int[Tensor, " rows"],
    ) -> tuple[Float[Tensor, "2 drafts"], Int[Tensor, " rows"]]:
        heads, objective = self.heads, self.objective
        previous, targets = tokens.T.contiguous()
        logits = heads.logits(hidden, lm_head=self.lm_head)
        if heads.markov_head is not None:
            logits = logits + heads.markov_head.markov_w2(codes)
        logits = logits.float()
        base_logits, is_draftable = all_logits[indices], goals.is_draftable[indices]
        ranks = rank_columns(logits, goals.chosen[indices], heads.draft_columns)
        losses = logits.new_zeros(len(logits))
        if objective.token_weight:
            losses = losses + objective.token_weight * token_cross_entropy(
                logits, targets, heads.draft_columns
            )
        if objective.distribution_weight:
            heat = objective.temperature
            soft = soft_cross_entropy(logits / heat, (base_logits / heat).softmax(-1))
            losses = losses + objective.distribution_weight * heat**2 * soft
        if objective.distance_weight or heads.confidence_head is not None:
            distance = (logits.softmax(-1) - base_logits.softmax(-1)).abs().sum(-1)
            losses = losses + objective.distance_weight * distance
            if heads.confidence_head is not None and objective.confidence_weight:
                embedded = None if heads.markov_head is None else heads.markov_head.embed(previous)
                # The estimate may not change what is estimated.
                read = None if embedded is None else embedded.detach()
                guess = heads.confidence_head(hidden.detach(), read).float()
                goal = (1 - distance.detach() / 2).clamp(0, 1)
                losses = losses + objective.confidence_weight * (
                    F.binary_cross_entropy_with_logits(guess, goal, reduction="none")
                )
        pairs = torch.stack((losses * is_draftable, is_draftable))
        sums = pairs.new_zeros(2, heads.config.num_drafts)
        return sums.index_add(1, depths, pairs), ranks
