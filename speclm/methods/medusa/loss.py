"""What Medusa heads learn: which token each head is asked for, and what a wrong guess costs."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -100
"""Stands for "no target": the token lies beyond the row or is not the assistant's."""


def shifted_targets(
    tokens: Int[Tensor, "batch seq"], loss_mask: Bool[Tensor, "batch seq"], *, num_heads: int
) -> Int[Tensor, "batch seq heads"]:
    """Return the token that each head is to guess from each position.

    Head i reads the hidden state at position t, from which the target itself guesses token
    t + 1, and guesses token ``t + 2 + i``. The mask moves with the token: what counts is whether
    the guessed token is the assistant's.

    Args:
        tokens: Rows, padded on the right.
        loss_mask: True at tokens that count.
        num_heads: Heads.

    Returns:
        Targets, `IGNORED` where none counts.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7, 8]])
        >>> mask = torch.tensor([[False, False, True, True]])
        >>> shifted_targets(tokens, mask, num_heads=2).tolist()
        [[[7, 8], [8, -100], [-100, -100], [-100, -100]]]
    """
    counted = tokens.masked_fill(~loss_mask, IGNORED)
    padded = F.pad(counted, (0, num_heads + 1), value=IGNORED)
    return padded.unfold(1, num_heads, 1)[:, 2:]  # window t + 2 holds the targets of t


def score_guesses(
    logits: Float[Tensor, "rows heads vocab"],
    targets: Int[Tensor, "rows heads"],
    *,
    soft_targets: Float[Tensor, "rows heads vocab"] | None = None,
    soft_weight: float = 0.0,
) -> tuple[Float[Tensor, "rows heads"], Int[Tensor, "rows heads"]]:
    """Return the cross-entropy of each guess and the rank it gave to the target.

    Args:
        logits: What the heads say.
        targets: As `shifted_targets` returns them.
        soft_targets: Probabilities to learn besides the targets.
        soft_weight: Share of the cross-entropy against `soft_targets`; the rest is against the
            targets.

    Returns:
        Losses, 0 where there is no target, and ranks, 0 for the best guess and -1 where there is
        no target.
    """
    logits = logits.float()
    is_counted = targets != IGNORED
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    if soft_targets is not None:
        expected = (soft_targets * logits).sum(-1)
        soft = (logits.logsumexp(-1) - expected).masked_fill(~is_counted, 0.0)
        losses = (1 - soft_weight) * losses + soft_weight * soft
    with torch.no_grad():
        own = logits.gather(2, targets.clamp(min=0)[..., None])
        ranks = (logits > own).sum(-1).masked_fill(~is_counted, -1)
    return losses, ranks


def weighted_loss(
    loss_sums: Float[Tensor, " heads"], counts: Int[Tensor, " heads"], *, decay: float
) -> Float[Tensor, ""]:
    """Return the sum over heads of ``decay ** i`` times the mean loss of head i.

    Args:
        loss_sums: Sum of the losses of each head.
        counts: Targets of each head; a head without any adds nothing.
        decay: Weight of a head relative to the one before it.
    """
    means = loss_sums / counts.clamp(min=1)
    weights = decay ** torch.arange(len(means), device=means.device)
    return (weights * means).sum()
