"""What the nodes of a forward over storage of fixed size may see."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.attention.step import KernelMask, TreeMask
from speclm.kernels import pays
from speclm.tree.words import pack_words


class FixedStep:
    """Stands for a `TreeStep` whose lengths are known on the device only."""

    is_regular = False
    """A step of regular generation would need no mask."""

    def __init__(
        self,
        depths: Int[Tensor, "batch nodes"],
        ancestors: Bool[Tensor, "batch nodes nodes"],
        lengths: Int[Tensor, " batch"],
        num_padding: Int[Tensor, " batch"],
        *,
        capacity: int,
        bias: Callable[[int | None, torch.dtype], Tensor],
    ) -> None:
        """Store what the nodes see.

        Args:
            depths: Depth of each node.
            ancestors: True at ``[i, j]`` if node j is node i or one of its ancestors.
            lengths: Length of each row in the cache; nodes come after the longest one.
            num_padding: Padding at the start of each row.
            capacity: Length of the storage.
            bias: Returns the additive mask of layers with some window, for what the kernel does not
                compute.
        """
        self.windows: set[int | None] = set()
        self._bias = bias
        self._shape = (len(depths), 1, depths.shape[1], capacity)
        self._kernel_mask = KernelMask(
            prefix_lengths=lengths,
            ancestor_words=pack_words(ancestors),
            depths=depths,
            prefix_starts=torch.minimum(num_padding, lengths),
            tree_starts=lengths.amax().expand(len(lengths)).contiguous(),
        )

    def lazy_bias(
        self, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "batch 1 nodes capacity"]:
        """Return the additive mask, which is computed if kernels need it."""
        device = self._kernel_mask.depths.device
        if not pays(device):
            return self._bias(window, dtype)
        return TreeMask.of(
            lambda: self._bias(window, dtype),
            window,
            shape=self._shape,
            dtype=dtype,
            device=device,
        )

    def kernel_mask(self, device: torch.device) -> KernelMask:
        """Return the mask for kernels on a device."""
        return self._kernel_mask.to(device)

    def repeated(
        self, bias: Float[Tensor, "batch 1 nodes capacity"], groups: int
    ) -> Float[Tensor, "batch 1 grouped_nodes capacity"]:
        """Return a mask repeated along its nodes."""
        return bias.repeat(1, 1, groups, 1)
