"""The inputs of tree attention, and their checks."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from speclm.errors import KernelError
from speclm.tree.words import num_words, unpack_words

MAX_SLOTS = 256
"""Maximum number of tree slots of one call: the nodes and their ancestors."""

MAX_SPLITS = 256
"""Maximum number of parts that the keys of one row and head are split into."""

INTEGERS = (torch.int32, torch.int64)
_MAX_DEPTH = 2**24
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OPTIONAL_TENSORS = ("prefix_starts", "tree_starts", "sinks")
_TENSORS = ("key", "value", "prefix_lengths", "ancestor_words", "depths", *_OPTIONAL_TENSORS)


@dataclass(frozen=True, slots=True)
class TreeAttentionInputs:
    """Arguments of `speclm.kernels.tree_attention`, which describes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    prefix_lengths: Tensor
    ancestor_words: Tensor
    depths: Tensor
    prefix_starts: Tensor | None = None
    tree_starts: Tensor | None = None
    sinks: Tensor | None = None
    scale: float = 1.0
    window: int | None = None
    softcap: float | None = None
    num_splits: int | None = None
    deterministic: bool = False
    return_lse: bool = False

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.query.shape[0]

    @property
    def q_heads(self) -> int:
        """Query heads."""
        return self.query.shape[1]

    @property
    def num_nodes(self) -> int:
        """Number of nodes that attend."""
        return self.query.shape[2]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.query.shape[3]

    @property
    def kv_heads(self) -> int:
        """Key heads."""
        return self.key.shape[1]

    @property
    def groups(self) -> int:
        """Query heads that share a key head."""
        return self.q_heads // self.kv_heads

    @property
    def num_rows(self) -> int:
        """Rows of the product with one key head: one for each node and query head of its group."""
        return self.num_nodes * self.groups

    @property
    def num_slots(self) -> int:
        """Tree slots; the last `num_nodes` of them are the nodes that attend."""
        return self.depths.shape[1]

    @property
    def kv_len(self) -> int:
        """Capacity of a row of the cache, in slots."""
        return self.key.shape[2]

    def host_bounds(self) -> list[tuple[int, int, int]]:
        """Return where the prefix of each row starts and ends and its tree starts; syncs."""
        lengths = self.prefix_lengths.tolist()
        starts = [0] * len(lengths) if self.prefix_starts is None else self.prefix_starts.tolist()
        trees = lengths if self.tree_starts is None else self.tree_starts.tolist()
        return list(zip(starts, lengths, trees, strict=True))


