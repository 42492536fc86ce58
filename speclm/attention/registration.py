"""Register tree attention with Transformers, and name it in a model's configs during forwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from threading import RLock
from typing import Self

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

from speclm.attention.functions import tree_attention_function, tree_mask_function
from speclm.forking import reset_in_children, temporary

_PREFIX = "speclm_"


@contextmanager
def attached(configs: Sequence[PretrainedConfig]) -> Iterator[None]:
    """Route the attention of models with these configs through tree attention, then restore it.

    Models may share a config and run in several threads; the last one to finish restores it. In a
    thread without a tree step, attention computes the same as before.
    """
    user = object()
    with temporary(partial(_ATTACHMENTS.remove, configs, user)):
        for config in configs:
            _ATTACHMENTS.add(config, user)
        yield


@dataclass(slots=True)
class _Attachment:
    """A config that names tree attention.

    Args:
        config: Kept alive, so that its id stays its own.
        implementation: The name of its own implementation.
        users: One object for each forward that needs tree attention.
    """

    config: PretrainedConfig
    implementation: str
    users: set[object] = field(default_factory=set)


class _Attachments:
    """The configs that name tree attention, by id."""

    def __init__(self) -> None:
        self._found: dict[int, _Attachment] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """Replace the lock, which a thread that no longer exists may hold."""
        # Reentrant: the collector may close an abandoned forward while this thread holds it.
        self._lock = RLock()

    def add(self, config: PretrainedConfig, user: object) -> None:
        with self._lock:
            name = config._attn_implementation
            attachment = self._found.setdefault(id(config), _Attachment(config, name))
            attachment.users.add(user)
            if not isinstance(name, _Name):
                config._attn_implementation_internal = _Name(name)

    def remove(self, configs: Sequence[PretrainedConfig], user: object) -> None:
        """Restore the configs without other users; ignore those that `user` has not added."""
        with self._lock:
            for config in configs:
                attachment = self._found.get(id(config))
                if attachment is None:
                    continue
                attachment.users.discard(user)
                if not attachment.users:
                    config._attn_implementation_internal = attachment.implementation
                    del self._found[id(config)]


_ATTACHMENTS = _Attachments()
reset_in_children(_ATTACHMENTS.renew_lock)


def attention_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Return the distinct configs of a model's modules."""
    found = {
        id(config): config
        for module in model.modules()
        if isinstance(config := getattr(module, "config", None), PretrainedConfig)
    }
    return list(found.values())


class _Name(str):
    """Name of tree attention in Transformers' registries, which also equals the previous name.

    Some modeling files compare the name of their implementation with a string and then compute
    attention themselves. They must do the same as before, so the name equals the previous one in
    comparisons; registries find tree attention by the text and its hash.
    """

    __slots__ = ("previous",)
    previous: str

    def __new__(cls, previous: str) -> Self:
        """Register tree attention on top of `previous` and return its name."""
        name = super().__new__(cls, register(previous))
        name.previous = previous
        return name

    def __getnewargs__(self) -> tuple[str]:
        """Allow copies of a config that names tree attention."""
        return (self.previous,)

    def __eq__(self, other: object) -> bool:
        """Return whether `other` is the same text or the previous name."""
        return str.__eq__(self, other) is True or self.previous == other

    def __ne__(self, other: object) -> bool:
        """Return the opposite of `==`."""
        return not self == other

    __hash__ = str.__hash__  # of the text, so that registries do not take it for `previous`


@cache  # called in every forward
def register(previous: str) -> str:
    """Register tree attention on top of `previous` and return its name."""
    name = _PREFIX + previous
    AttentionInterface.register(name, tree_attention_function(previous))
    AttentionMaskInterface.register(name, tree_mask_function(previous))
    return name
