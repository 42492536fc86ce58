"""Keep a base and its proposer together: check that they fit, move both, notice heads that miss."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from speclm.drafting.interface import Proposer
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.generation.regular import NeedsRegularGeneration
from speclm.stats import SpeculationStats
from speclm.target import TargetView, exclusive

_log = logging.getLogger("speclm")

_REMEDY = "build it with target=base, or wrap the base that it was built for"

MOVES = frozenset(
    {
        "_apply",  # called by the module that a SpecModel is put into
        *("bfloat16", "cpu", "cuda", "double", "eval", "float", "half", "requires_grad_", "to"),
        "train",
    }
)
"""Methods that change a module and return it; they apply to heads and draft models too."""

ROUNDS_BEFORE_WARNING = 200
"""Rounds without an accepted token; heads right in 1 round of 20 reach it 1 time in 28 000."""

FEWEST_DRAFTS = 16
"""Minimum drafts among those rounds; useless drafts are soon paused, so few rounds have one."""

_WHAT_TO_CHECK = (
    "check that the heads or the draft model were trained for this very base (its fine-tuned "
    "versions are others), with its tokenizer and vocabulary, that the layer ids in the heads' "
    "config are those of their training, and that base and heads have the dtype of their training"
)


def require_fits(proposer: Proposer, target: TargetView) -> None:
    """Check that a target is what a proposer and its parts need.

    Raises:
        VocabularyMismatchError: If one was built for another vocabulary.
        OptionError: If one was built for another width, or computes with another model.
    """
    for part in _with_parts(proposer):
        needs, name = part.needs, type(part).__name__
        if needs.vocab_size not in {None, target.vocab_size}:
            raise VocabularyMismatchError(
                f"{name} was built for a vocabulary of {needs.vocab_size}, the base {target.name} "
                f"has one of {target.vocab_size}; {_REMEDY}"
            )
        if needs.hidden_size not in {None, target.hidden_size}:
            raise OptionError(
                f"{name} was built for hidden states {needs.hidden_size} wide, those of the base "
                f"{target.name} are {target.hidden_size} wide; {_REMEDY}"
            )
        if needs.model is not None and needs.model is not target.model:
            found = TargetView(needs.model).name
            raise OptionError(
                f"{name} uses the output matrix of another model object, {found}, expected that "
                f"of the base {target.name}; {_REMEDY}"
            )


def require_still_fits(proposer: Proposer | None, target: TargetView) -> None:
    """Check before a call that a proposer still fits; embeddings may have been resized.

    Raises:
        NeedsRegularGeneration: If it no longer fits; the message says why.
    """
    if proposer is None:
        return
    try:
        require_fits(proposer, target)
    except (VocabularyMismatchError, OptionError) as error:
        raise NeedsRegularGeneration(str(error)) from error


@contextmanager
def claimed(target: TargetView, proposer: Proposer | None, *, waits: bool = True) -> Iterator[None]:
    """Hold a target, a proposer and its parts for one generation, all of them at once.

    Args:
        target: The target.
        proposer: Drafts for it.
        waits: Whether to wait while another thread holds one of them.

    Raises:
        NestedError: If the call comes from inside a generation and cannot wait.
        BusyError: If another thread holds one of them and `waits` is False.
    """
    parts = _with_parts(proposer)
    wanted = [(target.model, target.name), *((part, type(part).__name__) for part in parts)]
    with exclusive(wanted, waits=waits):
        yield


def _with_parts(proposer: Proposer | None) -> Iterator[Proposer]:
    if proposer is not None:
        yield proposer
        for part in proposer.parts:
            yield from _with_parts(part)


def proposer_modules(proposer: Proposer | None) -> Iterator[nn.Module]:
    """Yield the networks that a proposer and its parts hold as attributes; some may come twice."""
    for part in _with_parts(proposer):
        if isinstance(part, nn.Module):
            yield part
        for value in vars(part).values():
            if isinstance(value, TargetView):
                yield value.model
            elif isinstance(value, nn.Module):
                yield value


def move(model: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call one of `MOVES` on a model's base and on what its proposer holds; return the model."""
    modules = (model.base, *proposer_modules(model.proposer))
    for module in {id(module): module for module in modules}.values():
        getattr(module, name)(*args, **kwargs)
    return model


@dataclass(slots=True)
class _Tally:
    """Counters of one proposer.

    Args:
        proposer: The proposer, as long as it exists.
        num_misses: Drafts since the last accepted token; each row counts its own.
        num_rounds: Rounds since then, including those without a draft.
        is_checked: Whether its weights were checked.
        has_warned: Whether a line was logged.
    """

    proposer: "weakref.ref[Proposer]"
    num_misses: int = 0
    num_rounds: int = 0
    is_checked: bool = False
    has_warned: bool = False


class MissWatch:
    """Counts, over the calls of a model, the rounds of each proposer without an accepted token.

    Logs one line if a proposer with weights was rejected for too long, or has drafted nothing for
    as long and its weights are unusable. Other proposers, such as n-grams, may just have nothing
    to copy.
    """

    def __init__(self) -> None:
        self._tallies: list[_Tally] = []  # proposers need not be hashable

    def __reduce__(self) -> tuple[Any, ...]:
        return MissWatch, ()  # a copied model has copies of the proposers too

    def look(
        self, proposer: Proposer | None, stats: SpeculationStats, *, target: TargetView
    ) -> None:
        """Count the rounds of a call that has ended.

        Args:
            proposer: The proposer of the call.
            stats: Counters of the call.
            target: The base, for the message.
        """
        if proposer is None:
            return
        tally = self._tally(proposer)
        # The first level counts drafts; a draft of only the root does not count.
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
            return  # the proposer may be unsure, or the text too long for it
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


def _bad_weights(proposer: Proposer) -> Iterator[str]:
    """Yield a description of each weight that is not finite or all zero; syncs with its device."""
    for module in proposer_modules(proposer):
        for name, weight in module.named_parameters():
            if weight.is_meta or not weight.is_floating_point():
                continue
            if not weight.isfinite().all():
                yield f"its weight {name!r} holds numbers that are not finite"
            if weight.dim() > 1 and not weight.any():
                yield f"its weight {name!r} is all zero, as if it was not trained or not loaded"
