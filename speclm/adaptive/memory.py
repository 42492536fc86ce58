"""What calls learn for later ones: records of one model, and times of forwards on a machine."""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Hashable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.files.atomic import cache_folder, read_json, write_json
from speclm.self_check.fingerprint import Fingerprint
from speclm.target import Session
from speclm.tree.topology import from_parents

if TYPE_CHECKING:
    from speclm.adaptive.tuner import TreeTuner

SIZES = (1, 2, 3, 5, 9, 13, 17, 25, 33, 49)
"""Numbers of nodes per row, root included, whose forwards are timed."""

MAX_RATIO = 5.0
"""A forward may take this many times as long as one over the roots; slower trees rarely pay."""

_VERSION = 1
_REPEATS = 3
_LONG = 0.2  # seconds of a forward that is not repeated
_MAX_RECORDS = 128

Timings = tuple[tuple[int, float], ...]
"""Nodes and seconds, ascending in both."""

Record = TypeVar("Record")

_log = logging.getLogger("speclm")
_IN_MEMORY: dict[tuple[Path | None, str], Timings] = {}
"""Timings of this process, by cache folder and digest."""


class Memory:
    """What the calls of one `SpecModel` learn, for the next calls.

    Args:
        explores_always: Whether every round has a tree to learn from, and no plan is made.

    Attributes:
        timings: Times of forwards by `bucket_of_rows` and `bucket_of_context`.
        last_tuner: The tuner of the last call with ``tree="auto"``.
    """

    def __init__(self, *, explores_always: bool = False) -> None:
        self.explores_always = explores_always
        self.timings: dict[tuple[int, int], Timings] = {}
        self.last_tuner: TreeTuner | None = None
        self._records: dict[Hashable, Any] = {}
        self._proposer: object = None

    def begin_call(self, proposer: object) -> None:
        """Start a call; records of another proposer are forgotten."""
        if proposer is not self._proposer:
            self._records.clear()
            self._proposer = proposer

    def recall(self, key: Hashable, make: Callable[[], Record]) -> Record:
        """Return the record of a key, made if it is new; the oldest of many is forgotten."""
        if key not in self._records:
            if len(self._records) >= _MAX_RECORDS:
                del self._records[next(iter(self._records))]
            self._records[key] = make()
        record: Record = self._records[key]
        return record


def bucket_of_rows(batch: int) -> int:
    """Return the exponent of the next power of two."""
    return (max(batch, 1) - 1).bit_length()


def bucket_of_context(num_tokens: int) -> int:
    """Return 0 for contexts shorter than 512 tokens, and one more for each doubling."""
    return (max(num_tokens, 0) // 512).bit_length()


def forward_timings(
    model: Fingerprint | None,
    session: Session,
    roots: Int[Tensor, " batch"],
    *,
    context: int,
    max_length: int,
) -> Timings:
    """Return the times of a generation's forwards; measure them if they are not known.

    Args:
        model: Fingerprint of the target, taken while no hook reads its features. None for a model
            that cannot be recognised again.
        session: A session that takes trees and has no pending nodes.
        roots: Any tokens.
        context: Tokens in the session's cache.
        max_length: Length at which every row ends.
    """
    if model is None:
        return measure_forwards(session, roots, max_length=max_length)
    digest = timings_digest(model, batch=len(roots), context=context)
    known = find_timings(digest, is_lasting=model.is_lasting)
    if known is None:
        known = measure_forwards(session, roots, max_length=max_length)
        keep_timings(digest, known, is_lasting=model.is_lasting)
    return known


def measure_forwards(
    session: Session,
    roots: Int[Tensor, " batch"],
    *,
    max_length: int,
    clock: Callable[[], float] = perf_counter,
) -> Timings:
    """Time forwards over trees of several sizes during a generation.

    The nodes are dropped again, so the generation continues unchanged. Measuring ends at the size
    whose forward takes `MAX_RATIO` times as long as one over the roots.

    Args:
        session: A session that takes trees and has no pending nodes.
        roots: Any tokens.
        max_length: Length at which every row ends.
        clock: Returns seconds.
    """
    found: list[tuple[int, float]] = []
    for size in SIZES:
        topology = from_parents([[0] * size], device=roots.device)
        tokens = roots[:, None].expand(-1, size)
        best = math.inf
        for repeat in range(1 + _REPEATS):
            start = clock()
            logits = session.verify(tokens, topology, max_length=max_length)
            float(logits[0, 0, 0])  # a sync: accelerators compute asynchronously
            seconds = clock() - start
            session.keep([[] for _ in range(len(roots))])
            if repeat == 0:
                continue  # the first one of a size is slow
            best = min(best, seconds)
            if seconds >= _LONG:
                break
        best = max(best, found[-1][1] if found else 0.0)  # more nodes never take less
        found.append((size, best))
        if best > MAX_RATIO * found[0][1]:
            break
    return tuple(found)


def timings_digest(model: Fingerprint, *, batch: int, context: int) -> str:
    """Return a digest of what timings depend on: model, device, sizes, buckets and threads."""
    buckets = (bucket_of_rows(batch), bucket_of_context(context))
    parts = (_VERSION, SIZES, model.digest, *buckets, torch.get_num_threads())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def find_timings(digest: str, *, is_lasting: bool) -> Timings | None:
    """Return timings that this process or another one measured before; None if there are none.

    Args:
        digest: Their name, from `timings_digest`.
        is_lasting: Whether the model has the same fingerprint in other processes.
    """
    folder = cache_folder()
    known = _IN_MEMORY.get((folder, digest))
    if known is not None or folder is None or not is_lasting:
        return known
    path = _path(folder, digest)
    try:
        record = read_json(path)
        timings = tuple((int(size), float(seconds)) for size, seconds in record["timings"])
        if record["checksum"] != _checksum(digest, timings) or not timings:
            raise ValueError("its checksum is another")
        if not all(0 <= seconds < math.inf for _, seconds in timings):
            raise ValueError("its times are not finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        _log.debug("ignoring the timings in %s: %s", path, error)
        return None
    return timings


def keep_timings(digest: str, timings: Timings, *, is_lasting: bool) -> None:
    """Keep timings, also on disk if there is a cache folder; arguments as of `find_timings`."""
    folder = cache_folder()
    _IN_MEMORY[folder, digest] = timings
    if folder is None or not is_lasting:
        return
    path = _path(folder, digest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"timings": timings, "checksum": _checksum(digest, timings)})
    except OSError as error:  # read-only or full; the next process measures again
        _log.debug("not keeping timings in %s: %s", path, error)


def _path(folder: Path, digest: str) -> Path:
    return folder / "timings" / f"{digest}.json"


def _checksum(digest: str, timings: Timings) -> str:
    return hashlib.sha256(f"{digest} {json.dumps(timings)}".encode()).hexdigest()
