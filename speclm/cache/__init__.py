"""Key/value storage with rollback, and its exchange with Transformers' caches."""

from speclm.cache.dynamic_cache import (
    CACHE_NAME,
    CACHE_NAMES,
    Rewind,
    cache_name,
    export_cache,
    import_cache,
    import_obstacle,
    restore,
    snapshot,
)
from speclm.cache.tree_cache import TreeCache

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "Rewind",
    "TreeCache",
    "cache_name",
    "export_cache",
    "import_cache",
    "import_obstacle",
    "restore",
    "snapshot",
]
