"""Verdicts that are known already: in memory, and as small files in the user's cache folder."""

import hashlib
import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from speclm.files.atomic import read_json, write_json
from speclm.self_check.fingerprint import Fingerprint
from speclm.self_check.verdict import Backend, SelfCheck

VARIABLE = "SPECLM_CACHE"
"""Environment variable that names the cache folder; empty, nothing is looked up or kept."""

_log = logging.getLogger("speclm")
_IN_MEMORY: dict[tuple[Path, Fingerprint], SelfCheck] = {}
"""Verdicts of this process, by cache folder and kind of model; the folder decides what is new."""


def cache_folder() -> Path | None:
    """Return the folder of everything that speclm keeps; None when nothing is to be kept.

    It is ``$SPECLM_CACHE``, else ``$XDG_CACHE_HOME/speclm``, else ``~/.cache/speclm``.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen).expanduser().absolute() if chosen.strip() else None
    shared = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if shared.is_absolute():  # its specification has relative paths ignored
        return shared / "speclm"
    try:
        return Path.home() / ".cache" / "speclm"
    except RuntimeError:  # a user without a home
        return None


def find_verdict(kind: Fingerprint) -> SelfCheck | None:
    """Return the verdict on this kind of model; None if there is none that can be trusted."""
    folder = cache_folder()
    if folder is None:
        return None
    known = _IN_MEMORY.get((folder, kind))
    if known is None and kind.is_lasting:
        known = _read(_path(folder, kind), kind)
    return None if known is None else replace(known, is_cached=True)


def keep_verdict(kind: Fingerprint, check: SelfCheck) -> None:
    """Keep a verdict for other models of this kind; of no effect if nothing can be kept."""
    folder = cache_folder()
    if folder is None or not check.is_lasting:
        return
    _IN_MEMORY[folder, kind] = check
    if kind.is_lasting:
        _write(_path(folder, kind), kind, check)


def _path(folder: Path, kind: Fingerprint) -> Path:
    return folder / "self_check" / f"{kind.digest}.json"


def _read(path: Path, kind: Fingerprint) -> SelfCheck | None:
    try:
        record = read_json(path)
        verdict = record["verdict"]
        if record["checksum"] != _checksum(kind, verdict):
            raise ValueError("its checksum is another")
        error = verdict["error"]
        backend, reason = Backend[verdict["backend"]], str(verdict["reason"])
        return SelfCheck(backend, reason, math.inf if error is None else float(error))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:  # made anew
        _log.debug("ignoring the self-check in %s: %s", path, error)
        return None


def _write(path: Path, kind: Fingerprint, check: SelfCheck) -> None:
    verdict = {
        "backend": check.backend.name,
        "reason": check.reason,
        "error": check.error if math.isfinite(check.error) else None,
    }
    record = {"verdict": verdict, "checksum": _checksum(kind, verdict)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError as error:  # read-only or full; the next load checks again
        _log.debug("not keeping the self-check in %s: %s", path, error)


def _checksum(kind: Fingerprint, verdict: Any) -> str:
    text = json.dumps(verdict, sort_keys=True)
    return hashlib.sha256(f"{kind.digest} {text}".encode()).hexdigest()
