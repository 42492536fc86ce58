"""What was committed since a network last drafted, together with the target's features."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.acceptance import Accepted
from speclm.devices import upload


@dataclass(frozen=True, slots=True, eq=False)
class Committed:
    """Tokens of some rounds, joined row by row.

    Args:
        tokens: The tokens; short rows end in anything valid.
        features: The target's features that each token was chosen from.
        counts: Tokens of each row.
    """

    tokens: Int[Tensor, "batch new"]
    features: Float[Tensor, "batch new features"]
    counts: list[int]

    def newest(
        self,
        states: Float[Tensor, "batch new hidden"],
        before: Float[Tensor, "batch hidden"] | None,
    ) -> Float[Tensor, "batch hidden"]:
        """Return each row's state at its last token; that of `before` in a row without any.

        Args:
            states: States at the tokens.
            before: States at the tokens before; None if there are none.
        """
        if min(self.counts) == states.shape[1]:
            return states[:, -1]
        sent = upload(self.counts, states.device)
        last = (sent - 1).clamp_(min=0)[:, None, None]
        newest = states.gather(1, last.expand(-1, -1, states.shape[2]))[:, 0]
        if before is None or min(self.counts) > 0:
            return newest
        return torch.where((sent > 0)[:, None], newest, before)


@dataclass(frozen=True, slots=True, eq=False)
class _Round:
    """What a round committed.

    Args:
        emitted: Tokens of each row.
        tokens: The same, padded with -1 to any width, if the device has them.
        features: The target's features that each token was chosen from.
    """

    emitted: list[list[int]]
    tokens: Int[Tensor, "batch path"] | None
    features: Float[Tensor, "batch path features"]

    def sent(self) -> Int[Tensor, "batch path"]:
        """Return `tokens`, padded with anything valid."""
        width = max(map(len, self.emitted))
        if self.tokens is None:
            padded = [row + [0] * (width - len(row)) for row in self.emitted]
            return upload(padded, self.features.device)
        tokens = self.tokens if self.tokens.shape[1] == width else self.tokens[:, :width]
        return tokens if min(map(len, self.emitted)) == width else tokens.clamp(min=0)


class CommittedRounds:
    """Collects rounds until the next draft, because rounds without one leave several."""

    def __init__(self) -> None:
        """Start without rounds."""
        self._rounds: list[_Round] = []

    def add(self, accepted: Accepted) -> None:
        """Keep what a round committed, if anything."""
        assert accepted.features is not None
        if any(accepted.emitted):
            tokens = None if accepted.sent_path is None else accepted.tokens
            self._rounds.append(_Round(accepted.emitted, tokens, accepted.features))

    def take(self) -> Committed | None:
        """Return everything since the last call; None if there is nothing."""
        if not self._rounds:
            return None
        rounds, self._rounds = self._rounds, []
        counts = [sum(map(len, parts)) for parts in zip(*(r.emitted for r in rounds), strict=True)]
        return Committed(*_joined(rounds, counts), counts)


def _joined(
    rounds: Sequence[_Round], counts: list[int]
) -> tuple[Int[Tensor, "batch new"], Float[Tensor, "batch new features"]]:
    """Return tokens and features of some rounds, row by row; short rows end in anything valid.

    Args:
        rounds: The rounds.
        counts: Tokens of each row.
    """
    widths = [max(map(len, r.emitted)) for r in rounds]
    tokens = [r.sent() for r in rounds]
    features = [
        r.features if r.features.shape[1] == width else r.features.narrow(1, 0, width)
        for r, width in zip(rounds, widths, strict=True)
    ]
    if len(rounds) == 1:
        return tokens[0], features[0]
    all_tokens, all_features = torch.cat(tokens, dim=1), torch.cat(features, dim=1)
    if len(counts) == 1:
        return all_tokens, all_features
    rows: list[list[int]] = [[] for _ in counts]
    for r, first in zip(rounds, accumulate(widths, initial=0), strict=False):
        for own, emitted in zip(rows, r.emitted, strict=True):
            own.extend(range(first, first + len(emitted)))
    longest = max(counts)
    indices = upload([row + [0] * (longest - len(row)) for row in rows], all_tokens.device)
    of_features = indices[:, :, None].expand(-1, -1, all_features.shape[2])
    return all_tokens.gather(1, indices), all_features.gather(1, of_features)
