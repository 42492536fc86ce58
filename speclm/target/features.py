"""What a proposer may ask the target for."""

from enum import Enum


class TargetFeatures(Enum):
    """Hidden states of the target that a proposer needs."""

    NONE = "none"
    LAST_HIDDEN = "last hidden"
    """What the target's head reads: the decoder's output, after the final norm."""
