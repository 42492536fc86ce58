"""What forwards over trees of several sizes take, measured once for a machine and model."""

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.files.atomic import cache_folder, read_json, write_json
from speclm.self_check.fingerprint import Fingerprint
from speclm.target import Session
from speclm.tree.topology import from_parents

SIZES = (1, 2, 3, 5, 9, 13, 17, 25, 33, 49)
"""Nodes of every row, root included, that are measured."""

MAX_RATIO = 5.0
"""Times a plain forward beyond which no larger tree is measured: few texts give so many tokens."""

_VERSION = 1
_REPEATS = 3
_LONG = 0.2  # seconds of a forward that is not repeated
_SHORT_CONTEXT = 512  # tokens; longer contexts are told apart by powers of two

Timings = tuple[tuple[int, float], ...]
"""Nodes and seconds, ascending in both."""

_log = logging.getLogger("speclm")
_IN_MEMORY: dict[tuple[Path | None, str], Timings] = {}
"""Timings of this process, by cache folder and digest."""


@dataclass(frozen=True, slots=True)
class TimingKey:
    """What timings belong to.

    Args:
        model: Fingerprint of the target, which tells device and dtype too.
        batch: Rows, as the exponent of the next power of two.
        context: Cached tokens, as one of a power of two.
        num_threads: Of PyTorch.
    """

    model: Fingerprint
    batch: int
    context: int
    num_threads: int

    @classmethod
    def of(cls, model: Fingerprint, *, batch: int, context: int) -> "TimingKey":
        """Sort a call into its bucket."""
        buckets = (bucket_of_rows(batch), bucket_of_context(context))
        return cls(model, *buckets, num_threads=torch.get_num_threads())

    @property
    def digest(self) -> str:
        """Name of the file."""
        parts = (_VERSION, SIZES, self.model.digest, self.batch, self.context, self.num_threads)
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def bucket_of_rows(batch: int) -> int:
    """Return the exponent of the next power of two."""
    return (max(batch, 1) - 1).bit_length()


def bucket_of_context(num_tokens: int) -> int:
    """Return 0 for short contexts, and one more for each doubling."""
    return (max(num_tokens, 0) // _SHORT_CONTEXT).bit_length()


def forward_timings(
    model: Fingerprint | None,
    session: Session,
    roots: Int[Tensor, " batch"],
    *,
    context: int,
    max_length: int,
) -> Timings:
    """Return what forwards of a generation take: measured before, or now.

    Args:
        model: Fingerprint of the target, taken while nothing reads its features: what is hung
            into its layers has no name. None for a model that is not known again.
        session: A generation of its; takes trees, and nothing is pending.
        roots: Any tokens.
        context: Tokens that the session holds.
        max_length: Tokens at which every row ends.
    """
    if model is None:
        return measure_forwards(session, roots, max_length=max_length)
    key = TimingKey.of(model, batch=len(roots), context=context)
    known = find_timings(key)
    if known is None:
        known = measure_forwards(session, roots, max_length=max_length)
        keep_timings(key, known)
    return known


def measure_forwards(
    session: Session,
    roots: Int[Tensor, " batch"],
    *,
    max_length: int,
    clock: Callable[[], float] = perf_counter,
) -> Timings:
    """Time forwards over trees of several sizes, in the midst of a generation.

    The nodes are dropped again, so that the generation goes on as if nothing had been. Sizes end
    where a forward takes `MAX_RATIO` times as long as one over the roots.

    Args:
        session: Takes trees; nothing may be pending.
        roots: Any tokens.
        max_length: Tokens at which every row ends.
        clock: Seconds.
    """
    found: list[tuple[int, float]] = []
    for size in SIZES:
        topology = from_parents([[0] * size], device=roots.device)
        tokens = roots[:, None].expand(-1, size)
        best = math.inf
        for repeat in range(1 + _REPEATS):
            start = clock()
            logits = session.verify(tokens, topology, max_length=max_length)
            float(logits[0, 0, 0])  # a sync: accelerators compute behind the host's back
            seconds = clock() - start
            session.keep([[] for _ in range(len(roots))])
            if repeat == 0:
                continue  # the first one of a size is slow
            best = min(best, seconds)
            if seconds >= _LONG:
                break
        best = max(best, found[-1][1] if found else 0.0)  # more nodes take no less
        found.append((size, best))
        if best > MAX_RATIO * found[0][1]:
            break
    return tuple(found)


def find_timings(key: TimingKey) -> Timings | None:
    """Return what was measured before, by this process or another; None if nothing was."""
    folder = cache_folder()
    known = _IN_MEMORY.get((folder, key.digest))
    if known is not None or folder is None or not key.model.is_lasting:
        return known
    return _read(_path(folder, key), key)


def keep_timings(key: TimingKey, timings: Timings) -> None:
    """Keep timings, on disk too where there is a cache folder."""
    folder = cache_folder()
    _IN_MEMORY[folder, key.digest] = timings
    if folder is None or not key.model.is_lasting:
        return
    path = _path(folder, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"timings": timings, "checksum": _checksum(key, timings)})
    except OSError as error:  # read-only or full; the next process measures again
        _log.debug("not keeping timings in %s: %s", path, error)


def _path(folder: Path, key: TimingKey) -> Path:
    return folder / "timings" / f"{key.digest}.json"


def _read(path: Path, key: TimingKey) -> Timings | None:
    try:
        record = read_json(path)
        timings = tuple((int(size), float(seconds)) for size, seconds in record["timings"])
        if record["checksum"] != _checksum(key, timings) or not timings:
            raise ValueError("its checksum is another")
        if not all(0 <= seconds < math.inf for _, seconds in timings):
            raise ValueError("its times are not finite")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
        _log.debug("ignoring the timings in %s: %s", path, error)
        return None
    return timings


def _checksum(key: TimingKey, timings: Timings) -> str:
    text = json.dumps(timings)
    return hashlib.sha256(f"{key.digest} {text}".encode()).hexdigest()
