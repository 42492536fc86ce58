"""Puts another `generate` on a model object, and takes it off again without a trace."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from speclm.errors import PatchError

_ATTRIBUTE = "generate"
_ABSENT = object()


class AttachedGenerate:
    """What stands on a model as its `generate` while it is patched.

    A copy of the model, deep or pickled, is not patched: it has what stood there before.
    """

    def __init__(
        self, base: PreTrainedModel, generate: Callable[..., Any], *, owner: object
    ) -> None:
        """Keep what is called, and what it takes the place of.

        Args:
            base: Model that is patched.
            generate: Called in place of the model's own.
            owner: Who may take it off.
        """
        self.owner = owner
        self.before: Any = vars(base).get(_ATTRIBUTE, _ABSENT)
        self.is_entered = False
        self._base = base
        self._generate = generate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what was put in place."""
        return self._generate(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.before is _ABSENT:
            return getattr, (self._base, _ATTRIBUTE)  # the copy has no such attribute at that time
        return _same, (self.before,)


def attach(base: PreTrainedModel, generate: Callable[..., Any], *, owner: object) -> None:
    """Make `generate` that of a model object.

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
    """Give a model object back the `generate` that it had.

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
