"""What makes a `SpecModel` behave like its base, and a base's `generate` like a `SpecModel`'s."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from speclm.errors import PatchError
from speclm.model.fitting import MOVES, move
from speclm.target import TargetView

_ATTRIBUTE = "generate"
_ABSENT = object()


class Wrapper:
    """Behaves like the model that it wraps, except for what a subclass defines."""

    _target: TargetView

    @property
    def base(self) -> PreTrainedModel:
        """The wrapped model."""
        return self._target.model

    @property
    def config(self) -> PretrainedConfig:
        """The base's config."""
        return self.base.config

    @property
    def generation_config(self) -> GenerationConfig:
        """The base's generation config."""
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.base.generation_config = config

    @property
    def device(self) -> torch.device:
        """The base's device."""
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype."""
        return self.base.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward of the base."""
        return self.base(*args, **kwargs)

    @property  # type: ignore[misc]  # that of object can be written
    def __class__(self) -> type:  # what isinstance and pipelines ask for
        return type(self.base) if "_target" in vars(self) else type(self)

    def __getattr__(self, name: str) -> Any:
        if name == "_target" or name.startswith("__"):  # asked for before they exist, by copying
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in MOVES:
            return partial(move, self, name)
        return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        is_own = hasattr(type(self), name) or name in vars(self) or "_target" not in vars(self)
        if is_own or not hasattr(self.base, name):
            object.__setattr__(self, name, value)
        else:
            setattr(self.base, name, value)

    def __dir__(self) -> list[str]:
        # Public names only, ours before those of the base: what completion offers.
        own = dir(type(self))
        public = (name for name in [*own, *dir(self.base)] if not name.startswith("_"))
        return list(dict.fromkeys([*public, *(name for name in own if name.startswith("__"))]))

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return object.__new__, (type(self),), dict(vars(self))  # by default it is __class__ itself


class AttachedGenerate:
    """The `generate` of a patched model object.

    A copy of the model, deep or pickled, is not patched: it has what was there before.
    """

    def __init__(
        self, base: PreTrainedModel, generate: Callable[..., Any], *, owner: object
    ) -> None:
        """Keep what is called, what it replaces, and who may remove it."""
        self.owner = owner
        self.before: Any = vars(base).get(_ATTRIBUTE, _ABSENT)
        self.is_entered = False
        self._base = base
        self._generate = generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement."""
        return self._generate(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.before is _ABSENT:
            return getattr, (self._base, _ATTRIBUTE)  # the copy has no such attribute at that time
        return _same, (self.before,)


def attach(base: PreTrainedModel, generate: Callable[..., Any], *, owner: object) -> None:
    """Replace the `generate` of a model object.

    Raises:
        PatchError: If the model is patched already.
    """
    current = _current(base)
    if current is not None:
        whose = "this" if current.owner is owner else "another"
        raise PatchError(
            f"{type(base).__name__} is patched by {whose} SpecModel already, expected one patch at "
            "a time; call detach() on that SpecModel first"
        )
    object.__setattr__(base, _ATTRIBUTE, AttachedGenerate(base, generate, owner=owner))


def detach(base: PreTrainedModel, *, owner: object) -> None:
    """Restore the `generate` that a model object had before.

    Raises:
        PatchError: If the owner did not patch it, or something else was put over the patch.
    """
    current = _current(base)
    if current is None or current.owner is not owner:
        found = vars(base).get(_ATTRIBUTE, "its class's own")
        raise PatchError(
            f"generate of {type(base).__name__} is {found!r}, expected the patch of this "
            "SpecModel; what was patched later has to be undone first"
        )
    if current.before is _ABSENT:
        object.__delattr__(base, _ATTRIBUTE)
    else:
        object.__setattr__(base, _ATTRIBUTE, current.before)


def enter(base: PreTrainedModel, generate: Callable[..., Any], *, owner: object) -> None:
    """Begin a ``with`` block: attach, unless the owner has done so and is in no block yet.

    Raises:
        PatchError: If the model is patched by another, or the owner is in a block already.
    """
    current = _current(base)
    if current is None or current.owner is not owner or current.is_entered:
        attach(base, generate, owner=owner)
    vars(base)[_ATTRIBUTE].is_entered = True


def _current(base: PreTrainedModel) -> AttachedGenerate | None:
    found = vars(base).get(_ATTRIBUTE)
    return found if isinstance(found, AttachedGenerate) else None


def _same(value: Any) -> Any:
    return value
