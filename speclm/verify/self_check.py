"""Decides, when a model is loaded, how its drafts are verified."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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

_ONE_AT_A_TIME = RLock()  # two checks of one model would switch its mode under each other


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
    """Put a model into evaluation mode, and back what was in training mode."""
    in_training = [module for module in model.modules() if module.training]
    for module in in_training:  # one by one: a model may be in training mode in parts
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True
