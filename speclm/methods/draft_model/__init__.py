"""Drafts with a smaller language model of the same vocabulary."""
