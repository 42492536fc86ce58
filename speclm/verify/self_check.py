"""Decides, when a model is loaded, how its drafts are verified."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from time import perf_counter

import torch
from torch import nn

from speclm.target import TargetView
from speclm.verify.backend import Backend
from speclm.verify.chains import check_chains
from speclm.verify.fingerprint import fingerprint
from speclm.verify.store import cache_folder, find_verdict, keep_verdict
from speclm.verify.trees import check_trees
from speclm.verify.verdict import SelfCheck


@dataclass(slots=True)
class _Evaluation:
    """A model that checks have put into evaluation mode.

    Args:
        model: Kept here so that its id is no other's.
        in_training: What has to be put back.
        num_checks: Checks that go on, in this thread or in others.
    """

    model: nn.Module
    in_training: list[nn.Module]
    num_checks: int = 0


_EVALUATIONS: dict[int, _Evaluation] = {}
_LOCK = RLock()  # of these; not held during a forward, whose hooks may wait for another check


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
        if trees.backend is Backend.TREES:
            return trees
        chains = check_chains(target)
    is_plain = chains.backend is Backend.PLAIN
    return SelfCheck(
        chains.backend,
        f"no trees: {trees.reason}; {'no chains: ' if is_plain else ''}{chains.reason}",
        trees.error if is_plain else chains.error,
        is_lasting=trees.is_lasting and chains.is_lasting,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and back what was in training mode after the last check."""
    with _LOCK:
        evaluation = _EVALUATIONS.get(id(model))
        if evaluation is None:
            in_training = [module for module in model.modules() if module.training]
            evaluation = _EVALUATIONS[id(model)] = _Evaluation(model, in_training)
        evaluation.num_checks += 1
        for module in evaluation.in_training:  # one by one: a model may be in training in parts
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            evaluation.num_checks -= 1
            if not evaluation.num_checks:
                del _EVALUATIONS[id(model)]
                for module in evaluation.in_training:
                    module.training = True
