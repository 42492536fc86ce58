"""Keeps a memory in a file, from one program to the next."""

import copy
import logging
import os
from pathlib import Path
from time import monotonic
from typing import Any

from speclm.errors import OptionError, SpeclmError
from speclm.methods.recycling.memory import CandidateMemory

_log = logging.getLogger("speclm")

SECONDS_PER_SAVE = 60.0
"""A file is written no more often than this while a program decodes."""


class MemoryFile:
    """A memory and its file, which is written at most once a minute and when the program ends.

    What another program has written into the file meanwhile is kept. If the file cannot be
    written, decoding goes on, and one line of the log says so.
    """

    def __init__(self, path: Path, *, vocab_size: int, fingerprint: str, max_pairs: int) -> None:
        """Read the file, or start an empty memory if there is none.

        Args:
            path: The file.
            vocab_size: Width of the target's logits.
            fingerprint: Of the target, from `memory_fingerprint`.
            max_pairs: Maximum pairs of tokens to remember.

        Raises:
            CheckpointError: If the file is damaged, or the memory of another model.
            OptionError: If `max_pairs` is out of range, or no file can have that name.
        """
        self._path, self._fingerprint = path, fingerprint
        self._process = os.getpid()
        self._saved_at = monotonic()
        self._has_failed = False
        self._version = _version(path)
        if self._version is None:
            self.memory = CandidateMemory(vocab_size=vocab_size, max_pairs=max_pairs)
        else:
            self.memory = self._load(vocab_size, max_pairs)
        self._start = self.memory.stored()
        self._has_forgotten = False

    def forget(self) -> None:
        """Return to what the file held when it was read; the file stays as it is.

        What is learned from then on is added to the file, and what is only in the file stays
        forgotten.
        """
        self.memory.restore(self._start)
        self._has_forgotten = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy may have come from another program, whose clock starts elsewhere.
        vars(self).update(state, _process=os.getpid(), _saved_at=monotonic())

    def save_if_due(self) -> None:
        """Write the memory if it has changed and was not written in the last minute."""
        if monotonic() - self._saved_at >= SECONDS_PER_SAVE:
            self.save()

    def save(self) -> None:
        """Write the memory if it has changed."""
        # The child of a fork leaves the file to its parent.
        if not self.memory.has_changed or self._has_failed or os.getpid() != self._process:
            return
        self._saved_at = monotonic()
        try:
            memory, version = self.memory, _version(self._path)
            if self._has_forgotten:
                memory = copy.deepcopy(memory)
            if version is not None and (self._has_forgotten or version != self._version):
                memory.merge(self._load(memory.vocab_size, memory.max_pairs))
            memory.save(self._path, fingerprint=self._fingerprint)
        except SpeclmError as error:
            self._has_failed = True
            _log.warning("memory is not saved any more, decoding goes on: %s", error)
        self._version = _version(self._path)

    def _load(self, vocab_size: int, max_pairs: int) -> CandidateMemory:
        return CandidateMemory.load(
            self._path, vocab_size=vocab_size, fingerprint=self._fingerprint, max_pairs=max_pairs
        )


def _version(path: Path) -> tuple[int, int] | None:
    """Return what changes whenever a file is written anew; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    except ValueError as error:  # a null byte, or a character that no file name has
        raise OptionError(
            f"memory is {str(path)!r}, expected the path of a file ({error}); correct it"
        ) from error
    return found.st_mtime_ns, found.st_ino
