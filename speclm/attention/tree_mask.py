"""A mask that is computed when something looks into it."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class TreeMask(Tensor):
    """Stands in for a step's additive mask on its way through a model.

    A kernel needs the window alone. Whatever else a model or a library does to the tensor is done
    to the mask itself, which is then computed. Moves to another device are the exception.
    """

    window: int | None
    """Window of the layers that the mask is for."""

    _compute: Callable[[], Tensor]

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
        mask: Self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask.window, mask._compute = window, compute  # type: ignore[assignment]  # never None
        return mask

    def dense(self) -> Tensor:
        """Return the mask as an ordinary tensor."""
        return self._compute().to(self.device)

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
        if func is torch.ops.aten._to_copy.default:
            (mask,) = args
            if kwargs.get("dtype") in {None, mask.dtype} and kwargs.get("device") is not None:
                return cls.of(
                    mask._compute,
                    mask.window,
                    shape=tuple(mask.shape),
                    dtype=mask.dtype,
                    device=torch.device(kwargs["device"]),
                )
        args, kwargs = tree_map(lambda x: x.dense() if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **kwargs)
