"""Tree attention in a Hugging Face model, through its own attention and mask interfaces.

During a tree step, a model's requests for masks return the step's mask, for the requested window.
The model's own attention then computes with this mask, after any change that the model makes to it.
Where the kernel computes the same result, it replaces attention, and the mask is never built.
Outside a tree step nothing changes. No modeling code is replaced.
"""

from speclm.attention.fixed_step import FixedStep
from speclm.attention.registration import attached, attention_configs
from speclm.attention.step import TreeMask, TreeStep, active_step, tree_step

__all__ = [
    "FixedStep",
    "TreeMask",
    "TreeStep",
    "active_step",
    "attached",
    "attention_configs",
    "tree_step",
]
