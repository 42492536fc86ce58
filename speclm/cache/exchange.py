"""Takes over what a Transformers cache holds, and extends one with what was decoded."""

from typing import Any

from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from speclm.cache.tree_cache import TreeCache
from speclm.errors import CacheError

_KINDS = {
    DynamicLayer,
    DynamicSlidingWindowLayer,
    # Stands for a layer that reads another's keys and values; Transformers 5.17 has none.
    vars(cache_utils).get("DummyLayer"),
}


def import_obstacle(given: object, *, num_layers: int, batch: int, num_tokens: int) -> str | None:
    """Say why a cache cannot be taken over, in words that follow "past_key_values".

    Args:
        given: What was passed as the cache.
        num_layers: Decoder layers of the model.
        batch: Rows of the prompt.
        num_tokens: Slots of the whole prompt, those that the cache should hold included.

    Returns:
        None when `import_cache` takes it. Does not sync with the device.
    """
    if type(given) is not DynamicCache:  # others count slots in their own way
        return f"is a {type(given).__name__}, not a DynamicCache"
    if given.offloading:
        return "moves its layers off the device, and trees need them on it"
    foreign = {type(layer).__name__ for layer in given.layers if type(layer) not in _KINDS}
    if foreign:
        return f"has layers of type {', '.join(sorted(foreign))}, not dynamic attention alone"
    if len(given.layers) > num_layers:
        return f"has {len(given.layers)} layers, the model {num_layers}"
    filled = [layer for layer in _layers(given) if layer.keys is not None]
    lengths = {layer.get_seq_length() for layer in filled}
    if lengths <= {0}:
        return None
    if len(lengths) > 1:
        return f"has layers of {min(lengths)} to {max(lengths)} slots, not of one length"
    rows = {len(layer.keys) for layer in filled}
    if rows != {batch}:
        return f"has {max(rows)} rows, the prompt {batch}"
    length = lengths.pop()
    if length >= num_tokens:
        return f"holds {length} slots, so none of the prompt's {num_tokens} tokens is new"
    return None


def import_cache(cache: TreeCache, given: Cache, *, room: int = 0) -> None:
    """Commit copies of what a Transformers cache holds to an empty tree cache.

    A layer with a sliding window holds the last ``window - 1`` slots alone. Those before are left
    as zeros: every later query is at least at the slot behind the cached ones, whose window begins
    with the first slot that is held, so that no query sees them. Left padding is copied like
    tokens; `TreeCache.num_padding` masks it.

    Args:
        cache: Empty cache for the same rows, with their padding.
        given: Cache that holds the first slots of every row; it is not changed. An empty one
            leaves `cache` empty.
        room: Slots that the next forwards write, so that the storage is not copied again at once.

    Raises:
        CacheError: If `given` is of another kind, or for other rows or layers; see
            `import_obstacle`. One with fewer layers, other heads or another dtype is refused by
            the first forward on `cache`.
    """
    batch = len(cache.host_lengths)
    length = given.get_seq_length() if type(given) is DynamicCache else 0
    obstacle = import_obstacle(
        given, num_layers=len(cache.layers), batch=batch, num_tokens=length + 1
    )
    if obstacle is not None:
        raise CacheError(f"past_key_values {obstacle}; pass a cache that this model made, or none")
    if cache.get_seq_length() > 0:
        raise CacheError(
            f"cache holds {cache.get_seq_length()} slots, expected an empty one; import before the "
            "first forward"
        )
    if length > 0:
        states = [(layer.keys, layer.values) for layer in _layers(given)]
        cache.load(states, length=length, room=room)


def export_cache(cache: TreeCache, into: DynamicCache, *, length: int) -> None:
    """Extend a Transformers cache to `length` slots with copies of committed ones.

    The layers take them as from a forward, so that those with a sliding window drop what is behind
    it, and the result is what regular generation leaves.

    Args:
        cache: Cache in which every row has at least `length` committed slots.
        into: Cache that holds the first slots of the same rows, or none yet.
        length: Slots that `into` holds afterwards.

    Raises:
        CacheError: If a row is shorter, or `into` longer. `into` is then unchanged.
    """
    start, shortest = into.get_seq_length(), min(cache.host_lengths)
    if not start <= length <= shortest:
        raise CacheError(
            f"cache has {shortest} committed slots in its shortest row and past_key_values "
            f"{start}, expected a length between them, found {length}; keep the last path and fill "
            "up short rows first"
        )
    if start == length:
        return
    for index, layer in enumerate(_layers(cache)):
        if layer.keys is not None:
            keys, values = (held[:, :, start:length] for held in (layer.keys, layer.values))
            into.update(keys, values, index)


def _layers(cache: Cache) -> list[Any]:
    """Return layers that all have `keys` and `values`, None in those that hold nothing."""
    return list(cache.layers)
