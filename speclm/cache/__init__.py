"""Key/value storage with rollback, and its exchange with Transformers' caches."""

from speclm.cache.dynamic_cache import (
    Rewind,
    export_cache,
    import_cache,
    import_obstacle,
    restore,
    snapshot,
)
from speclm.cache.tree_cache import TreeCache

__all__ = [
    "Rewind",
    "TreeCache",
    "export_cache",
    "import_cache",
    "import_obstacle",
    "restore",
    "snapshot",
]
