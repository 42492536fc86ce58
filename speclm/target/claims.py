"""Who has models and proposers for one generation, and who gets them next."""

import logging
import threading
from _thread import LockType
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from speclm.attention import active_step
from speclm.errors import BusyError
from speclm.forking import temporary

_log = logging.getLogger("speclm")


class NestedError(BusyError):
    """An object is wanted from inside a generation, which cannot wait for it."""


@dataclass(frozen=True, slots=True, eq=False)
class _Ticket:
    """One generation that has its objects, or waits for them.

    Args:
        wanted: The objects by id, and their names. Kept here so that an id is no other's.
        thread: Where the generation runs; unlike its number, no later thread is the same.
        gate: Locked until the generation ends. A ``with`` statement locks and unlocks it, because
            no interrupt can come between a lock and such a statement.
    """

    wanted: dict[int, tuple[object, str]]
    thread: threading.Thread
    gate: LockType = field(default_factory=threading.Lock)

    def shared_name(self, other: "_Ticket") -> str | None:
        """Return the name of an object that both want, None without one."""
        return next((name for key, (_, name) in self.wanted.items() if key in other.wanted), None)

    def leave(self) -> None:
        """Leave the queue; of no effect outside of it."""
        with suppress(ValueError):
            _QUEUE.remove(self)


_QUEUE: list[_Ticket] = []
"""Generations in the order of their calls. One has its objects when none before it wants any of
them, so that having and waiting are no state that could be left wrong. Adding and removing are
atomic; a lock could not be pickled with a model."""


@contextmanager
def exclusive(wanted: Sequence[tuple[object, str]], *, waits: bool = True) -> Iterator[None]:
    """Have models and proposers for one generation, all of them at once.

    Who came first is first. A thread that waits has nothing, so that no two wait for each other.

    Args:
        wanted: Objects whose state is that of one generation, and what messages call them.
        waits: Whether to wait while another thread has one of them.

    Raises:
        NestedError: If this thread has one of them, or has others and would have to wait.
        BusyError: If another thread has one of them and `waits` is False, or if this thread is in
            a forward of one.
    """
    here = threading.current_thread()
    ticket = _Ticket({id(thing): (thing, name) for thing, name in wanted}, here)
    queue = _QUEUE.copy()
    for ended in [other for other in queue if not other.gate.locked()]:
        ended.leave()  # an interrupt kept it from doing so
    own = [other for other in queue if other.thread is here and other.gate.locked()]
    for outer in own:
        name = ticket.shared_name(outer)
        if name is not None:
            raise _nested(name)
    with temporary(ticket.leave), ticket.gate:
        _QUEUE.append(ticket)
        _wait(ticket, is_nested=bool(own), waits=waits)
        yield


def _wait(ticket: _Ticket, *, is_nested: bool, waits: bool) -> None:
    """Return when no earlier ticket wants what this one wants."""
    queue, has_logged = _QUEUE.copy(), False
    for earlier in queue[: queue.index(ticket)]:
        name = ticket.shared_name(earlier)
        if name is None or not earlier.gate.locked():
            continue
        place = f"in thread {earlier.thread.name!r}"
        if is_nested:
            raise NestedError(
                f"{name} is generating already, {place}, and a call from inside another generation "
                "does not wait"
            )
        if not waits:
            raise BusyError(
                f"{name} is generating already, {place}; call generate with busy='wait', or give "
                "each thread a model object and a proposer of its own"
            )
        if not has_logged:
            has_logged = True
            _log.debug("waiting for %s, which is generating %s", name, place)
        with earlier.gate:  # waits; Ctrl-C interrupts it
            pass


def _nested(name: str) -> BusyError:
    if active_step() is not None:
        return BusyError(
            f"{name} is generating already, in this thread, which is in a forward of that "
            "generation; generate in a logits processor, criterion or streamer, not in a hook"
        )
    return NestedError(f"{name} is generating already, in this thread, and called from inside")
