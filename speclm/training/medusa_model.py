"""The module that is trained: Medusa heads on top of a frozen base."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from speclm.config import require_in_range
from speclm.heads import MedusaHeads
from speclm.target import TargetView
from speclm.training.medusa_loss import IGNORED, score_guesses, shifted_targets, weighted_loss

MAX_LOGITS = 2**27
"""Logits that are kept for the backward pass, half a gigabyte; beyond, they are recomputed."""


@dataclass(frozen=True, slots=True)
class MedusaObjective:
    """What the heads are trained for.

    Args:
        decay: Weight of a head's loss relative to that of the head before it; later guesses are
            reached less often.
        soft_weight: Share of the loss that is taken against the base's own law at the target's
            position instead of the token of the data; it costs no further forward of the base.
    """

    decay: float = 0.8
    soft_weight: float = 0.0

    def __post_init__(self) -> None:
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        require_in_range("soft_weight", self.soft_weight, low=0.0, high=1.0)


class MedusaTrainingModel(nn.Module):
    """Computes the loss of Medusa heads from one forward of the base.

    The base is frozen, put into eval mode and kept outside the module tree: parameters and state
    are those of the heads alone, and wrappers for several devices leave the base where it is.
    """

    def __init__(
        self, base: PreTrainedModel, heads: MedusaHeads, *, objective: MedusaObjective
    ) -> None:
        """Put heads on a base.

        Args:
            base: A causal language model; its parameters stop requiring gradients.
            heads: Heads of the base's width and vocabulary.
            objective: What they are trained for.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
        """
        super().__init__()
        self.view = TargetView(base)
        base.requires_grad_(requires_grad=False)
        base.train(mode=False)
        self.heads = heads
        self.objective = objective

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """Return the loss of a batch and what its figures are made of.

        Args:
            input_ids: Rows, padded on the right.
            attention_mask: 1 at tokens, 0 at padding.
            loss_mask: True at tokens that the heads are to guess.

        Returns:
            ``loss``; of each head ``loss_sums`` and ``counts``; and ``ranks``
            ``[batch, seq, heads]`` of the targets, -1 where there is none.
        """
        targets = shifted_targets(input_ids, loss_mask, num_heads=self.heads.num_heads)
        hidden = self._base_hidden(input_ids, attention_mask)
        sources = (targets != IGNORED).any(-1).flatten().nonzero()[:, 0]
        targets = targets.flatten(0, 1)
        loss_sums, found = self._score(hidden, sources, targets[sources])
        counts = (targets != IGNORED).sum(0)
        ranks = torch.full_like(targets, -1)
        ranks[sources] = found
        return {
            "loss": weighted_loss(loss_sums, counts, decay=self.objective.decay),
            "loss_sums": loss_sums.detach(),
            "counts": counts,
            "ranks": ranks.view(*input_ids.shape, -1),
        }

    @torch.no_grad()
    def _base_hidden(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Return what the base's output matrix would read, without computing logits."""
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
    ) -> tuple[Float[Tensor, " heads"], Int[Tensor, "rows heads"]]:
        """Return the sums of the losses and the ranks, in chunks if memory asks for it."""
        logits_per_row = targets.shape[1] * self.view.vocab_size
        size = max(1, MAX_LOGITS // logits_per_row)
        if len(sources) <= size:
            return self._score_chunk(hidden, sources, targets)
        parts = [
            checkpoint(self._score_chunk, hidden, *chunk, use_reentrant=False)
            for chunk in zip(torch.split(sources, size), torch.split(targets, size), strict=True)
        ]
        sums, ranks = zip(*parts, strict=True)
        return torch.stack(sums).sum(0), torch.cat(ranks)

    def _score_chunk(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        sources: Int[Tensor, " rows"],
        targets: Int[Tensor, "rows heads"],
    ) -> tuple[Float[Tensor, " heads"], Int[Tensor, "rows heads"]]:
        device = self.heads.weight.device
        rows = hidden[sources.to(hidden.device)].to(device)
        logits = self.heads(rows, lm_head=self._lm_head)
        soft = self.objective.soft_weight
        law = self._base_law(hidden, sources, targets).to(device) if soft else None
        losses, ranks = score_guesses(logits, targets, soft_targets=law, soft_weight=soft)
        return losses.sum(0), ranks

    def _lm_head(self, states: Tensor) -> Tensor:
        # Heads are trained in float32 above a base that may be narrower, or on another device.
        view = self.view
        return view.head_logits(states.to(view.model.dtype)).to(states.device)

    @torch.no_grad()
    def _base_law(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        sources: Int[Tensor, " rows"],
        targets: Int[Tensor, "rows heads"],
    ) -> Float[Tensor, "rows heads vocab"]:
        """Return the base's law of each target, from the hidden state before it."""
        ahead = 1 + torch.arange(targets.shape[1], device=sources.device)
        # Without a target there may be no such position; any does then.
        positions = (sources[:, None] + ahead).where(targets != IGNORED, sources[:, None])
        needed, where = torch.unique(positions.to(hidden.device), return_inverse=True)
        return self.view.head_logits(hidden[needed]).float().softmax(-1)[where]
