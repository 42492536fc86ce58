"""The target's choice at the nodes of a tree, under the name that the loop's tests know."""

from speclm.acceptance.choices import accept_along_walk, choose_at_all_nodes

__all__ = ["accept_along_walk", "choose_at_all_nodes"]
