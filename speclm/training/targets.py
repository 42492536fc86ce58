"""Tokens that heads learn or are measured on: where they are, and how many there are."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -100
"""Marks a missing target: the token is beyond the text or not the assistant's."""


def shifted_targets(
    tokens: Int[Tensor, "batch seq"], loss_mask: Bool[Tensor, "batch seq"], *, num_drafted: int
) -> Int[Tensor, "batch seq drafted"]:
    """Return the tokens to draft from each position.

    From the hidden state at position t the target itself predicts token t + 1. Draft token i is
    token ``t + 2 + i``. The mask moves with the token: a target counts if its token is the
    assistant's.

    Args:
        tokens: Texts, padded on the right.
        loss_mask: True at tokens that count.
        num_drafted: Draft tokens at each position.

    Returns:
        Targets, `IGNORED` if none counts.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7, 8]])
        >>> mask = torch.tensor([[False, False, True, True]])
        >>> shifted_targets(tokens, mask, num_drafted=2).tolist()
        [[[7, 8], [8, -100], [-100, -100], [-100, -100]]]
    """
    counted = tokens.masked_fill(~loss_mask, IGNORED)
    padded = F.pad(counted, (0, num_drafted + 1), value=IGNORED)
    return padded.unfold(1, num_drafted, 1)[:, 2:]  # window t + 2 holds the targets of t


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """The positions of a batch from which tokens are drafted.

    Args:
        indices: Position of each source, padded with 0.
        targets: Token that each step learns to draft there, `IGNORED` if none counts.
    """

    indices: Int[Tensor, "batch sources"]
    targets: Int[Tensor, "batch sources steps"]


def find_sources(
    tokens: Int[Tensor, "batch seq"], loss_mask: Bool[Tensor, "batch seq"], *, num_steps: int
) -> Sources:
    """Return the positions from which some step has a target that counts.

    Step k drafts token ``t + 2 + k`` from position t. The loss mask moves with the target.
    """
    targets = shifted_targets(tokens, loss_mask, num_drafted=num_steps)[:, :-1]
    wanted = (targets >= 0).any(-1)  # [batch, seq - 1]
    max_sources = max(int(wanted.sum(1).max()), 1)
    order = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :max_sources]
    is_source = wanted.gather(1, order)
    found = targets.gather(1, order[:, :, None].expand(-1, -1, num_steps))
    return Sources(order * is_source, found.masked_fill(~is_source[:, :, None], IGNORED))


def next_targets(
    tokens: Int[Tensor, "batch seq"], loss_mask: Bool[Tensor, "batch seq"]
) -> Int[Tensor, "batch seq"]:
    """Return the token after each position, `IGNORED` if it does not count."""
    return F.pad(tokens.masked_fill(~loss_mask, IGNORED)[:, 1:], (0, 1), value=IGNORED)


def count_shifted(
    loss_mask: Bool[Tensor, "batch seq"], *, num_drafted: int, first: int = 2
) -> Float[Tensor, " drafted"]:
    """Return the number of targets of each draft token, as `shifted_targets` has them.

    Args:
        loss_mask: True at tokens that count.
        num_drafted: Draft tokens at each position.
        first: Distance from a position to its first target.
    """
    counted = loss_mask.sum(0)  # [seq]
    counted = F.pad(counted, (0, first + num_drafted))
    return torch.stack([counted[first + index :].sum() for index in range(num_drafted)]).float()


def place_after(
    chosen: Int[Tensor, " positions"],
    positions: Int[Tensor, " positions"],
    loss_mask: Bool[Tensor, "batch seq"],
) -> Int[Tensor, "batch seq"]:
    """Return tokens that were chosen after some positions, each at the position after it.

    Args:
        chosen: The token after each position.
        positions: Indices into the flattened batch.
        loss_mask: True at tokens that count.

    Returns:
        The tokens; `IGNORED` where nothing was chosen or counts, and at the start of each text.

    Example:
        >>> mask = torch.tensor([[True, True, False, True]])
        >>> place_after(torch.tensor([7, 8, 9]), torch.tensor([0, 1, 2]), mask).tolist()
        [[-100, 7, -100, 9]]
    """
    placed = chosen.new_full((loss_mask.numel() + 1,), IGNORED)
    placed[positions + 1] = chosen
    tokens = placed[:-1].view_as(loss_mask).to(loss_mask.device).masked_fill(~loss_mask, IGNORED)
    tokens[:, 0] = IGNORED  # what follows the text before it
    return tokens


def until_first_difference(
    base_tokens: Int[Tensor, "*rows drafted"], tokens: Int[Tensor, "*rows drafted"]
) -> Int[Tensor, "*rows drafted"]:
    """Return the tokens of the base up to the first that differs from the text's.

    What the base would write after that is unknown: its later tokens continue another text.

    Example:
        >>> until_first_difference(torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 9, 8])).tolist()
        [5, 6, 7, -100]
    """
    agrees = F.pad(base_tokens == tokens, (1, 0), value=True)[..., :-1]
    return base_tokens.masked_fill(~agrees.cumprod(-1).bool(), IGNORED)
