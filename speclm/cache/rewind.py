"""Takes tokens back out of a Transformers cache, recurrent states included."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer


class Rewind:
    """Undoes what forwards write to a cache that Transformers made.

    Attention layers drop their last slots. A recurrent state has no slots: caches with one are put
    back to where they were when `mark` was called, and what is kept has to be read again.

    Attributes:
        drops_slots: Whether `drop` works; otherwise only `restore` does.
    """

    def __init__(self, cache: Cache) -> None:
        """Watch a cache behind the prompt.

        Args:
            cache: Cache that a forward has filled. Layers that forget, as those with a sliding
                window do, remember from now on, until `release`.
        """
        self._cache = cache
        self.drops_slots = all(getattr(layer, "is_croppable", False) for layer in _layers(cache))
        self._marked: list[dict[str, Any]] = []
        self._aside: list[tuple[Any, Tensor, Tensor]] = []
        if self.drops_slots:
            cache.activate_past_recording()  # type: ignore[no-untyped-call]  # Transformers'

    def mark(self) -> None:
        """Remember the cache as it is. Copies recurrent states, and nothing else."""
        if not self.drops_slots:
            self._marked = [_held(layer) for layer in _layers(self._cache)]

    def narrow(self) -> None:
        """Get ready for a further forward before anything is dropped.

        Some versions of Transformers show such a forward all slots that a layer with a window
        remembers, and a mask for fewer: what it must not see is set aside.
        """
        if not self.drops_slots:
            return
        for layer in _layers(self._cache):
            if not isinstance(layer, DynamicSlidingWindowLayer):
                continue
            keys, values = layer.keys, layer.values
            if keys is None or values is None:
                continue
            num_hidden = keys.shape[-2] - layer.sliding_window + 1
            if num_hidden > 0:
                self._aside.append((layer, keys[:, :, :num_hidden], values[:, :, :num_hidden]))
                layer.keys, layer.values = keys[:, :, num_hidden:], values[:, :, num_hidden:]

    def drop(self, num_slots: int) -> None:
        """Drop the last slots of every row; those with a window forget what is behind it."""
        for layer, keys, values in reversed(self._aside):
            layer.keys = torch.cat([keys, layer.keys], dim=-2)
            layer.values = torch.cat([values, layer.values], dim=-2)
        self._aside = []
        self._cache.crop(-num_slots)

    def restore(self) -> None:
        """Put the cache back to where it was marked. It has to be marked anew before the next."""
        put_back(self._cache, self._marked)

    def release(self) -> None:
        """Leave the cache as regular generation does."""
        if not self.drops_slots:
            return
        self._cache.crop(0)
        for layer in _layers(self._cache):
            if hasattr(layer, "record_past"):
                layer.record_past = False


def held(cache: Cache) -> list[dict[str, Any]]:
    """Return what `put_back` restores: keys and values as they are, copies of recurrent states."""
    return [_held(layer) for layer in _layers(cache)]


def put_back(cache: Cache, states: list[dict[str, Any]]) -> None:
    """Restore what `held` returned; it is used up."""
    del cache.layers[len(states) :]  # layers that a forward has added to an empty cache
    for layer, state in zip(_layers(cache), states, strict=True):
        vars(layer).clear()
        vars(layer).update(state)


def _held(layer: object) -> dict[str, Any]:
    # Keys and values grow into new tensors; states are written in place.
    return {
        name: value if name in {"keys", "values"} else _copied(value)
        for name, value in vars(layer).items()
    }


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format)
    if isinstance(value, dict):
        return {name: _copied(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_copied(inner) for inner in value]
    return value


def _layers(cache: Cache) -> list[Any]:
    return list(cache.layers)
