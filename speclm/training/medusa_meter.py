"""Counts how well heads guess while they are trained, and the tau that decoding would have."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from speclm.generation.calibrate import Ranks, replay_rounds
from speclm.tree.choices import Choices

TOP = 3
"""Accuracies are counted among the 1, 2, ... best guesses up to this."""


class MedusaMeter:
    """Sums over batches, until they are read.

    Heads see one hidden state only, so the ranks of the targets say which nodes of a tree would
    have been accepted, and rounds are replayed over each assistant turn of the data. Every token of
    a turn but the first, which the prefill emits, comes out of a round: their number by that of the
    rounds is what decoding that text would measure as tau.
    """

    def __init__(self, choices: Choices, *, num_heads: int) -> None:
        """Count for heads that draft a tree.

        Args:
            choices: The tree.
            num_heads: Heads.
        """
        self._choices = choices
        self._num_heads = num_heads
        self._sums = self._zeros()

    def add(
        self,
        *,
        loss_sums: Tensor,
        counts: Tensor,
        ranks: Int[Tensor, "batch seq heads"],
        loss_mask: Bool[Tensor, "batch seq"],
    ) -> None:
        """Count a batch, given as `MedusaTrainingModel` returns it; syncs with the device."""
        ranks = ranks.cpu()
        flat = ranks.flatten(0, 1)
        hits = [((flat >= 0) & (flat < top)).sum(0) for top in range(1, TOP + 1)]
        by_head = torch.stack([loss_sums.cpu(), counts.cpu(), *hits]).double()
        replayed = [
            (len(turn), len(replay_rounds(turn, self._choices)))
            for turn in turns(ranks, loss_mask.cpu())
        ]
        emitted = torch.tensor([[0, 0], *replayed], dtype=torch.float64).sum(0)
        self._sums = self._sums + torch.cat([by_head.flatten(), emitted])

    def drain(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the figures since the last call, and start anew.

        Args:
            reduce: Adds up the sums of all processes.

        Returns:
            ``head0_loss``, ``head0_top1``, ... of each head, and ``estimated_tau``; those that
            nothing was counted for are left out.
        """
        sums = reduce(self._sums.float()).tolist()
        self._sums = self._zeros()
        *by_head, tokens, rounds = sums
        heads = self._num_heads
        losses, counts, *hits = (by_head[i : i + heads] for i in range(0, len(by_head), heads))
        figures = {}
        for head, count in enumerate(counts):
            if not count:
                continue
            figures[f"head{head}_loss"] = losses[head] / count
            for top, hit in enumerate(hits, 1):
                figures[f"head{head}_top{top}"] = hit[head] / count
        if rounds:
            figures["estimated_tau"] = tokens / rounds
        return figures

    def _zeros(self) -> Tensor:
        return torch.zeros((2 + TOP) * self._num_heads + 2, dtype=torch.float64)


def turns(
    ranks: Int[Tensor, "batch seq heads"], loss_mask: Bool[Tensor, "batch seq"]
) -> Iterator[Ranks]:
    """Yield the ranks at the roots of each assistant turn, its last token left out.

    The root at position r is drafted for from the hidden state at r - 1. Guesses that reach
    beyond the turn get rank -1, also where the next turn begins there.
    """
    edges = torch.nn.functional.pad(loss_mask.long(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    values = ranks.tolist()
    num_heads = ranks.shape[-1]
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        turn = []
        for root in range(max(start, 1), end - 1):
            inside = values[row][root - 1][: end - 1 - root]
            turn.append(inside + [-1] * (num_heads - len(inside)))
        if turn:
            yield turn
