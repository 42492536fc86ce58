"""Key/value storage with rollback, and its exchange with Transformers' caches."""

from speclm.cache.exchange import export_cache, import_cache, import_obstacle
from speclm.cache.tree_cache import TreeCache

__all__ = ["TreeCache", "export_cache", "import_cache", "import_obstacle"]
