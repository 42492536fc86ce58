"""How draft tokens are drawn for acceptance rules that compare distributions."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from jaxtyping import Float, Int
from torch import Tensor

from speclm.sampling.chooser import TokenChooser
from speclm.sampling.draws import Draws


class DraftSampling(Enum):
    """How the tokens of a draft come about."""

    NONE = "none"
    """In any way: by rank, by rule, with the positions' noise."""
    WITHOUT_REPLACEMENT = "without replacement"
    """Drawn from a distribution that comes with the draft, siblings without replacement, in the
    order of their nodes. The shape below a node may depend on the tokens above it alone."""


@dataclass(frozen=True, slots=True, eq=False)
class DraftSampler:
    """What a proposer draws its drafts with.

    Args:
        chooser: Applies the target's temperature and processors.
        draws: The generation's own draws.
    """

    chooser: TokenChooser
    draws: Draws

    def distribution(
        self, logits: Float[Tensor, "batch nodes vocab"]
    ) -> Float[Tensor, "batch nodes vocab"]:
        """Return the probabilities that a proposer's logits stand for, processed as the target's.

        They are proper distributions for any processors, and the closer to the target's the better.
        """
        return self.chooser.distribution(logits.flatten(0, 1)).view(logits.shape)

    def siblings(
        self, distributions: Float[Tensor, "batch nodes vocab"], *, num: int
    ) -> Int[Tensor, "batch nodes num"]:
        """Draw `num` children below every node, without replacement.

        Where a distribution has fewer tokens, the others have no probability, and rules leave them
        out.
        """
        drawn = self.draws.without_replacement(distributions.flatten(0, 1), num=num)
        return drawn.view(*distributions.shape[:2], num)


@dataclass(frozen=True, slots=True)
class Families:
    """Parents and children of a static tree.

    Args:
        parents: Nodes with children, in order.
        children: Children of each, in order.
    """

    parents: list[int]
    children: list[list[int]]

    @classmethod
    def of(cls, parents: Sequence[int]) -> "Families":
        """Sort the nodes of a tree by parent; nodes that are their own parent have none."""
        families: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            if parent != node:
                families.setdefault(parent, []).append(node)
        return cls(sorted(families), [families[parent] for parent in sorted(families)])

    @property
    def max_children(self) -> int:
        """Children of the largest family."""
        return max(map(len, self.children), default=0)
