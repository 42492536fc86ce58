"""Name, import, extend and rewind the caches of Transformers."""

import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from speclm.cache.tree_cache import TreeCache
from speclm.errors import CacheError

_OLD_NAMES = ("past_key_values", "cache_params")
_FIELDS = {field.name for field in fields(GenerateDecoderOnlyOutput)}

CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"
"""Input of models and field of outputs: ``cache``, before Transformers 5.24 ``past_key_values``."""

CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, *_OLD_NAMES)))
"""All names that `generate` takes. Newer versions of Transformers translate the old ones."""

_KINDS = {
    DynamicLayer,
    DynamicSlidingWindowLayer,
    # A layer that reads the keys and values of another one; Transformers 5.17 has none.
    vars(cache_utils).get("DummyLayer"),
}


def cache_name(model: PreTrainedModel) -> str:
    """Return the name of a model's cache input, which older versions name by the kind of model."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_NAMES if name in accepted), CACHE_NAME)


def import_obstacle(given: object, *, num_layers: int, batch: int, num_tokens: int) -> str | None:
    """Return why a cache cannot be imported, in words that follow "the given cache".

    Args:
        given: The argument that was passed as the cache.
        num_layers: Decoder layers of the model.
        batch: Rows of the prompt.
        num_tokens: Slots of the whole prompt, including those in the cache.

    Returns:
        None if `import_cache` accepts it. Does not sync with the device.
    """
    if type(given) is not DynamicCache:  # others count slots differently
        return f"is a {type(given).__name__}, not a DynamicCache"
    if given.offloading:
        return "moves its layers off the device, and trees need them on it"
    foreign = {type(layer).__name__ for layer in given.layers if type(layer) not in _KINDS}
    if foreign:
        return f"has layers of type {', '.join(sorted(foreign))}, not only dynamic attention"
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

    A layer with a sliding window only holds the last ``window - 1`` slots. The earlier ones are set
    to zero: no later query sees them, because the window of the next slot starts at the first one
    that is held. Left padding is copied like tokens; `TreeCache.num_padding` masks it.

    Args:
        cache: Empty cache for the same rows, with their padding.
        given: Cache that holds the first slots of every row; it is not changed. An empty one
            leaves `cache` empty.
        room: Slots to reserve for the next forwards.

    Raises:
        CacheError: If `given` is of another kind, or for other rows or layers; see
            `import_obstacle`. The first forward on `cache` refuses fewer layers, other heads and
            another dtype.
    """
    batch = len(cache.host_lengths)
    length = given.get_seq_length() if type(given) is DynamicCache else 0
    obstacle = import_obstacle(
        given, num_layers=len(cache.layers), batch=batch, num_tokens=length + 1
    )
    if obstacle is not None:
        raise CacheError(f"the given cache {obstacle}; pass a cache that this model made, or none")
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

    The result is the cache that regular generation leaves: layers are updated as by a forward, so
    that those with a sliding window drop the slots before it.

    Args:
        cache: Cache in which every row has at least `length` committed slots.
        into: Cache that holds the first slots of the same rows, or none.
        length: Slots in `into` afterwards.

    Raises:
        CacheError: If a row is shorter, or `into` longer. `into` is then unchanged.
    """
    start, shortest = into.get_seq_length(), min(cache.host_lengths)
    if not start <= length <= shortest:
        raise CacheError(
            f"cache has {shortest} committed slots in its shortest row and the given one "
            f"{start}, expected a length between them, found {length}; keep the last path and fill "
            "up short rows first"
        )
    if start == length:
        return
    for index, layer in enumerate(_layers(cache)):
        if layer.keys is not None:
            keys, values = (part[:, :, start:length] for part in (layer.keys, layer.values))
            into.update(keys, values, index)


class Rewind:
    """Undo the writes of forwards to a Transformers cache.

    Attention layers can drop their last slots. A recurrent state has no slots: a cache with one is
    restored to the last `mark`, and kept tokens are read again.

    Attributes:
        is_croppable: Whether `drop` works; otherwise only `restore` does.
    """

    def __init__(self, cache: Cache) -> None:
        """Start after the prompt.

        Args:
            cache: Cache that a forward has filled. Layers with a sliding window keep the slots
                before it from now on, until `release`.
        """
        self._cache = cache
        self.is_croppable = all(getattr(layer, "is_croppable", False) for layer in _layers(cache))
        self._marked: list[dict[str, Any]] = []
        self._hidden: list[tuple[Any, Tensor, Tensor]] = []
        if self.is_croppable:
            cache.activate_past_recording()  # type: ignore[no-untyped-call]  # Transformers'

    def mark(self) -> None:
        """Take a snapshot of a cache that cannot drop slots; copies only recurrent states."""
        if not self.is_croppable:
            self._marked = snapshot(self._cache)

    def narrow(self) -> None:
        """Prepare for another forward before any slots are dropped.

        In some versions of Transformers such a forward sees all slots of a layer with a window, but
        a mask for fewer. This hides those before the window.
        """
        if not self.is_croppable:
            return
        for layer in _layers(self._cache):
            if not isinstance(layer, DynamicSlidingWindowLayer):
                continue
            keys, values = layer.keys, layer.values
            if keys is None or values is None:
                continue
            num_hidden = keys.shape[-2] - layer.sliding_window + 1
            if num_hidden > 0:
                self._hidden.append((layer, keys[:, :, :num_hidden], values[:, :, :num_hidden]))
                layer.keys, layer.values = keys[:, :, num_hidden:], values[:, :, num_hidden:]

    def drop(self, num_slots: int) -> None:
        """Drop the last slots of every row; layers with a window also drop those before it."""
        for layer, keys, values in reversed(self._hidden):
            layer.keys = torch.cat([keys, layer.keys], dim=-2)
            layer.values = torch.cat([values, layer.values], dim=-2)
        self._hidden = []
        self._cache.crop(-num_slots)

    def restore(self) -> None:
        """Restore the cache to the last mark, which is used up."""
        restore(self._cache, self._marked)

    def release(self) -> None:
        """Stop keeping the slots before a window, as in regular generation."""
        if not self.is_croppable:
            return
        self._cache.crop(0)
        for layer in _layers(self._cache):
            if hasattr(layer, "record_past"):
                layer.record_past = False


def snapshot(cache: Cache) -> list[dict[str, Any]]:
    """Return the state of each layer for `restore`; copies all tensors except keys and values."""
    return [
        {  # keys and values grow into new tensors; recurrent states are written in place
            name: value if name in {"keys", "values"} else _copied(value)
            for name, value in vars(layer).items()
        }
        for layer in _layers(cache)
    ]


def restore(cache: Cache, states: list[dict[str, Any]]) -> None:
    """Restore a cache to a snapshot, which is used up."""
    del cache.layers[len(states) :]  # layers that a forward has added to an empty cache
    for layer, state in zip(_layers(cache), states, strict=True):
        vars(layer).clear()
        vars(layer).update(state)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value


def _layers(cache: Cache) -> list[Any]:
    """Return the layers, without a type: attributes differ between versions of Transformers."""
    return list(cache.layers)
