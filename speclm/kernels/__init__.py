"""Kernels: attention over trees, keeping a path, and masks from parents."""

from speclm.kernels._sdpa import grouped_attention
from speclm.kernels.keep_path import keep_path_
from speclm.kernels.preference import attention_obstacle, pays, preferred
from speclm.kernels.tree_attention import tree_attention
from speclm.kernels.tree_words import tree_words

__all__ = [
    "attention_obstacle",
    "grouped_attention",
    "keep_path_",
    "pays",
    "preferred",
    "tree_attention",
    "tree_words",
]
