"""Atomic writes, and files that anyone may have written."""
