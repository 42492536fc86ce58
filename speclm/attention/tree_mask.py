"""A mask that is computed when something looks into it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(slots=True)
class _Source:
    """What a mask and its copies on other devices have in common.

    Args:
        compute: Returns the mask.
        is_touched: Whether an operation has had the mask itself, and may have changed it.
    """

    compute: Callable[[], Tensor | None]
    is_touched: bool = False


class TreeMask(Tensor):
    """Stands in for a step's additive mask on its way through a model.

    A kernel needs the window alone. Whatever else a model or a library does to the tensor is done
    to the mask itself, which is then computed, and is what counts from there on. Moves to another
    device are the exception.
    """

    window: int | None
    """Window of the layers that the mask is for."""

    _source: _Source

    @classmethod
    def of(
        cls,
        compute: Callable[[], Tensor | None],
        window: int | None,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Return a mask of the given shape that `compute` returns when it is asked for."""
        return cls._made(_Source(compute), window, shape=shape, dtype=dtype, device=device)

    @property
    def is_touched(self) -> bool:
        """Whether an operation has had the mask itself: it may not be the step's any more."""
        return self._source.is_touched

    def dense(self) -> Tensor:
        """Return the mask as an ordinary tensor."""
        mask = self._source.compute()
        assert mask is not None  # of a step that is not plain
        return mask.to(self.device)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.dense(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        dense: Any = self.dense().contiguous()
        return dense.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # a class method

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as PyTorch calls it
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation on the mask itself."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and not args[0].is_touched:
            (mask,) = args
            if kwargs.get("dtype") in {None, mask.dtype} and kwargs.get("device") is not None:
                return cls._made(
                    mask._source,
                    mask.window,
                    shape=tuple(mask.shape),
                    dtype=mask.dtype,
                    device=torch.device(kwargs["device"]),
                )

        def looked_into(value: Any) -> Any:
            if not isinstance(value, cls):
                return value
            value._source.is_touched = True  # what gets a view of it may write to it later
            return value.dense()

        args, kwargs = tree_map(looked_into, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def _made(
        cls,
        source: _Source,
        window: int | None,
        *,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        mask: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.window, mask._source = window, source
        return mask