def require_tensors(**tensors: object) -> None:
    """Raise a `KernelError` for an argument that is not an ordinary, strided tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise KernelError(f"{name} is a {type(tensor).__name__}, expected a tensor")
        is_odd = tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg()
        if is_odd or tensor.layout != torch.strided:
            raise KernelError(
                f"{name} is quantised, nested, sparse or a lazy view, expected an ordinary tensor "
                "with strides; convert it first, e.g. with .dequantize(), .to_dense() or .clone()"
            )


def require_readable(tensor: Tensor) -> None:
    """Raise a `KernelError` if a tensor has no values to check."""
    if tensor.is_meta:
        raise KernelError(
            "tensors are on the meta device and hold no values; pass check_values=False"
        )


def require_shapes(inputs: TreeAttentionInputs) -> None:
    """Check shapes, types, devices, strides and numbers, without reading a tensor.

    Raises:
        KernelError: For the first one that does not fit.
    """
    require_tensors(query=inputs.query, **_tensors(inputs))
    _require_floats(inputs)
    _require_integers(inputs)
    sinks = inputs.sinks
    if sinks is not None and (sinks.shape != (inputs.q_heads,) or sinks.dtype not in _FLOATS):
        raise KernelError(
            f"sinks is {sinks.dtype} of shape {tuple(sinks.shape)}, expected one floating number "
            f"for each of the {inputs.q_heads} query heads"
        )
    for name, tensor in _tensors(inputs).items():
        if tensor.device != inputs.query.device:
            raise KernelError(
                f"{name} is on {tensor.device}, query on {inputs.query.device}; move it there"
            )
    for name in ("prefix_lengths", "prefix_starts", "tree_starts", "depths", "sinks"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise KernelError(
                f"{name} has strides {tensor.stride()}, expected 1 in the last axis; call "
                ".contiguous()"
            )
    _require_numbers(inputs)


def require_values(inputs: TreeAttentionInputs) -> None:
    """Check the values of lengths, words and depths; syncs with the device.

    Raises:
        KernelError: If a row's slots are not in the cache, or a node sees what it may not.
    """
    require_readable(inputs.query)
    for row, (start, length, begin) in enumerate(inputs.host_bounds()):
        if not 0 <= start <= length <= begin:
            raise KernelError(
                f"row {row} has its prefix in slots {start} to {length} and its tree from {begin}, "
                "expected 0 <= prefix_starts <= prefix_lengths <= tree_starts"
            )
        if begin + inputs.num_slots > inputs.kv_len:
            raise KernelError(
                f"row {row} needs slots up to {begin + inputs.num_slots}, the cache has "
                f"{inputs.kv_len}; append the tree before attending, or make the cache longer"
            )
    _require_ancestors(inputs)


def _require_floats(inputs: TreeAttentionInputs) -> None:
    query, key, value = inputs.query, inputs.key, inputs.value
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise KernelError(
                f"{name} has shape {tuple(tensor.shape)}, expected 4 axes: rows, heads, slots, "
                "head_dim"
            )
        if tensor.dtype not in _FLOATS or tensor.dtype != query.dtype:
            raise KernelError(
                f"{name} is {tensor.dtype}, query {query.dtype}; expected one floating type of "
                "two, four or eight bytes"
            )
        if tensor.shape[1] == 0 or tensor.shape[3] == 0:
            raise KernelError(
                f"{name} has shape {tuple(tensor.shape)}, expected heads, and a width of each"
            )
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            raise KernelError(
                f"{name} has strides {tensor.stride()}, expected 1 in the last axis; call "
                ".contiguous() or transpose other axes"
            )
    if key.shape != value.shape or key.shape[3] != query.shape[3]:
        raise KernelError(
            f"key has shape {tuple(key.shape)}, value {tuple(value.shape)}, query "
            f"{tuple(query.shape)}; expected keys and values alike and one head_dim"
        )
    if query.shape[1] % key.shape[1]:
        raise KernelError(
            f"query has {query.shape[1]} heads, key {key.shape[1]}; expected a multiple of them"
        )
    if key.shape[0] != query.shape[0]:
        raise KernelError(
            f"key has {key.shape[0]} rows, query {query.shape[0]}; pass the rows that attend"
        )


def _require_integers(inputs: TreeAttentionInputs) -> None:
    batch, words, depths = inputs.batch, inputs.ancestor_words, inputs.depths
    for name in ("prefix_lengths", "prefix_starts", "tree_starts"):
        tensor = getattr(inputs, name)
        if tensor is not None and (tensor.shape != (batch,) or tensor.dtype not in INTEGERS):
            raise KernelError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected one whole "
                f"number for each of the {batch} rows, int32 or int64"
            )
    if depths.ndim != 2 or depths.shape[0] not in (1, batch) or depths.dtype not in INTEGERS:
        raise KernelError(
            f"depths is {depths.dtype} of shape {tuple(depths.shape)}, expected a depth for every "
            f"tree slot of 1 or {batch} rows, int32 or int64"
        )
    if not 1 <= inputs.num_nodes <= inputs.num_slots <= MAX_SLOTS:
        raise KernelError(
            f"{inputs.num_nodes} nodes attend to {inputs.num_slots} tree slots, expected 1 to "
            f"{MAX_SLOTS} slots that end in these nodes; draft fewer tokens"
        )
    expected = (inputs.num_nodes, num_words(inputs.num_slots))
    if (
        words.ndim != 3
        or words.shape[0] not in (1, batch)
        or tuple(words.shape[1:]) != expected
        or words.dtype != torch.int64
        or not words.is_contiguous()
    ):
        raise KernelError(
            f"ancestor_words is {words.dtype} of shape {tuple(words.shape)}, expected contiguous "
            f"int64 of 1 or {batch} rows by {expected[0]} nodes by {expected[1]} words"
        )


def _require_numbers(inputs: TreeAttentionInputs) -> None:
    _require_number("scale", inputs.scale)
    if inputs.softcap is not None:
        _require_number("softcap", inputs.softcap)
    for name, most in (("window", 2**31 - 1), ("num_splits", MAX_SPLITS)):
        value = getattr(inputs, name)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise KernelError(
                f"{name} is {value!r}, expected a whole number from 1 to {most}, or None"
            )
    for name in ("deterministic", "return_lse"):
        if type(getattr(inputs, name)) is not bool:
            raise KernelError(f"{name} is {getattr(inputs, name)!r}, expected True or False")


def _require_number(name: str, value: object) -> None:
    is_number = isinstance(value, float | int) and not isinstance(value, bool)
    if not is_number or not 0 < cast("float", value) < float("inf"):
        raise KernelError(f"{name} is {value!r}, expected a finite number above 0, or None")


def _require_ancestors(inputs: TreeAttentionInputs) -> None:
    num_bits = inputs.ancestor_words.shape[2] * 64
    bits = unpack_words(inputs.ancestor_words, num_bits=num_bits)  # [rows, nodes, bits]
    own = torch.arange(inputs.num_nodes, device=bits.device) + inputs.num_slots - inputs.num_nodes
    later = torch.arange(num_bits, device=bits.device) > own[:, None]  # [nodes, bits]
    wrong = (bits & later).nonzero()
    if len(wrong):
        row, node, slot = wrong[0].tolist()
        raise KernelError(
            f"node {node} of row {row} names the later slot {slot} in ancestor_words, expected "
            "ancestors before it; order nodes so that parents come first"
        )
    blind = (~bits[:, torch.arange(inputs.num_nodes, device=bits.device), own]).nonzero()
    if len(blind):
        row, node = blind[0].tolist()
        raise KernelError(f"node {node} of row {row} does not see itself; set its own bit")
    if bool(((inputs.depths < 0) | (inputs.depths > _MAX_DEPTH)).any()):
        raise KernelError(
            f"depths holds a negative number or one above {_MAX_DEPTH}, expected 0 at the "
            "root and more below it"
        )


def _tensors(inputs: TreeAttentionInputs) -> dict[str, Tensor]:
    found = {name: getattr(inputs, name) for name in _TENSORS}
    return {
        name: tensor
        for name, tensor in found.items()
        if not (tensor is None and name in _OPTIONAL_TENSORS)
    }
