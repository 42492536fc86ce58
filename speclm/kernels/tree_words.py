"""Ancestor bits and depths of trees that are made on the device."""

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.errors import KernelError
from speclm.kernels.backends import (
    Choice,
    choose,
    is_recording,
    require_backend_name,
    triton_obstacle,
)
from speclm.kernels.inputs import MAX_SLOTS, require_readable, require_tensors
from speclm.kernels.reference import tree_words_reference
from speclm.tree.topology import num_words

BACKENDS = ("triton", "reference")
"""Backends of `tree_words`, the preferred one first."""

_SCHEMA = "(Tensor parents, str backend) -> (Tensor, Tensor)"


def tree_words(
    parents: Int[Tensor, "rows nodes"], *, check_values: bool = True, backend: str = "auto"
) -> tuple[Int[Tensor, "rows nodes words"], Int[Tensor, "rows nodes"]]:
    """Return what tree attention sees of trees that are given by parents.

    Args:
        parents: Index of each node's parent, which comes before it; int32 or int64. Node 0 is the
            root and its own parent. Any other node that is its own parent is padding. At most 256
            nodes.
        check_values: Check the parents too, which reads them on the host. Pass False in a loop that
            must not wait for the device. Never done while a graph is compiled or captured.
        backend: ``"triton"``, ``"reference"``, or ``"auto"``: the environment variable
            ``SPECLM_KERNELS``, or else the first of these that runs on this device.

    Returns:
        The words, int64: bit ``j % 64`` of word ``j // 64`` is set when node j is the node or above
        it; and the depths, int32, which are 0 for the root and for padding. Does not sync with the
        device where values are not checked.

    Raises:
        KernelError: If something does not fit, or the backend cannot compute it. It is a
            ValueError, and raised before anything is launched.

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
        _require_shape(parents)
    if check_values and not is_recording(parents.device):
        require_readable(parents)
        _require_values(parents)
    words, depths = torch.ops.speclm.tree_words.default(parents, backend)
    return words, depths


def tree_words_backend(device: torch.device, backend: str = "auto") -> Choice:
    """Return the backend that computes a call of `tree_words` on a device, and why.

    Raises:
        KernelError: If `backend` does not run there.
    """
    obstacles = {"triton": triton_obstacle(device), "reference": None}
    return choose(backend, names=BACKENDS, obstacles=obstacles)


def _compute(parents: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Compute the op."""
    _require_shape(parents)
    choice = tree_words_backend(parents.device, backend)
    if parents.shape[0] == 0:
        return _allocate(parents, backend)
    if choice.backend == "reference":
        return tree_words_reference(parents)
    from speclm.kernels._triton_tree_words import tree_words_triton

    return tree_words_triton(parents)


def _allocate(parents: Tensor, backend: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - for all
    """Return empty results of the op: what a compiler is told."""
    _require_shape(parents)
    rows, nodes = parents.shape
    words = parents.new_empty(rows, nodes, num_words(nodes), dtype=torch.int64)
    return words, parents.new_empty(rows, nodes, dtype=torch.int32)


def _require_shape(parents: Tensor) -> None:
    if parents.ndim != 2 or parents.dtype not in {torch.int32, torch.int64}:
        raise KernelError(
            f"parents is {parents.dtype} of shape {tuple(parents.shape)}, expected a row of "
            "parents for each tree, int32 or int64"
        )
    if not 1 <= parents.shape[1] <= MAX_SLOTS:
        raise KernelError(
            f"parents has {parents.shape[1]} nodes, expected 1 to {MAX_SLOTS}; draft fewer tokens"
        )


def _require_values(parents: Tensor) -> None:
    """Check what only the values tell; reads them on the host, which waits for the device."""
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


torch.library.define("speclm::tree_words", _SCHEMA)
torch.library.impl("speclm::tree_words", "CompositeExplicitAutograd", _compute)
torch.library.register_fake("speclm::tree_words", _allocate)
