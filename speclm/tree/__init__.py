"""Topology of draft trees."""

from speclm.tree.topology import TreeTopology, chain, from_parents

__all__ = ["TreeTopology", "chain", "from_parents"]
