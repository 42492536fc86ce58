"""Operations on the slots of a tree: keep a path, and compute ancestor words from parents."""

from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from speclm.errors import KernelError
from speclm.kernels.backends import choose, is_recording, require_backend_name, triton_obstacle
from speclm.kernels.inputs import INTEGERS, MAX_SLOTS, require_readable, require_tensors
from speclm.kernels.reference import keep_path_reference, tree_words_reference
from speclm.tree.words import num_words

_KEEP_PATH_SCHEMA = (
    "(Tensor(a!) storage, Tensor paths, Tensor prefix_lengths, Tensor? tree_starts, str backend) "
    "-> ()"
)
_TREE_WORDS_SCHEMA = "(Tensor parents, str backend) -> (Tensor, Tensor)"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_path_(
    storage: Shaped[Tensor, "layers batch kv_heads kv_len head_dim"],
    paths: Int[Tensor, "batch path"],
    *,
    prefix_lengths: Int[Tensor, " batch"],
    tree_starts: Int[Tensor, " batch"] | None = None,
    check_values: bool = True,
    backend: str = "auto",
) -> None:
    """Move the slots on each row's path to the end of its prefix, in place and in every layer.

    Slot ``tree_starts[b] + paths[b, i]`` of row b moves to slot ``prefix_lengths[b] + i``. Bits
    do not change on the way, and all other slots keep theirs.

    Args:
        storage: Keys and values of all layers. Any type of 1, 2, 4 or 8 bytes; any strides, with 1
            in the last axis.
        paths: Slots of the tree in ascending order, padded at the end with -1. int32 or int64, like
            all whole numbers here.
        prefix_lengths: Slots before the tree, left padding included.
        tree_starts: First tree slot; None for `prefix_lengths`.
        check_values: Also check the values of paths and lengths, which syncs with the device.
            Skipped while a graph is compiled or captured.
        backend: ``"triton"``, ``"reference"``, or ``"auto"``: the environment variable
            ``SPECLM_KERNELS``, or else the first of these that runs on this device.

    Raises:
        KernelError: If an argument does not fit, or the backend cannot compute the call; nothing
            has been moved then.

    Example:
        >>> import torch
        >>> from speclm.kernels import keep_path_
        >>> storage = torch.arange(8.0).view(1, 1, 1, 8, 1)  # 4 slots of prefix, 4 of the tree
        >>> keep_path_(storage, torch.tensor([[0, 2, -1]]), prefix_lengths=torch.tensor([4]))
        >>> storage.flatten()
        tensor([0., 1., 2., 3., 4., 6., 6., 7.])
    """
    if not torch.compiler.is_compiling():  # a compiler checks the op itself
        starts = {} if tree_starts is None else {"tree_starts": tree_starts}
        require_tensors(storage=storage, paths=paths, prefix_lengths=prefix_lengths, **starts)
        require_backend_name(backend)
        _require_paths_fit(storage, paths, prefix_lengths, tree_starts)
    if torch.is_grad_enabled() and storage.requires_grad:
        raise KernelError(
            "storage requires gradients, which moving slots does not compute; call it under "
            "torch.no_grad()"
        )
    if check_values and not is_recording(storage.device):
        require_readable(storage)
        _require_path_values(storage, paths, prefix_lengths, tree_starts)
    torch.ops.speclm.keep_path_.default(storage, paths, prefix_lengths, tree_starts, backend)


def tree_words(
    parents: Int[Tensor, "rows nodes"], *, check_values: bool = True, backend: str = "auto"
) -> tuple[Int[Tensor, "rows nodes words"], Int[Tensor, "rows nodes"]]:
    """Return the ancestor words and depths of trees that are given as parents.

    Args:
        parents: Index of each node's parent, which comes before it; int32 or int64. Node 0 is the
            root and its own parent. Any other node that is its own parent is padding. At most 256
            nodes.
        check_values: Also check the values of the parents, which syncs with the device. Skipped
            while a graph is compiled or captured.
        backend: As for `keep_path_`.

    Returns:
        The words, int64: bit ``j % 64`` of word ``j // 64`` is set if node j is the node itself or
        an ancestor of it; and the depths, int32, which are 0 for the root and for padding.

    Raises:
        KernelError: If an argument does not fit, or the backend cannot compute the call.

    Example:
        >>> import torch
        >>> from speclm.kernels import tree_words
        >>> words, depths = tree_words(torch.tensor([[0, 0, 0, 1]]))  # two children, a grandchild
        >>> [f"{word:04b}" for word in words[0, :, 0].tolist()], depths.tolist()
        (['0001', '0011', '0101', '1011'], [[0, 1, 1, 2]])
    """
    if not torch.compiler.is_compiling():  # a compiler checks the op itself
        require_tensors(parents=parents)
        require_backend_name(backend)
        _require_parents_fit(parents)
    if check_values and not is_recording(parents.device):
        require_readable(parents)
        _require_parent_values(parents)
    words, depths = torch.ops.speclm.tree_words.default(parents, backend)
    return words, depths


def _keep_path(
    storage: Tensor,
    paths: Tensor,
    prefix_lengths: Tensor,
    tree_starts: Tensor | None,
    backend: str,
) -> None:
    """Compute the op `keep_path_`."""
    _require_paths_fit(storage, paths, prefix_lengths, tree_starts)
    choice = choose(backend, triton_obstacle(storage.device))
    if storage.numel() == 0 or paths.numel() == 0:
        return
    move = keep_path_reference
    if choice.backend == "triton":
        from speclm.kernels._triton_tree_ops import keep_path_triton

        move = keep_path_triton
    bits = storage.view(_BITS[storage.itemsize])  # arithmetic would alter some NaNs
    move(bits, paths, prefix_lengths=prefix_lengths, tree_starts=tree_starts)


