"""Key/value storage with rollback."""

from speclm.cache.tree_cache import TreeCache

__all__ = ["TreeCache"]
