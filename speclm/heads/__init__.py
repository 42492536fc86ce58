"""Heads: draft networks that are trained on a target, built from plain numbers."""

from speclm.heads.medusa import MedusaHeads, MedusaHeadsConfig

__all__ = ["MedusaHeads", "MedusaHeadsConfig"]
