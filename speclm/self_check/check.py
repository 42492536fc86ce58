"""Decides, when a model is loaded, how its drafts are verified."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import RLock
from time import perf_counter

import torch
from torch import nn

from speclm.errors import BusyError
from speclm.forking import reset_in_children, temporary
from speclm.self_check.comparison import check_chains, check_trees
from speclm.self_check.fingerprint import fingerprint
from speclm.self_check.store import cache_folder, find_verdict, keep_verdict
from speclm.self_check.verdict import Backend, SelfCheck
from speclm.target import TargetView, exclusive


@dataclass(slots=True)
class _Evaluation:
    """A model that checks have put into evaluation mode.

    Args:
        model: Kept here so that its id is no other's.
        in_training: What has to be put back.
        checks: Those that go on, in this thread or in others.
    """

    model: nn.Module
    in_training: list[nn.Module]
    checks: set[object] = field(default_factory=set)


_EVALUATIONS: dict[int, _Evaluation] = {}
_LOCK = RLock()  # of these; not held during a forward, whose hooks may wait for another check


def _renew_lock() -> None:
    global _LOCK  # noqa: PLW0603 - a thread that does not exist in the child may have it
    _LOCK = RLock()


reset_in_children(_renew_lock)


def check_model(target: TargetView) -> SelfCheck:
    """Find the best way to verify drafts that computes what the model computes.

    Trees are tried first, then chains; what passes neither is decoded plainly. The model is left
    as it was found, also when the check is interrupted. A verdict on a model of the same kind is
    used again, from this process or from a file; ``SPECLM_CACHE=""`` in the environment has every
    model checked.

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
        return SelfCheck(Backend.PLAIN, reason, is_lasting=False)
    with _evaluating(target.model), torch.no_grad():
        trees = check_trees(target)
    if trees.backend is Backend.TREES or trees.is_final:
        return trees
    chains = _check_chains(target)
    is_plain = chains.backend is Backend.PLAIN
    return SelfCheck(
        chains.backend,
        f"no trees: {trees.reason}; {'no chains: ' if is_plain else ''}{chains.reason}",
        trees.error if is_plain else chains.error,
        is_lasting=trees.is_lasting and chains.is_lasting,
    )


def _check_chains(target: TargetView) -> SelfCheck:
    """Check chains when no other thread generates with the model."""
    try:
        with (
            exclusive([(target.model, target.name)]),
            _evaluating(target.model),
            torch.no_grad(),
        ):
            return check_chains(target)
    except BusyError as refusal:  # this thread is inside a generation, where it cannot wait
        return SelfCheck(Backend.PLAIN, str(refusal), is_lasting=False)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and back what was in training mode after the last check."""
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
            for module in evaluation.in_training:  # a model may be in training mode in parts
                module.training = False
        yield
