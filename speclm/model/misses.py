"""Notices proposers whose guesses are never accepted, and says what to check."""

import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from speclm.drafting.interface import Proposer
from speclm.model.standing_in import proposer_modules
from speclm.stats import SpeculationStats
from speclm.target import TargetView

_log = logging.getLogger("speclm")

ROUNDS_BEFORE_WARNING = 200
"""Without an accepted token: 1 in 28 000 heads that are right in a round of 20 has so many."""

FEWEST_DRAFTS = 16
"""Drafts among those rounds: useless ones are soon paused, and then few rounds have one."""


@dataclass(slots=True)
class _Tally:
    """Counters of one proposer.

    Args:
        proposer: It; None once it is gone.
        num_misses: Drafts since a token of one was accepted; each row has its own.
        num_rounds: Rounds since then, those included in which it was not asked.
        is_checked: Whether its weights were looked at.
        has_warned: Whether a line was logged.
    """

    proposer: "weakref.ref[Proposer]"
    num_misses: int = 0
    num_rounds: int = 0
    is_checked: bool = False
    has_warned: bool = False


class MissWatch:
    """Counts, over the calls of a model, the rounds of each proposer without an accepted token.

    One line is logged when a proposer with weights of its own has been wrong too often, or has
    drafted nothing for as long and its weights are no use. Others, such as n-grams, may just have
    nothing to copy.
    """

    def __init__(self) -> None:
        self._tallies: list[_Tally] = []  # proposers need not be hashable

    def __reduce__(self) -> tuple[Any, ...]:
        return MissWatch, ()  # a copied model has copies of the proposers too

    def look(
        self, proposer: Proposer | None, stats: SpeculationStats, *, target: TargetView
    ) -> None:
        """Take note of a call that has ended.

        Args:
            proposer: That drafted.
            stats: Counters of the call.
            target: The base, for the message.
        """
        if proposer is None:
            return
        tally = self._tally(proposer)
        # The first level counts drafts: those of the root only are none.
        if any(sum(row.accepted[:1]) for row in stats.rows):
            tally.num_misses = tally.num_rounds = 0
            return
        tally.num_misses += sum(sum(row.offered[:1]) for row in stats.rows)
        tally.num_rounds += stats.rounds
        has_waited = tally.num_rounds >= ROUNDS_BEFORE_WARNING
        is_wrong = tally.num_misses >= (FEWEST_DRAFTS if has_waited else ROUNDS_BEFORE_WARNING)
        is_silent = has_waited and not tally.is_checked
        if tally.has_warned or not (is_wrong or is_silent):
            return
        if next(proposer_modules(proposer), None) is None:
            return
        tally.is_checked = True
        found = list(islice(_bad_weights(proposer), 1))
        if not (is_wrong or found):
            return  # it may be unsure, or the text too long for it
        tally.has_warned = True
        _log.warning(
            "in the last %d rounds %s accepted no token of %s, which only costs time; %s",
            max(tally.num_misses, tally.num_rounds),
            target.name,
            type(proposer).__name__,
            "; ".join([*found, _WHAT_TO_CHECK]),
        )

    def _tally(self, proposer: Proposer) -> _Tally:
        self._tallies = [tally for tally in self._tallies if tally.proposer() is not None]
        for tally in self._tallies:
            if tally.proposer() is proposer:
                return tally
        self._tallies.append(_Tally(weakref.ref(proposer)))
        return self._tallies[-1]


_WHAT_TO_CHECK = (
    "check that the heads or the draft model were trained for this very base (its fine-tuned "
    "versions are others), with its tokenizer and vocabulary, that the layer ids in the heads' "
    "config are those of their training, and that base and heads have the dtype of their training"
)


def _bad_weights(proposer: Proposer) -> Iterator[str]:
    """Yield what is wrong with weights that cannot be meant so; syncs with their device."""
    for module in proposer_modules(proposer):
        for name, weight in module.named_parameters():
            if weight.is_meta or not weight.is_floating_point():
                continue
            if not weight.isfinite().all():
                yield f"its weight {name!r} holds numbers that are not finite"
            if weight.dim() > 1 and not weight.any():
                yield f"its weight {name!r} is all zero, as if it was not trained or not loaded"
