"""The target's side of one generation: read the prompt, score drafts, keep a path."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.cache import TreeCache, export_cache
from speclm.devices import is_host
from speclm.target.static_forward import StaticForward
from speclm.target.view import TargetView
from speclm.tree.topology import TreeTopology


class Session(ABC):
    """The target's side of one generation.

    It holds all committed tokens of each row except the last one, which is the root of the next
    draft, and the pending nodes of a draft.

    Attributes:
        needs_lockstep: Whether drafts must be chains of which all rows keep equally many nodes.
    """

    needs_lockstep: ClassVar[bool]
    static: StaticForward | None = None
    """Verifies trees by an engine; None if all drafts are verified eagerly."""
    cache: TreeCache | None = None
    """Keys and values of the committed tokens; None if the target keeps them in its own cache."""

    @property
    @abstractmethod
    def num_cached(self) -> int:
        """Slots of each row that were cached before the prompt was read."""

    @property
    @abstractmethod
    def merges_prompt(self) -> bool:
        """Whether `verify` may read the prompt along with a draft."""

    @property
    def is_behind(self) -> bool:
        """Whether the next round should have no draft, so that the target catches up."""
        return False

    @abstractmethod
    def prefill(
        self, tokens: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch 1 vocab"]:
        """Read the part of the prompt that is not cached, as regular generation does.

        Its last token becomes a pending draft of one node.

        Returns:
            Logits after the last prompt token.
        """

    @abstractmethod
    def verify(
        self,
        tokens: Int[Tensor, "batch nodes"],
        topology: TreeTopology,
        *,
        prompt: Int[Tensor, "batch seq"] | None = None,
        max_length: int | None = None,
    ) -> Float[Tensor, "batch nodes vocab"]:
        """Score a draft, whose nodes become pending.

        Args:
            tokens: Token at each node.
            topology: Shape of the drafts.
            prompt: Unread tokens before the roots, which the same forward reads. Only if
                `merges_prompt`.
            max_length: Maximum tokens of a row; logits of nodes beyond it are not used.

        Returns:
            Logits after every node.
        """

    def accept_greedily(self, topology: TreeTopology) -> Accepted | None:  # noqa: ARG002
        """Decide on the draft that was verified last by an engine, if the target only takes maxima.

        `keep` is still called with the result.

        Returns:
            None if there is no engine for that.
        """
        return None

    @abstractmethod
    def keep(
        self,
        paths: Sequence[Sequence[int]],
        *,
        device_paths: Int[Tensor, "batch path"] | None = None,
    ) -> None:
        """Commit the pending nodes on each row's path, and drop the others.

        Args:
            paths: Nodes to keep in each row, ascending; empty for a row that does not change.
            device_paths: The same on the device, padded with -1, if they are there already.
        """

    @abstractmethod
    def hand_over(self, into: DynamicCache, sequences: Int[Tensor, "batch length"]) -> None:
        """Extend a cache as regular generation does: to all tokens except the last one.

        Args:
            into: The caller's cache, as the session found it, or an empty one.
            sequences: Prompts and new tokens, ended rows padded on the right, with a column for
                each slot that was cached at first.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Restore the caller's objects after an error."""


class TreeSession(Session):
    """Verify trees with tree attention, over a `TreeCache`."""

    needs_lockstep = False
    cache: TreeCache

    def __init__(
        self,
        target: TargetView,
        cache: TreeCache,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        images: Mapping[str, Any] | None = None,
        static: StaticForward | None = None,
    ) -> None:
        """Start a generation.

        Args:
            target: The model.
            cache: Empty, or filled with the same number of slots in every row.
            attention_mask: Attention mask of the prompt; None without padding.
            position_ids: Position ids of the prompt; None to count tokens.
            images: Other inputs of the prompt.
            static: Verifies drafts by an engine; None to verify eagerly.
        """
        self._target, self.cache, self.static = target, cache, static
        self._attention_mask, self._position_ids = attention_mask, position_ids
        self._images = images
        self._num_cached = cache.tree_start
        self._is_by_engine = False  # the last forward
        self._have_moved = False  # the nodes that `keep` is called for

    @property
    @override
    def num_cached(self) -> int:
        return self._num_cached

    @property
    @override
    def merges_prompt(self) -> bool:
        return not self._images and self.cache.position_shift is None

    @override
    def prefill(
        self, tokens: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch 1 vocab"]:
        logits = self._target.prefill(
            tokens,
            self.cache,
            attention_mask=self._attention_mask,
            position_ids=self._position_ids,
            images=self._images,
        )
        self.cache.split(self.cache.tree_start - 1, num_pending=1)
        return logits[:, None]

    @override
    def verify(
        self,
        tokens: Int[Tensor, "batch nodes"],
        topology: TreeTopology,
        *,
        prompt: Int[Tensor, "batch seq"] | None = None,
        max_length: int | None = None,
    ) -> Float[Tensor, "batch nodes vocab"]:
        logits = None
        if self.static is not None and prompt is None:
            logits = self.static.verify(tokens, topology, self.cache, max_length=max_length)
        self._is_by_engine = logits is not None
        if logits is not None:
            return logits
        return self._target.forward_tree(
            tokens, topology, self.cache, prompt=prompt, max_length=max_length
        )

    @override
    def accept_greedily(self, topology: TreeTopology) -> Accepted | None:
        # On a CPU, acceptance on the host costs less.
        is_open = self._is_by_engine and not is_host(self.cache.num_padding.device)
        if self.static is None or not is_open:
            return None
        accepted = self.static.accept_greedily(topology, self.cache)
        self._have_moved = accepted is not None
        return accepted

    @override
    def keep(
        self,
        paths: Sequence[Sequence[int]],
        *,
        device_paths: Int[Tensor, "batch path"] | None = None,
    ) -> None:
        self.cache.keep(paths, device_paths=device_paths, have_moved=self._have_moved)
        self._have_moved = False

    @override
    def hand_over(self, into: DynamicCache, sequences: Int[Tensor, "batch length"]) -> None:
        fed = sequences[:, :-1]  # the last token is never fed
        fill_rows(self._target, self.cache, fed)
        export_cache(self.cache, into, length=fed.shape[1])

    @override
    def abandon(self) -> None:
        """Do nothing: the caller's cache was imported as a copy."""


def fill_rows(target: TargetView, cache: TreeCache, tokens: Int[Tensor, "batch seq"]) -> None:
    """Run the tokens that the cache lacks through the model, in one forward if there are any.

    Regular generation feeds padding to ended rows until the last row ends; this has the same
    effect on the cache. Pending nodes are dropped.
    """
    missing = [max(tokens.shape[1] - length, 0) for length in cache.host_lengths]
    num_nodes = max(missing)
    if num_nodes == 0:
        return
    cache.keep([[] for _ in missing])
    steps = torch.arange(num_nodes, device=tokens.device)
    # A row that lacks fewer tokens repeats its last slot, whose position the model has.
    slots = (cache.lengths[:, None] + steps).clamp_(max=tokens.shape[1] - 1)
    target.forward_nodes(
        tokens.gather(1, slots),
        (steps[:, None] >= steps)[None],
        slots - cache.lengths[:, None],
        cache,
        num_logits=1,
    )
    cache.keep([range(count) for count in missing])
