"""Measure how well heads draft during training: loss, accuracy and estimated tau."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.adaptive.acceptance_rates import Ranks, replay_rounds
from speclm.tree.static import RankPaths

MAX_TOP = 3
"""Accuracy is measured among the 1, 2, ... best candidates up to this number."""


class AcceptanceMeter:
    """Accumulates batches until the figures are read.

    A draft token is right if it is the token that the base itself would write there; the token of
    the data does not matter. The rank of the base's token, given that all draft tokens before it
    are right, shows which nodes of a tree would have been accepted. This is known as far as the
    data agrees with the base: what follows a token that the base would not have written is the
    continuation of another text, so a chain of draft tokens ends there at the latest.

    With these ranks the meter replays rounds over each assistant turn of the data. Rounds emit
    every token of a turn but the first, which the prefill emits; the number of these tokens per
    round is the tau of generating the same text. It is that of decoding if the base wrote the data,
    and lower the less the data agrees with it.
    """

    def __init__(
        self, choices: RankPaths, *, num_drafted: int, name: str, num_named: int | None = None
    ) -> None:
        """Start at zero.

        Args:
            choices: Paths of the static tree whose tau is estimated.
            num_drafted: Draft tokens at every position: heads, or steps of the same heads.
            name: Name of one of them in the figures, followed by its number.
            num_named: How many of them have figures of their own; None for all.
        """
        self._choices = choices
        self._num_drafted = num_drafted
        self._name = name
        self._num_named = num_drafted if num_named is None else num_named
        self._sums = self._zeros()

    def add(
        self,
        *,
        loss_sums: Float[Tensor, " trained"],
        counts: Int[Tensor, " trained"],
        ranks: Int[Tensor, "batch seq drafted"],
        tokens: Int[Tensor, "batch seq"],
        base_tokens: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
        tree_lengths: Int[Tensor, "batch seq"] | None = None,
    ) -> None:
        """Add a batch; syncs with the device.

        Args:
            loss_sums: Sum of the losses of each draft token; the last ones may have none.
            counts: Number of losses in each sum.
            ranks: Rank of the base's token among the candidates, drafted from the hidden state at
                each position: candidate i is for the token i + 2 positions later. -1 if that token
                does not count.
            tokens: The texts.
            base_tokens: The base's own tokens, see `TrainingModel.base_tokens`.
            loss_mask: True at tokens that the heads learn to draft.
            tree_lengths: Draft tokens that would be accepted from a tree that was grown from the
                hidden state at each position; None if no trees were grown.
        """
        agrees = tokens == base_tokens
        is_known = base_tokens >= 0
        agreement = torch.stack(((agrees & is_known).sum(), is_known.sum())).cpu().double()
        reached = ranks.masked_fill(~_is_reached(agrees, ranks.shape[-1]), -1).cpu()
        flat = ranks.cpu().flatten(0, 1)
        num_targets = (flat >= 0).sum(0)
        hits = [((flat >= 0) & (flat < top)).sum(0) for top in range(1, MAX_TOP + 1)]
        num_untrained = self._num_drafted - len(counts)
        losses = [F.pad(sums.cpu().double(), (0, num_untrained)) for sums in (loss_sums, counts)]
        replayed = [
            (len(turn), len(replay_rounds(turn, self._choices)))
            for turn in turns(reached, loss_mask.cpu())
        ]
        grown = []
        if tree_lengths is not None:
            lengths = turns(tree_lengths.cpu()[:, :, None], loss_mask.cpu())
            grown = [(len(turn), _count_rounds(turn)) for turn in lengths]
        emitted = [
            torch.tensor([[0, 0], *pairs], dtype=torch.float64, device="cpu").sum(0)
            for pairs in (replayed, grown)
        ]
        sums = torch.stack([*losses, num_targets.double(), *(hit.double() for hit in hits)])
        self._sums = self._sums + torch.cat([sums.flatten(), *emitted, agreement])

    def drain(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Return the figures since the last call, and reset them.

        Args:
            reduce: Adds up the sums of all processes.

        Returns:
            With the name "head" ``head0_loss``, ``head0_top1``, ..., ``estimated_tau``,
            ``estimated_tree_tau`` of the grown trees, and ``base_agreement``: the share of tokens
            that the base would write too. Figures without any count are left out.
        """
        *sums, num_tokens, num_rounds, tree_tokens, tree_rounds, num_agreeing, num_known = reduce(
            self._sums.float()
        ).tolist()
        self._sums = self._zeros()
        size = self._num_drafted
        parts = [sums[i : i + size] for i in range(0, len(sums), size)]
        figures = {}
        rows = list(zip(*parts, strict=True))[: self._num_named]
        for index, (loss, count, num_targets, *hits) in enumerate(rows):
            name = f"{self._name}{index}"
            if count:
                figures[f"{name}_loss"] = loss / count
            if num_targets:
                for top, hit in enumerate(hits, 1):
                    figures[f"{name}_top{top}"] = hit / num_targets
        if num_rounds:
            figures["estimated_tau"] = num_tokens / num_rounds
        if tree_rounds:
            figures["estimated_tree_tau"] = tree_tokens / tree_rounds
        if num_known:
            figures["base_agreement"] = num_agreeing / num_known
        return figures

    def _zeros(self) -> Tensor:
        size = (3 + MAX_TOP) * self._num_drafted + 6
        return torch.zeros(size, dtype=torch.float64, device="cpu")


def _is_reached(
    agrees: Bool[Tensor, "batch seq"], num_drafted: int
) -> Bool[Tensor, "batch seq drafted"]:
    """Return whether the text follows the base up to the token before each draft token.

    Draft token i from position t stands at ``t + 2 + i``; the first is always reached.
    """
    windows = F.pad(agrees, (0, num_drafted + 1)).unfold(1, num_drafted, 1)[:, 2:]
    before = F.pad(windows[..., :-1], (1, 0), value=True)
    return before.long().cumprod(-1).bool()


def _count_rounds(lengths: Ranks) -> int:
    """Return the number of rounds in a text, from the accepted length at each root."""
    position = num_rounds = 0
    while position < len(lengths):
        position += 1 + lengths[position][0]
        num_rounds += 1
    return num_rounds


def turns(
    ranks: Int[Tensor, "batch seq drafted"], loss_mask: Bool[Tensor, "batch seq"]
) -> Iterator[Ranks]:
    """Yield the ranks at the roots of each assistant turn, except its last token.

    The draft below the root at position r comes from the hidden state at r - 1. Draft tokens
    beyond the end of the turn get rank -1, even if the next turn begins there.
    """
    edges = F.pad(loss_mask.long(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero().tolist(), (edges == -1).nonzero().tolist()
    values = ranks.tolist()
    num_drafted = ranks.shape[-1]
    for (row, start), (_, end) in zip(starts, ends, strict=True):
        turn = []
        for root in range(max(start, 1), end - 1):
            inside = values[row][root - 1][: end - 1 - root]
            turn.append(inside + [-1] * (num_drafted - len(inside)))
        if turn:
            yield turn
