"""Attention of tree nodes to a prefix and to their ancestors."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.errors import KernelError
from speclm.kernels.backends import (
    Choice,
    choose,
    head_obstacle,
    is_recording,
    require_backend_name,
    triton_obstacle,
)
from speclm.kernels.inputs import (
    TreeAttentionInputs,
    require_shapes,
    require_tensors,
    require_values,
)
from speclm.kernels.launch import plan_launch
from speclm.kernels.reference import tree_attention_reference

_MAX_PAIRS = 65_535  # of a grid's second and third axis
_SCHEMA = (
    "(Tensor query, Tensor key, Tensor value, Tensor prefix_lengths, Tensor ancestor_words, "
    "Tensor depths, Tensor? prefix_starts, Tensor? tree_starts, Tensor? sinks, "
    "float scale, int? window, float? softcap, int? num_splits, "
    "bool deterministic, bool return_lse, str backend) -> (Tensor, Tensor)"
)


def tree_attention(  # noqa: PLR0913 - a kernel's arguments
    query: Float[Tensor, "batch q_heads nodes head_dim"],
    key: Float[Tensor, "batch kv_heads kv_len head_dim"],
    value: Float[Tensor, "batch kv_heads kv_len head_dim"],
    *,
    prefix_lengths: Int[Tensor, " batch"],
    ancestor_words: Int[Tensor, "rows nodes words"],
    depths: Int[Tensor, "depth_rows slots"],
    prefix_starts: Int[Tensor, " batch"] | None = None,
    tree_starts: Int[Tensor, " batch"] | None = None,
    sinks: Float[Tensor, " q_heads"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    num_splits: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    check_values: bool = True,
    backend: str = "auto",
) -> (
    Float[Tensor, "batch nodes q_heads head_dim"]
    | tuple[Float[Tensor, "batch nodes q_heads head_dim"], Float[Tensor, "batch q_heads nodes"]]
):
    """Attend from every node of a tree to its row's prefix and to its own ancestors.

    Keys and values of the tree are already in the cache. Row b sees its prefix, the slots
    ``[prefix_starts[b], prefix_lengths[b])``, and the nodes named by `ancestor_words` of the tree
    that starts at slot ``tree_starts[b]``. No other slot is read; these may hold any value, even
    NaN. Values of tree slots must be finite, also where a node does not see them.

    Args:
        query: Queries of the last `nodes` tree slots. Here and below, any strides with 1 in the
            last axis.
        key: Keys of all slots. The number of query heads is a multiple of the number of key heads.
        value: Values, in the shape of the keys.
        prefix_lengths: Slots before the tree, left padding included; 0 is allowed. int32 or int64,
            like all whole numbers here except the words.
        ancestor_words: Bit ``j % 64`` of word ``j // 64`` is set if a node sees tree slot j: its
            ancestors and itself. int64; one row is shared by the batch.
        depths: Depth of every tree slot, with those of the nodes last. At most 256 slots.
        prefix_starts: Slots of left padding; None for none.
        tree_starts: First tree slot; None for `prefix_lengths`.
        sinks: Logit of each query head that only adds to the softmax's denominator.
        scale: Factor of the scores; None for ``head_dim ** -0.5``.
        window: Positions that a node sees, itself included. A node's position is the prefix length
            plus its depth, not its slot.
        softcap: Bound c of the scores, ``c * tanh(score / c)``, applied before masking.
        num_splits: Parts that the keys of one row and head are split into; None for as many as
            fill the device. Ignored for `deterministic` calls.
        deterministic: Make a node's result bitwise independent of the number of nodes and rows
            that are computed together, and of splits. Slower.
        return_lse: Also return the natural logarithm of the softmax's denominator, float32.
        check_values: Also check the values of lengths, words and depths, which syncs with the
            device. Skipped while a graph is compiled or captured.
        backend: ``"triton"``, ``"reference"``, or ``"auto"``: the environment variable
            ``SPECLM_KERNELS``, or else the first of these that takes the call on this device.

    Returns:
        The output, nodes before heads, as Transformers' attention functions return it; with
        `return_lse` a pair. The Triton kernel does not sync with the device.

    Raises:
        KernelError: If an argument does not fit, or the backend cannot compute the call; nothing
            has been launched then.

    Example:
        >>> import torch
        >>> from speclm.kernels import tree_attention, tree_words
        >>> words, depths = tree_words(torch.tensor([[0, 0, 0, 1]]))  # two children, a grandchild
        >>> keys, values = torch.randn(2, 1, 2, 10, 64)  # 6 slots of prefix, 4 of the tree
        >>> tree_attention(
        ...     torch.randn(1, 8, 4, 64), keys, values, prefix_lengths=torch.tensor([6]),
        ...     ancestor_words=words, depths=depths,
        ... ).shape
        torch.Size([1, 4, 8, 64])
    """
    is_traced = torch.compiler.is_compiling()  # a compiler checks the op itself
    if not is_traced:
        require_tensors(query=query)
    if scale is None:
        scale = query.shape[-1] ** -0.5 if query.ndim and query.shape[-1] else 1.0
    inputs = TreeAttentionInputs(
        query=query,
        key=key,
        value=value,
        prefix_lengths=prefix_lengths,
        ancestor_words=ancestor_words,
        depths=depths,
        prefix_starts=prefix_starts,
        tree_starts=tree_starts,
        sinks=sinks,
        scale=scale,
        window=window,
        softcap=softcap,
        num_splits=num_splits,
        deterministic=deterministic,
        return_lse=return_lse,
    )
    if not is_traced:
        require_shapes(inputs)
    differentiable = (query, key, value, sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable):
        raise KernelError(
            "query, key, value or sinks require gradients, which tree attention does not compute; "
            "call it under torch.no_grad()"
        )
    require_backend_name(backend)
    if check_values and not is_recording(query.device):
        require_values(inputs)
    output, lse = torch.ops.speclm.tree_attention.default(
        *(getattr(inputs, name) for name in TreeAttentionInputs.__slots__), backend
    )
    return (output, lse) if return_lse else output


def attention_backend(inputs: TreeAttentionInputs, backend: str = "auto") -> Choice:
    """Return the backend that computes a call of `tree_attention`, and why.

    Raises:
        KernelError: If `backend` cannot compute it.
    """
    query = inputs.query
    obstacle = triton_obstacle(query.device, query.dtype) or head_obstacle(inputs.head_dim)
    if inputs.batch * inputs.kv_heads > _MAX_PAIRS:
        obstacle = f"the Triton kernel takes at most {_MAX_PAIRS} rows times key heads"
    return choose(backend, obstacle)


def _compute(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Compute the op; its arguments are those of the schema, in order."""
    *values, backend = arguments
    inputs = TreeAttentionInputs(*values)
    choice = attention_backend(inputs, backend)
    if inputs.batch == 0:
        return _allocate(*arguments)
    if choice.backend == "reference":
        output, lse = tree_attention_reference(inputs)
    else:
        from speclm.kernels._triton_attention import tree_attention_triton

        output, lse = tree_attention_triton(inputs, plan_launch(inputs))
    return output, lse if inputs.return_lse else lse.new_empty(0)


def _allocate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return empty results of the op, for a compiler."""
    inputs = TreeAttentionInputs(*arguments[:-1])
    require_shapes(inputs)
    query = inputs.query
    output = query.new_empty(inputs.batch, inputs.num_nodes, inputs.q_heads, inputs.head_dim)
    shape = (inputs.batch, inputs.q_heads, inputs.num_nodes) if inputs.return_lse else (0,)
    return output, query.new_empty(shape, dtype=_sum_dtype(query))


def _sum_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


torch.library.define("speclm::tree_attention", _SCHEMA)
torch.library.impl("speclm::tree_attention", "CompositeExplicitAutograd", _compute)
torch.library.register_fake("speclm::tree_attention", _allocate)
