"""What EAGLE heads learn: the target's distribution and, in EAGLE-1, its features."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.methods.medusa.loss import IGNORED, shifted_targets


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """The slots of a batch that are trained on.

    Args:
        indices: Slot of each source, padded with 0.
        targets: Token that each step is to guess there, `IGNORED` where none counts.
    """

    indices: Int[Tensor, "batch sources"]
    targets: Int[Tensor, "batch sources steps"]


def find_sources(
    tokens: Int[Tensor, "batch seq"], loss_mask: Bool[Tensor, "batch seq"], *, num_steps: int
) -> Sources:
    """Return the slots from which any step has a token to guess that counts.

    Step k guesses token ``t + 2 + k`` from slot t. The mask moves with the token.

    Args:
        tokens: Rows, padded on the right.
        loss_mask: True at tokens that count.
        num_steps: Steps.
    """
    targets = shifted_targets(tokens, loss_mask, num_heads=num_steps)[:, :-1]
    wanted = (targets >= 0).any(-1)  # [batch, slots]
    longest = max(int(wanted.sum(1).max()), 1)
    order = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :longest]
    is_source = wanted.gather(1, order)
    found = targets.gather(1, order[:, :, None].expand(-1, -1, num_steps))
    return Sources(order * is_source, found.masked_fill(~is_source[:, :, None], IGNORED))


def distribution_loss(
    logits: Float[Tensor, "*rows draft_vocab"],
    distribution: Float[Tensor, "*rows draft_vocab"],
) -> Float[Tensor, "*rows"]:
    """Return the cross-entropy of guesses against the target's distribution."""
    logits = logits.float()
    return logits.logsumexp(-1) - (distribution * logits).sum(-1)


def feature_loss(
    hidden: Float[Tensor, "*rows hidden"], wanted: Float[Tensor, "*rows hidden"]
) -> Float[Tensor, "*rows"]:
    """Return the mean smooth L1 distance of each row.

    Source: Li et al. 2024 (EAGLE), feature regression.
    """
    return F.smooth_l1_loss(hidden.float(), wanted.float(), reduction="none").mean(-1)


@torch.no_grad()
def rank_targets(
    logits: Float[Tensor, "rows draft_vocab"],
    targets: Int[Tensor, " rows"],
    columns: Int[Tensor, " draft_vocab"] | None,
) -> Int[Tensor, " rows"]:
    """Return the rank that guesses gave to tokens of the target.

    Args:
        logits: The guesses.
        targets: Ids of the target; negative where there is none.
        columns: The target's token of each column, increasing; None if each has its own.

    Returns:
        0 for the best guess, as many as there are columns for a token without one, and -1 where
        there is none.
    """
    wanted = targets.clamp(min=0)
    if columns is None:
        has_column = torch.ones_like(wanted, dtype=torch.bool)
    else:
        column = torch.searchsorted(columns, wanted).clamp(max=len(columns) - 1)
        has_column = columns[column] == wanted
        wanted = column
    own = logits.gather(-1, wanted[:, None])
    ranks = (logits > own).sum(-1).masked_fill(~has_column, logits.shape[-1])
    return ranks.masked_fill(targets < 0, -1)
