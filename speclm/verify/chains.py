"""Finds out whether chains, read as plain decoding reads its text, give what the model gives."""

from speclm.target import TargetView
from speclm.verify.verdict import SelfCheck


def check_chains(target: TargetView) -> SelfCheck | None:  # noqa: ARG001
    """Compare chains with the model's own forwards.

    Returns:
        A verdict for chains or for plain decoding; None while nothing verifies chains.
    """
    return None
