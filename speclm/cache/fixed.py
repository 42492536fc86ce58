"""A cache whose storage has a fixed size, for stages that are compiled or recorded."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class FixedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """Keys and values of a layer, of which all slots are returned."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, slots: Int[Tensor, " nodes"]) -> None:
        """Write to `slots` of given storage."""
        super().__init__()  # type: ignore[no-untyped-call]  # Transformers'
        self.keys, self.values, self._slots = keys, values, slots
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the storage is given."""

    def update(
        self,
        key_states: Float[Tensor, "batch kv_heads nodes head_dim"],
        value_states: Float[Tensor, "batch kv_heads nodes value_dim"],
        *args: Any,  # noqa: ARG002 - of other cache types
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Write the nodes' keys and values and return the storage."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self._slots, key_states)
        self.values.index_copy_(2, self._slots, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return 0: positions and masks are given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002
        """Return the length that a mask covers, and its offset."""
        assert self.keys is not None
        return self.keys.shape[2], 0

    def get_max_length(self) -> int:
        """Return the number of slots."""
        assert self.keys is not None
        return self.keys.shape[2]


def seen_slots(
    depths: Int[Tensor, "batch nodes"],
    ancestors: Bool[Tensor, "batch nodes nodes"],
    lengths: Int[Tensor, " batch"],
    num_padding: Int[Tensor, " batch"],
    *,
    capacity: int,
    window: int | None,
) -> Bool[Tensor, "batch 1 nodes capacity"]:
    """Return which slots each node sees."""
    nodes, start = depths.shape[1], lengths.amax()
    slots = torch.arange(capacity, device=depths.device)
    is_committed = (slots >= num_padding[:, None]) & (slots < lengths[:, None])
    node = (slots - start).clamp(min=0, max=nodes - 1)  # that is written to each slot
    is_node = (slots >= start) & (slots < start + nodes)
    seen = is_committed[:, None] | (is_node & ancestors[:, :, node])
    if window is not None:
        positions = torch.where(is_node, lengths[:, None] + depths[:, node], slots)
        distance = (lengths[:, None] + depths)[:, :, None] - positions[:, None]
        seen = seen & (distance < window)
    return seen[:, None]
