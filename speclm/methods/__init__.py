"""Drafting methods, one folder each."""
