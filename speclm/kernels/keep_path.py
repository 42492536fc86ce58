"""Moving the slots of one path of a tree to the end of a prefix, in all layers at once."""

import sys
from itertools import pairwise

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from speclm.errors import KernelError
from speclm.kernels.backends import (
    Choice,
    choose,
    is_recording,
    require_backend_name,
    triton_obstacle,
)
from speclm.kernels.inputs import require_pages, require_readable, require_tensors
from speclm.kernels.reference import keep_path_reference

BACKENDS = ("triton", "reference")
"""Backends of `keep_path_`, the preferred one first."""

_SCHEMA = (
    "(Tensor(a!) storage, Tensor paths, Tensor prefix_lengths, Tensor? tree_starts, "
    "Tensor? block_table, str backend) -> ()"
)
_INTEGERS = (torch.int32, torch.int64)
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_path_(
    storage: Shaped[Tensor, "layers kv_rows kv_heads kv_len head_dim"],
    paths: Int[Tensor, "batch path"],
    *,
    prefix_lengths: Int[Tensor, " batch"],
    tree_starts: Int[Tensor, " batch"] | None = None,
    block_table: Int[Tensor, "batch blocks"] | None = None,
    check_values: bool = True,
    backend: str = "auto",
) -> None:
    """Move the slots on each row's path to the end of its prefix, in place and in every layer.

    What is in slot ``tree_starts[b] + paths[b, i]`` of row b goes to ``prefix_lengths[b] + i``. All
    other slots keep their bits, and so do the values that are moved, whatever they are.

    Args:
        storage: Keys and values of all layers, ``[layers, batch, kv_heads, kv_len, head_dim]``, or
            all their pages where there is a `block_table`, ``[layers, pages, kv_heads, page_len,
            head_dim]``. Any type of 1, 2, 4 or 8 bytes; strides are free but for the last axis.
        paths: Slots of the tree in ascending order, padded with -1 behind. int32 or int64, as all
            whole numbers here.
        prefix_lengths: Slots before the tree, left padding included.
        tree_starts: First tree slot; None for `prefix_lengths`.
        block_table: Page of each block of each row; None for a contiguous cache.
        check_values: Check paths, lengths and pages too, which reads them on the host. Pass False
            in a loop that must not wait for the device. Never done while a graph is compiled or
            captured.
        backend: ``"triton"``, ``"reference"``, or ``"auto"``: the environment variable
            ``SPECLM_KERNELS``, or else the first of these that runs on this device.

    Raises:
        KernelError: If something does not fit, or the backend cannot compute it. It is a
            ValueError, and raised before anything is moved.

    Example:
        >>> import torch
        >>> from speclm.kernels import keep_path_
        >>> storage = torch.arange(8.0).view(1, 1, 1, 8, 1)  # 4 slots of prefix, 4 of the tree
        >>> keep_path_(storage, torch.tensor([[0, 2, -1]]), prefix_lengths=torch.tensor([4]))
        >>> storage.flatten()
        tensor([0., 1., 2., 3., 4., 6., 6., 7.])
    """
    if not torch.compiler.is_compiling():  # a compiler checks the op itself
        given = {"prefix_lengths": prefix_lengths, "tree_starts": tree_starts}
        given |= {"storage": storage, "paths": paths, "block_table": block_table}
        optional = ("tree_starts", "block_table")
        require_tensors(
            **{name: x for name, x in given.items() if not (x is None and name in optional)}
        )
        require_backend_name(backend)
        _require_shapes(storage, paths, prefix_lengths, tree_starts, block_table)
    if torch.is_grad_enabled() and storage.requires_grad:
        raise KernelError(
            "storage requires gradients, which moving slots does not compute; call it under "
            "torch.no_grad()"
        )
    if check_values and not is_recording(storage.device):
        require_readable(storage)
        _require_values(storage, paths, prefix_lengths, tree_starts, block_table)
    torch.ops.speclm.keep_path_.default(
        storage, paths, prefix_lengths, tree_starts, block_table, backend
    )


def keep_path_backend(device: torch.device, backend: str = "auto") -> Choice:
    """Return the backend that computes a call of `keep_path_` on a device, and why.

    Raises:
        KernelError: If `backend` does not run there.
    """
    obstacles = {"triton": triton_obstacle(device), "reference": None}
    return choose(backend, names=BACKENDS, obstacles=obstacles)


def _compute(
    storage: Tensor,
    paths: Tensor,
    prefix_lengths: Tensor,
    tree_starts: Tensor | None,
    block_table: Tensor | None,
    backend: str,
) -> None:
    """Compute the op."""
    _require_shapes(storage, paths, prefix_lengths, tree_starts, block_table)
    choice = keep_path_backend(storage.device, backend)
    if storage.numel() == 0 or paths.numel() == 0:
        return
    move = keep_path_reference
    if choice.backend == "triton":
        from speclm.kernels._triton_keep_path import keep_path_triton

        move = keep_path_triton
    move(
        storage.view(_BITS[storage.itemsize]),  # bits, as arithmetic would alter some NaNs
        paths,
        prefix_lengths=prefix_lengths,
        tree_starts=tree_starts,
        block_table=block_table,
    )


