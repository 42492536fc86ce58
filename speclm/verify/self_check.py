"""Decides, when a model is loaded, how its drafts are verified."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from threading import RLock
from time import perf_counter

import torch
from torch import nn

from speclm.errors import BusyError
from speclm.forking import reset_in_children, temporary
from speclm.target import TargetView, exclusive
from speclm.verify.backend import Backend
from speclm.verify.chains import check_chains
from speclm.verify.fingerprint import fingerprint
from speclm.verify.store import cache_folder, find_verdict, keep_verdict
from speclm.verify.trees import check_trees
from speclm.verify.verdict import SelfCheck

_ONE_AT_A_TIME = RLock()  # two checks of one model would switch its mode under each other


def _renew_lock() -> None:
    global _ONE_AT_A_TIME  # noqa: PLW0603 - a thread that does not exist in the child may have it
    _ONE_AT_A_TIME = RLock()


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
    with _ONE_AT_A_TIME:
        kind = None if cache_folder() is None else fingerprint(target)
        known = None if kind is None else find_verdict(kind)
        check = _check_trees(target) if known is None else known
        if kind is not None and check.backend is Backend.TREES and known is None:
            keep_verdict(kind, check)
    if known is None and check.backend is not Backend.TREES and target.device.type != "meta":
        check = _check_chains(target, check)  # may wait for a generation, which may need the lock
        if kind is not None:
            keep_verdict(kind, check)
    return replace(check, milliseconds=1e3 * (perf_counter() - start))


def _check_trees(target: TargetView) -> SelfCheck:
    if target.device.type == "meta":
        reason = "its weights are on the meta device and have no values; load them first"
        return SelfCheck(Backend.PLAIN, reason, is_lasting=False)
    with _evaluating(target.model), torch.no_grad():
        return check_trees(target)


def _check_chains(target: TargetView, trees: SelfCheck) -> SelfCheck:
    """Return the verdict on a model that failed by trees, when no other thread decodes with it."""
    try:
        with (
            exclusive([(target.model, target.name)]),
            _ONE_AT_A_TIME,
            _evaluating(target.model),
            torch.no_grad(),
        ):
            chains = check_chains(target)
    except BusyError as refusal:  # this thread is inside a generation, where it cannot wait
        chains = SelfCheck(Backend.PLAIN, str(refusal), is_lasting=False)
    is_plain = chains.backend is Backend.PLAIN
    return SelfCheck(
        chains.backend,
        f"no trees: {trees.reason}; {'no chains: ' if is_plain else ''}{chains.reason}",
        trees.error if is_plain else chains.error,
        is_lasting=trees.is_lasting and chains.is_lasting,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and back what was in training mode."""
    in_training = [module for module in model.modules() if module.training]

    def restore() -> None:
        for module in in_training:
            module.training = True

    with temporary(restore):
        for module in in_training:  # one by one: a model may be in training mode in parts
            module.training = False
        yield
