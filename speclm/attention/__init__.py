"""Tree attention in a Hugging Face model, through its own attention and mask interfaces.

While a tree step is active, the mask that a model asks Transformers for is the step's own, for the
window that is asked for. The model's attention then computes with the mask that it is given, and
so does what a model does to its mask before. Where the kernel computes the same, it takes the place
of attention, and the mask is never made. Outside a step all is as it was. No modeling code is
replaced.
"""

from speclm.attention.attaching import attached, attention_configs
from speclm.attention.step import TreeStep, active_step, tree_step
from speclm.attention.tree_mask import TreeMask

__all__ = ["TreeMask", "TreeStep", "active_step", "attached", "attention_configs", "tree_step"]