def _trace(
    storage: Tensor,
    paths: Tensor,
    prefix_lengths: Tensor,
    tree_starts: Tensor | None,
    block_table: Tensor | None,
    backend: str,  # noqa: ARG001 - the same for all
) -> None:
    """Check a call of the op, which returns nothing: what a compiler is told."""
    _require_shapes(storage, paths, prefix_lengths, tree_starts, block_table)


def _require_shapes(
    storage: Tensor,
    paths: Tensor,
    prefix_lengths: Tensor,
    tree_starts: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Check what can be told without reading a tensor."""
    _require_storage(storage)
    if paths.ndim != 2 or paths.dtype not in _INTEGERS:
        raise KernelError(
            f"paths is {paths.dtype} of shape {tuple(paths.shape)}, expected one path for each row "
            "of the batch, int32 or int64"
        )
    batch = paths.shape[0]
    if block_table is None and storage.shape[1] != batch:
        raise KernelError(
            f"storage has {storage.shape[1]} rows, paths {batch}; pass one path for each row, or a "
            "block_table for a paged cache"
        )
    numbers = {"prefix_lengths": prefix_lengths, "tree_starts": tree_starts}
    for name, tensor in numbers.items():
        if tensor is not None and (tensor.shape != (batch,) or tensor.dtype not in _INTEGERS):
            raise KernelError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected one whole "
                f"number for each of the {batch} rows, int32 or int64"
            )
    if block_table is not None and (
        block_table.ndim != 2 or block_table.shape[0] != batch or block_table.dtype not in _INTEGERS
    ):
        raise KernelError(
            f"block_table is {block_table.dtype} of shape {tuple(block_table.shape)}, expected "
            f"pages of {batch} rows, int32 or int64"
        )
    if block_table is not None and storage.shape[3] == 0:
        raise KernelError(
            f"storage has shape {tuple(storage.shape)}, which are pages without slots; leave out "
            "block_table"
        )
    for name, tensor in {"paths": paths, **numbers, "block_table": block_table}.items():
        if tensor is not None and tensor.device != storage.device:
            raise KernelError(
                f"{name} is on {tensor.device}, storage on {storage.device}; move it there"
            )


def _require_storage(storage: Tensor) -> None:
    if storage.ndim != 5:
        raise KernelError(
            f"storage has shape {tuple(storage.shape)}, expected 5 axes: layers, rows or pages, "
            "heads, slots, head_dim"
        )
    if storage.itemsize not in _BITS:
        raise KernelError(
            f"storage is {storage.dtype} of {storage.itemsize} bytes, expected 1, 2, 4 or 8; view "
            "it as a narrower type"
        )
    if storage.shape[4] > 1 and storage.stride(4) != 1:
        raise KernelError(
            f"storage has strides {storage.stride()}, expected 1 in the last axis; transpose other "
            "axes"
        )
    extent = 1
    for stride, size in sorted(zip(storage.stride(), storage.shape, strict=True)):
        if size > 1 and stride < extent:
            raise KernelError(
                f"storage has strides {storage.stride()}, so that several of its places are one; "
                "expand none of its axes, and let none overlap"
            )
        extent = max(extent, stride * size)


def _require_values(
    storage: Tensor,
    paths: Tensor,
    prefix_lengths: Tensor,
    tree_starts: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Check what only the values tell; reads them on the host, which waits for the device."""
    lengths = prefix_lengths.tolist()
    begins = lengths if tree_starts is None else tree_starts.tolist()
    kept = [_require_path(row, padded) for row, padded in enumerate(paths.tolist())]
    places = list(zip(lengths, begins, kept, strict=True))
    page_len, kv_len = storage.shape[3], storage.shape[3]
    if block_table is not None:
        kv_len *= block_table.shape[1]
    for row, (length, begin, path) in enumerate(places):
        if not 0 <= length <= begin:
            raise KernelError(
                f"row {row} has a prefix of {length} slots and its tree from slot {begin}, "
                "expected 0 <= prefix_lengths <= tree_starts"
            )
        past = _past(length, begin, path)
        if past > kv_len:
            raise KernelError(
                f"row {row} needs slots up to {past}, the cache has {kv_len}; correct its length "
                "or its path"
            )
    if block_table is not None:
        written = [(_first_written(*place), _past(*place)) for place in places]
        require_pages(block_table, num_pages=storage.shape[1], page_len=page_len, written=written)


def _past(length: int, begin: int, path: list[int]) -> int:
    """Return the slot behind the last one of a row that counts."""
    return begin + path[-1] + 1 if path else length


def _first_written(length: int, begin: int, path: list[int]) -> int:
    """Return the first slot of a row that is written; one that no row has where none is."""
    for offset, slot in enumerate(path):
        if begin + slot != length + offset:
            return length + offset
    return sys.maxsize


def _require_path(row: int, padded: list[int]) -> list[int]:
    """Return a path without the padding behind it."""
    path = padded
    while path and path[-1] == -1:
        path = path[:-1]
    if any(slot <= last for last, slot in pairwise([-1, *path])):
        raise KernelError(
            f"path of row {row} is {padded!r}, expected slots in ascending order and -1 only "
            "behind them; sort it, or move the padding"
        )
    return path


torch.library.define("speclm::keep_path_", _SCHEMA)
torch.library.impl("speclm::keep_path_", "CompositeExplicitAutograd", _compute)
torch.library.register_fake("speclm::keep_path_", _trace)
