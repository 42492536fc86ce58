"""Atomic writes, and reading files whose content may be anything."""
