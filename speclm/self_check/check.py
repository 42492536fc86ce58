"""Decide how a model's drafts are verified, and keep verdicts in memory and in files."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import Any

import torch
from torch import nn

from speclm.errors import BusyError
from speclm.files.atomic import cache_folder, read_json, write_json
from speclm.forking import reset_in_children, temporary
from speclm.self_check.comparison import check_chains, check_trees
from speclm.self_check.fingerprint import Fingerprint, fingerprint
from speclm.self_check.verdict import SelfCheck, Verification
from speclm.target import TargetView, exclusive

_log = logging.getLogger("speclm")
_IN_MEMORY: dict[tuple[Path, Fingerprint], SelfCheck] = {}
"""Verdicts of this process, by cache folder and kind of model."""


@dataclass(slots=True)
class _Evaluation:
    """A model in evaluation mode for checks.

    Args:
        model: Kept alive, so that its id stays its own.
        in_training: Modules to set back to training mode.
        checks: Running checks, in any thread.
    """

    model: nn.Module
    in_training: list[nn.Module]
    checks: set[object] = field(default_factory=set)


_EVALUATIONS: dict[int, _Evaluation] = {}
_LOCK = RLock()  # not held during forwards, whose hooks may wait for another check


def _renew_lock() -> None:
    global _LOCK  # noqa: PLW0603 - a thread that does not exist in the child may hold it
    _LOCK = RLock()


reset_in_children(_renew_lock)


def check_model(target: TargetView) -> SelfCheck:
    """Find the best way to verify drafts that computes the same as the model.

    Trees are tried first, then chains; otherwise generation is regular. The model is not changed,
    even if the check is interrupted. Models of the same kind share a verdict, in this process or
    through a file; with ``SPECLM_CACHE=""`` in the environment every model is checked.

    Returns:
        The verdict; its reason also says why nothing better was chosen.
    """
    start = perf_counter()
    kind = None if cache_folder() is None else fingerprint(target)
    check = None if kind is None else find_verdict(kind)
    if check is None:
        check = _check(target)
        if kind is not None:
            keep_verdict(kind, check)
    return replace(check, milliseconds=1e3 * (perf_counter() - start))


def _check(target: TargetView) -> SelfCheck:
    if target.device.type == "meta":
        reason = "its weights are on the meta device and have no values; load them first"
        return SelfCheck(Verification.REGULAR, reason, is_lasting=False)
    with _evaluating(target.model), torch.no_grad():
        trees = check_trees(target)
    if trees.verification is Verification.TREES or trees.is_final:
        return trees
    chains = _check_chains(target)
    is_regular = chains.verification is Verification.REGULAR
    return SelfCheck(
        chains.verification,
        f"no trees: {trees.reason}; {'no chains: ' if is_regular else ''}{chains.reason}",
        trees.error if is_regular else chains.error,
        is_lasting=trees.is_lasting and chains.is_lasting,
    )


def _check_chains(target: TargetView) -> SelfCheck:
    """Check chains once no other thread generates with the model."""
    try:
        with (
            exclusive([(target.model, target.name)]),
            _evaluating(target.model),
            torch.no_grad(),
        ):
            return check_chains(target)
    except BusyError as refusal:  # this thread is inside a generation, where it cannot wait
        return SelfCheck(Verification.REGULAR, str(refusal), is_lasting=False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode; the last check sets modules back to training mode."""
    check = object()

    def leave() -> None:
        with _LOCK:
            evaluation = _EVALUATIONS.get(id(model))
            if evaluation is None or check not in evaluation.checks:
                return
            evaluation.checks.remove(check)
            if not evaluation.checks:
                del _EVALUATIONS[id(model)]
                for module in evaluation.in_training:
                    module.training = True

    with temporary(leave):
        with _LOCK:
            evaluation = _EVALUATIONS.get(id(model))
            if evaluation is None:
                in_training = [module for module in model.modules() if module.training]
                evaluation = _Evaluation(model, in_training)
            evaluation.checks.add(check)
            _EVALUATIONS[id(model)] = evaluation
            for module in evaluation.in_training:  # parts of a model may be in training mode
                module.training = False
        yield


def find_verdict(kind: Fingerprint) -> SelfCheck | None:
    """Return the stored verdict on this kind of model; None if there is no valid one."""
    folder = cache_folder()
    if folder is None:
        return None
    known = _IN_MEMORY.get((folder, kind))
    if known is None and kind.is_lasting:
        known = _read(_path(folder, kind), kind)
    return None if known is None else replace(known, is_cached=True)


def keep_verdict(kind: Fingerprint, check: SelfCheck) -> None:
    """Store a verdict for other models of this kind, if it is lasting and there is a folder."""
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
            raise ValueError("wrong checksum")
        error = verdict["error"]
        verification, reason = Verification[verdict["verification"]], str(verdict["reason"])
        return SelfCheck(verification, reason, math.inf if error is None else float(error))
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ArithmeticError,
    ) as error:  # the check runs again
        _log.debug("ignoring the self-check in %s: %s", path, error)
        return None


def _write(path: Path, kind: Fingerprint, check: SelfCheck) -> None:
    verdict = {
        "verification": check.verification.name,
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
