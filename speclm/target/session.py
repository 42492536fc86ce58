"""What a generation asks of its target: read the prompt, score drafts, keep a path."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from speclm.tree.topology import TreeTopology


class Session(ABC):
    """The target's side of one generation.

    It holds the committed tokens of every row but the last, which is the root of the next draft,
    and the nodes of a draft that waits for a verdict.

    Attributes:
        needs_lockstep: Whether drafts have to be chains of which all rows keep equally many
            nodes.
    """

    needs_lockstep: ClassVar[bool]

    @property
    @abstractmethod
    def num_cached(self) -> int:
        """Slots of every row that a cache held before the prompt was read."""

    @property
    @abstractmethod
    def merges_prompt(self) -> bool:
        """Whether one `verify` may read the prompt along with a draft."""

    @property
    def is_behind(self) -> bool:
        """Whether a round without a draft is due, for the target to catch up."""
        return False

    @abstractmethod
    def prefill(
        self, tokens: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch 1 vocab"]:
        """Read what the cache lacks of the prompt, as regular generation does.

        The last token becomes a pending draft of one node.

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
            prompt: Tokens before the roots that have not been read, for one forward to do for
                both. Given where `merges_prompt` alone.
            max_length: Tokens at which every row ends; what lies beyond is of no use.

        Returns:
            Logits after every node.
        """

    @abstractmethod
    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit the pending nodes on each row's path, and forget the others.

        Args:
            paths: Nodes to keep in each row, ascending; empty in a row that stays as it is.
        """

    @abstractmethod
    def hand_over(self, into: DynamicCache, sequences: Int[Tensor, "batch length"]) -> None:
        """Extend a cache to what regular generation leaves in it: all tokens but the last.

        Args:
            into: Cache that holds what the session found in it, or nothing.
            sequences: Prompts and new tokens, ended rows padded on the right, with a column for
                every slot that the cache held at first.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Leave what belongs to the caller usable after an error."""
