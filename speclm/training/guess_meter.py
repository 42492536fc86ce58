"""Counts how well heads guess while they are trained, and the tau that decoding would have."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.adaptive.acceptance_rates import Ranks, replay_rounds
from speclm.tree.static import RankPaths

TOP = 3
"""Accuracies are counted among the 1, 2, ... best guesses up to this."""


class GuessMeter:
    """Sums over batches, until they are read.

    The rank of a target, all guesses before it being right, says which nodes of a tree would have
    been accepted, and rounds are replayed over each assistant turn of the data. Every token of a
    turn but the first, which the prefill emits, comes out of a round: their number by that of the
    rounds is what decoding that text would measure as tau.
    """

    def __init__(self, choices: RankPaths, *, num_guesses: int, name: str) -> None:
        """Count for heads that draft a tree.

        Args:
            choices: The tree.
            num_guesses: Guesses at every position: heads, or steps of the same heads.
            name: What one is called in the figures, followed by its number.
        """
        self._choices = choices
        self._num_guesses = num_guesses
        self._name = name
        self._sums = self._zeros()

    def add(
        self,
        *,
        loss_sums: Float[Tensor, " trained"],
        counts: Int[Tensor, " trained"],
        ranks: Int[Tensor, "batch seq guesses"],
        loss_mask: Bool[Tensor, "batch seq"],
    ) -> None:
        """Count a batch; syncs with the device.

        Args:
            loss_sums: Sum of the losses of each guess; the last ones may have none.
            counts: What is summed there.
            ranks: Rank that each guess gave to its target, from the hidden state at each position;
                -1 where there is none.
            loss_mask: True at tokens that the heads are to guess.
        """
        ranks = ranks.cpu()
        flat = ranks.flatten(0, 1)
        asked = (flat >= 0).sum(0)
        hits = [((flat >= 0) & (flat < top)).sum(0) for top in range(1, TOP + 1)]
        untrained = self._num_guesses - len(counts)
        losses = [F.pad(sums.cpu().double(), (0, untrained)) for sums in (loss_sums, counts)]
        replayed = [
            (len(turn), len(replay_rounds(turn, self._choices)))
            for turn in turns(ranks, loss_mask.cpu())
        ]
        emitted = torch.tensor([[0, 0], *replayed], dtype=torch.float64, device="cpu").sum(0)
        by_guess = torch.stack([*losses, asked.double(), *(hit.double() for hit in hits)])
        self._sums = self._sums + torch.cat([by_guess.flatten(), emitted])

    def drain(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the figures since the last call, and start anew.

        Args:
            reduce: Adds up the sums of all processes.

        Returns:
            For guesses named "head" ``head0_loss``, ``head0_top1``, ... of each, and
            ``estimated_tau``; those that nothing was counted for are left out.
        """
        sums = reduce(self._sums.float()).tolist()
        self._sums = self._zeros()
        *by_guess, tokens, rounds = sums
        size = self._num_guesses
        parts = [by_guess[i : i + size] for i in range(0, len(by_guess), size)]
        figures = {}
        for guess, (loss, count, asked, *hits) in enumerate(zip(*parts, strict=True)):
            name = f"{self._name}{guess}"
            if count:
                figures[f"{name}_loss"] = loss / count
            if asked:
                for top, hit in enumerate(hits, 1):
                    figures[f"{name}_top{top}"] = hit / asked
        if rounds:
            figures["estimated_tau"] = tokens / rounds
        return figures

    def _zeros(self) -> Tensor:
        return torch.zeros((3 + TOP) * self._num_guesses + 2, dtype=torch.float64, device="cpu")


def turns(
    ranks: Int[Tensor, "batch seq guesses"], loss_mask: Bool[Tensor, "batch seq"]
) -> Iterator[Ranks]:
    """Yield the ranks at the roots of each assistant turn, its last token left out.

    The root at position r is drafted for from the hidden state at r - 1. Guesses that reach
    beyond the turn get rank -1, also where the next turn begins there.
    """
    edges = F.pad(loss_mask.long(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    values = ranks.tolist()
    num_guesses = ranks.shape[-1]
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        turn = []
        for root in range(max(start, 1), end - 1):
            inside = values[row][root - 1][: end - 1 - root]
            turn.append(inside + [-1] * (num_guesses - len(inside)))
        if turn:
            yield turn
