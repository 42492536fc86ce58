"""Key/value storage with rollback, and its exchange with Transformers' caches."""

from speclm.cache.exchange import export_cache, import_cache, import_obstacle
from speclm.cache.rewind import Rewind, held, put_back
from speclm.cache.tree_cache import TreeCache

__all__ = [
    "Rewind",
    "TreeCache",
    "export_cache",
    "held",
    "import_cache",
    "import_obstacle",
    "put_back",
]
