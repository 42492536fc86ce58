"""Puts tree attention into a model's config for the time of a forward, and takes it out again."""

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
    """Route the attention of models with these configs through ours, then restore it.

    Models may share a config, and run in several threads: it is restored behind the last of them.
    What a thread without a tree step runs meanwhile computes what it always does.
    """
    user = object()
    with temporary(partial(_ATTACHMENTS.remove, configs, user)):
        for config in configs:
            _ATTACHMENTS.add(config, user)
        yield


@dataclass(slots=True)
class _Attachment:
    """A config that is attached.

    Args:
        config: Kept here so that its id is no other's.
        implementation: What it named before.
        users: One object for each forward that needs it.
    """

    config: PretrainedConfig
    implementation: str
    users: set[object] = field(default_factory=set)


class _Attachments:
    """The configs that are attached, by id."""

    def __init__(self) -> None:
        self._found: dict[int, _Attachment] = {}
        self.renew_lock()

    def renew_lock(self) -> None:
        """Forget who holds the lock."""
        # The collector may close a forward that was abandoned while this thread holds it.
        self._lock = RLock()

    def add(self, config: PretrainedConfig, user: object) -> None:
        with self._lock:
            name = config._attn_implementation
            attachment = self._found.setdefault(id(config), _Attachment(config, name))
            attachment.users.add(user)
            if not isinstance(name, _Name):
                config._attn_implementation_internal = _Name(name)

    def remove(self, configs: Sequence[PretrainedConfig], user: object) -> None:
        """Restore those that nobody else uses; of no effect for one that was not added."""
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
    """Name under which tree attention stands in Transformers' registries.

    Some modeling files compare the name of their implementation with a word, and then compute
    attention themselves. In such a comparison it equals the name it stands for, so that they do
    what they always do; a registry finds it by its text.
    """

    __slots__ = ("previous",)
    previous: str

    def __new__(cls, previous: str) -> Self:
        """Register tree attention on top of `previous` and return its name."""
        name = super().__new__(cls, register(previous))
        name.previous = previous
        return name

    def __getnewargs__(self) -> tuple[str]:
        """Let copies of a config be made while it is attached."""
        return (self.previous,)

    def __eq__(self, other: object) -> bool:
        """Return whether `other` is the same text, or the name that this stands for."""
        return str.__eq__(self, other) is True or self.previous == other

    def __ne__(self, other: object) -> bool:
        """Tell the opposite."""
        return not self == other

    __hash__ = str.__hash__  # of its text: no registry takes it for `previous`


@cache  # asked for at every forward
def register(previous: str) -> str:
    """Register tree attention on top of `previous` and return its name."""
    name = _PREFIX + previous
    AttentionInterface.register(name, tree_attention_function(previous))
    AttentionMaskInterface.register(name, tree_mask_function(previous))
    return name