def _trace_keep_path(*arguments: Any) -> None:
    """Check a call of the op for a compiler; it returns nothing."""
    _require_paths_fit(*arguments[:-1])


def _tree_words(parents: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Compute the op `tree_words`."""
    _require_parents_fit(parents)
    choice = choose(backend, triton_obstacle(parents.device))
    if parents.shape[0] == 0:
        return _allocate_words(parents, backend)
    if choice.backend == "reference":
        return tree_words_reference(parents)
    from speclm.kernels._triton_tree_ops import tree_words_triton

    return tree_words_triton(parents)


def _allocate_words(parents: Tensor, backend: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    """Return empty results of the op, for a compiler."""
    _require_parents_fit(parents)
    rows, nodes = parents.shape
    words = parents.new_empty(rows, nodes, num_words(nodes), dtype=torch.int64)
    return words, parents.new_empty(rows, nodes, dtype=torch.int32)


def _require_paths_fit(
    storage: Tensor, paths: Tensor, prefix_lengths: Tensor, tree_starts: Tensor | None
) -> None:
    """Check shapes, types, strides and devices without reading a tensor."""
    _require_storage(storage)
    if paths.ndim != 2 or paths.dtype not in INTEGERS:
        raise KernelError(
            f"paths is {paths.dtype} of shape {tuple(paths.shape)}, expected one path for each row "
            "of the batch, int32 or int64"
        )
    batch = paths.shape[0]
    if storage.shape[1] != batch:
        raise KernelError(
            f"storage has {storage.shape[1]} rows, paths {batch}; pass one path for each row"
        )
    numbers = {"prefix_lengths": prefix_lengths, "tree_starts": tree_starts}
    for name, tensor in numbers.items():
        if tensor is not None and (tensor.shape != (batch,) or tensor.dtype not in INTEGERS):
            raise KernelError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected one whole "
                f"number for each of the {batch} rows, int32 or int64"
            )
    for name, tensor in {"paths": paths, **numbers}.items():
        if tensor is not None and tensor.device != storage.device:
            raise KernelError(
                f"{name} is on {tensor.device}, storage on {storage.device}; move it there"
            )


def _require_storage(storage: Tensor) -> None:
    if storage.ndim != 5:
        raise KernelError(
            f"storage has shape {tuple(storage.shape)}, expected 5 axes: layers, rows, heads, "
            "slots, head_dim"
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
                f"storage has strides {storage.stride()}, with which elements overlap in memory; "
                "expand none of its axes, and let none overlap"
            )
        extent = max(extent, stride * size)


def _require_path_values(
    storage: Tensor, paths: Tensor, prefix_lengths: Tensor, tree_starts: Tensor | None
) -> None:
    """Check the values of paths and lengths; syncs with the device."""
    lengths, kv_len = prefix_lengths.tolist(), storage.shape[3]
    begins = lengths if tree_starts is None else tree_starts.tolist()
    kept = [_without_padding(row, padded) for row, padded in enumerate(paths.tolist())]
    for row, (length, begin, path) in enumerate(zip(lengths, begins, kept, strict=True)):
        if not 0 <= length <= begin:
            raise KernelError(
                f"row {row} has a prefix of {length} slots and its tree from slot {begin}, "
                "expected 0 <= prefix_lengths <= tree_starts"
            )
        past = begin + path[-1] + 1 if path else length
        if past > kv_len:
            raise KernelError(
                f"row {row} needs slots up to {past}, the cache has {kv_len}; correct its length "
                "or its path"
            )


def _without_padding(row: int, padded: list[int]) -> list[int]:
    """Return the path of a row without the padding at its end."""
    path = padded
    while path and path[-1] == -1:
        path = path[:-1]
    if any(slot <= last for last, slot in pairwise([-1, *path])):
        raise KernelError(
            f"path of row {row} is {padded!r}, expected slots in ascending order and -1 only "
            "after them; sort it, or move the padding"
        )
    return path


def _require_parents_fit(parents: Tensor) -> None:
    if parents.ndim != 2 or parents.dtype not in INTEGERS:
        raise KernelError(
            f"parents is {parents.dtype} of shape {tuple(parents.shape)}, expected a row of "
            "parents for each tree, int32 or int64"
        )
    if not 1 <= parents.shape[1] <= MAX_SLOTS:
        raise KernelError(
            f"parents has {parents.shape[1]} nodes, expected 1 to {MAX_SLOTS}; draft fewer tokens"
        )


def _require_parent_values(parents: Tensor) -> None:
    """Check the values of parents; syncs with the device."""
    for row, tree in enumerate(parents.tolist()):
        for node, parent in enumerate(tree):
            if not 0 <= parent <= node:
                raise KernelError(
                    f"node {node} of row {row} has parent {parent}, expected 0 at node 0 and an "
                    "earlier node, or the node itself, at others; list parents before children"
                )
            is_padding = parent > 0 and tree[parent] == parent
            if is_padding and parent != node:
                raise KernelError(
                    f"node {node} of row {row} has parent {parent}, which is its own parent and "
                    "so padding; expected a node of the tree"
                )


torch.library.define("speclm::keep_path_", _KEEP_PATH_SCHEMA)
torch.library.impl("speclm::keep_path_", "CompositeExplicitAutograd", _keep_path)
torch.library.register_fake("speclm::keep_path_", _trace_keep_path)
torch.library.define("speclm::tree_words", _TREE_WORDS_SCHEMA)
torch.library.impl("speclm::tree_words", "CompositeExplicitAutograd", _tree_words)
torch.library.register_fake("speclm::tree_words", _allocate_words)
