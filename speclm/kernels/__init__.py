"""Kernels: tree attention, keeping a path, and ancestor words from parents."""

from speclm.kernels.backends import attention_obstacle, pays, preferred
from speclm.kernels.tree_attention import tree_attention
from speclm.kernels.tree_ops import keep_path_, tree_words

__all__ = [
    "attention_obstacle",
    "keep_path_",
    "pays",
    "preferred",
    "tree_attention",
    "tree_words",
]
