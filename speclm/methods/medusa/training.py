"""Train Medusa heads: their objective, and new heads to start from."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.config import require_in_range
from speclm.drafting.heads_folder import hub_id
from speclm.methods.medusa.checkpoint import write_medusa
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig, medusa_checkpoint
from speclm.methods.medusa.proposer import STATIC_TREE, MedusaProposer
from speclm.target import TargetView, output_matrix
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.training_model import (
    IGNORED,
    TrainingModel,
    rank_targets,
    score_in_chunks,
    shifted_targets,
    soft_cross_entropy,
    weighted_loss,
)
from speclm.tree.static import trim_paths


@dataclass(frozen=True, slots=True)
class MedusaObjective:
    """Settings of the loss.

    Args:
        decay: Weight of a head's loss relative to that of the head before it; rounds reach later
            draft tokens less often.
        soft_weight: Share of the loss against the base's own distribution instead of the token of
            the data; it costs no further forward of the base.
    """

    decay: float = 0.8
    soft_weight: float = 0.0

    def __post_init__(self) -> None:
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        require_in_range("soft_weight", self.soft_weight, low=0.0, high=1.0)


class MedusaTrainingModel(TrainingModel):
    """Computes the loss of Medusa heads from one forward of the base."""

    heads: MedusaHeads

    def __init__(
        self, base: PreTrainedModel, heads: MedusaHeads, *, objective: MedusaObjective | None = None
    ) -> None:
        """Put heads on a base, and freeze the base.

        Args:
            base: The target.
            heads: Heads to train, see `new_medusa_heads`.
            objective: Settings of the loss; None for the defaults.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base.
        """
        MedusaProposer(heads, target=base)  # checks that they fit
        super().__init__(base, heads)
        self.objective = objective or MedusaObjective()

    @override
    def new_meter(self) -> AcceptanceMeter:
        # The same tree for any number of heads, so that estimates can be compared.
        num_heads = self.heads.num_heads
        choices = trim_paths(STATIC_TREE, max_depth=num_heads)
        return AcceptanceMeter(choices, num_drafted=num_heads, name="head")

    @override
    def write(self, folder: Path) -> None:
        base_id = hub_id(self.view.model.config.name_or_path)  # paths are not written
        write_medusa(folder, medusa_checkpoint(self.heads, base_name_or_path=base_id))

    @override
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        targets = shifted_targets(input_ids, loss_mask, num_drafted=self.heads.num_heads)
        hidden = self._base_hidden(input_ids, attention_mask)
        base_tokens = self.base_tokens(hidden.view(*input_ids.shape, -1), loss_mask)
        wanted = shifted_targets(base_tokens, loss_mask, num_drafted=self.heads.num_heads)
        sources = (targets != IGNORED).any(-1).flatten().nonzero()[:, 0]
        targets = targets.flatten(0, 1)
        loss_sums, source_ranks = score_in_chunks(
            partial(self._score, hidden),
            sources,
            targets[sources],
            wanted.flatten(0, 1)[sources],
            logits_per_row=targets.shape[1] * self.view.vocab_size,
        )
        counts = (targets != IGNORED).sum(0)
        ranks = torch.full_like(targets, -1)
        ranks[sources] = source_ranks
        return {
            "loss": weighted_loss(loss_sums, counts, decay=self.objective.decay),
            "loss_sums": loss_sums.detach(),
            "counts": counts,
            "ranks": ranks.view(*input_ids.shape, -1),
            "base_tokens": base_tokens,
        }

    @torch.no_grad()
    def _base_hidden(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Return the input of the base's output matrix, without computing logits."""
        device = self.view.device
        output = self.view.decoder(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            use_cache=False,
        )
        hidden: Tensor = output[0]
        return hidden.flatten(0, 1)

    def _score(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        sources: Int[Tensor, " rows"],
        targets: Int[Tensor, "rows heads"],
        wanted: Int[Tensor, "rows heads"],
    ) -> tuple[Float[Tensor, " heads"], Int[Tensor, "rows heads"]]:
        """Return the sum of the losses of each head, and the rank of each token of the base.

        Args:
            hidden: Hidden states of all positions.
            sources: Positions to draft from.
            targets: Tokens to learn there.
            wanted: Tokens that the base would write there.
        """
        device = self.heads.weight.device
        logits = self.heads(hidden[sources.to(hidden.device)].to(device), lm_head=self.lm_head)
        logits = logits.float()
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(targets)
        if soft_weight := self.objective.soft_weight:
            target_probs = self._base_probs(hidden, sources, targets).to(device)
            soft = soft_cross_entropy(logits, target_probs).masked_fill(targets == IGNORED, 0.0)
            losses = (1 - soft_weight) * losses + soft_weight * soft
        return losses.sum(0), rank_targets(logits, wanted)

    @torch.no_grad()
    def _base_probs(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        sources: Int[Tensor, " rows"],
        targets: Int[Tensor, "rows heads"],
    ) -> Float[Tensor, "rows heads vocab"]:
        """Return the base's distribution at each target, from the hidden state before it."""
        ahead = 1 + torch.arange(targets.shape[1], device=sources.device)
        # Without a target the position may not exist; any other position will do.
        positions = (sources[:, None] + ahead).where(targets != IGNORED, sources[:, None])
        needed, indices = torch.unique(positions.to(hidden.device), return_inverse=True)
        return self.view.head_logits(hidden[needed]).float().softmax(-1)[indices]


def new_medusa_heads(
    base: PreTrainedModel,
    *,
    num_heads: int = 5,
    num_layers: int = 1,
    has_own_lm_head: bool = False,
    seed: int = 0,
) -> MedusaHeads:
    """Return untrained heads for a base, in float32 and on its device.

    Args:
        base: The target; it decides width and vocabulary.
        num_heads: Draft tokens ahead.
        num_layers: Residual layers of each head.
        has_own_lm_head: Whether each head gets an output matrix of its own, which starts as a
            copy of the base's and is as large. Such heads draft better.
        seed: Seed of the random weights of all layers but the first.

    Raises:
        UnsupportedModelError: If the base's output matrix has to be copied and is quantised or
            offloaded.
    """
    view = TargetView(base)
    config = MedusaHeadsConfig(
        hidden_size=view.hidden_size,
        vocab_size=view.vocab_size,
        num_heads=num_heads,
        num_layers=num_layers,
        has_own_lm_head=has_own_lm_head,
    )
    heads = MedusaHeads(config, dtype=torch.float32, device=view.device)
    heads.init_weights_(
        output_matrix(base) if has_own_lm_head else None,
        generator=torch.Generator().manual_seed(seed),
    )
    return heads
