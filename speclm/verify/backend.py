"""How a target's drafts are verified."""

from enum import Enum


class Backend(Enum):
    """What the self-check allows a target; the values are words for reports."""

    TREES = "tree attention"
    CHAINS = "chains"
    """One chain per row, read by the model as in plain decoding; rows advance together."""
    PLAIN = "plain decoding"
