"""What an acceptance rule is: the abstract class and what it decides on."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from speclm.acceptance.accepted import Accepted
from speclm.sampling.chooser import TokenChooser
from speclm.sampling.drafts import DraftSampling
from speclm.sampling.draws import Draws
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import TreeTopology


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """A draft that the target has read.

    Args:
        tokens: Token at each node; column 0 is the root.
        topology: Shape of the trees.
        logits: The target's logits after every node.
        chooser: Turns logits into distributions and choices, with the processors of the generation.
        is_live: Rows that are still generated; what is decided for the others is dropped.
        noise: Noise of the positions; for rules with `uses_noise`, None when greedy.
        draws: The generation's own draws; for rules with `uses_draws`.
        distributions: Distribution that the children of each node were drawn from, before siblings
            were removed; for rules with `draft_sampling`, and None where no draft has a child. Rows
            of leaves may hold anything.
        lengths: Tokens of each row, prompt and padding included, up to and with its root; for
            choosers that read lengths.
    """

    tokens: Int[Tensor, "batch nodes"]
    topology: TreeTopology
    logits: Float[Tensor, "batch nodes vocab"]
    chooser: TokenChooser
    is_live: list[bool]
    noise: PositionNoise | None = None
    draws: Draws | None = None
    distributions: Float[Tensor, "batch nodes vocab"] | None = None
    lengths: list[int] | None = None


class AcceptanceRule(ABC):
    """Chooses the path of a draft that survives, and the token after it.

    Greedy decoding never asks a rule: whatever rule is named, it takes the exact one. A rule
    keeps no state between calls.

    Attributes:
        is_exact: Whether every token is the target's own choice after those before, so that
            positions may be decided one by one, whatever decides them.
        is_lossy: Whether outputs follow another distribution than the target's.
        uses_noise: Whether it decides by the noise of positions, as regular generation does.
            Proposers are then told the noise.
        uses_draws: Whether it needs draws of its own. They are seeded with one draw from the
            default generator of the logits' device.
        draft_sampling: How drafts have to come about.
    """

    is_exact: ClassVar[bool] = False
    is_lossy: ClassVar[bool] = False
    uses_noise: ClassVar[bool] = False
    uses_draws: ClassVar[bool] = False
    draft_sampling: ClassVar[DraftSampling] = DraftSampling.NONE

    @property
    @abstractmethod
    def name(self) -> str:
        """What counters and reports call it."""

    @abstractmethod
    def accept(self, verified: Verified) -> Accepted:
        """Decide on every row of a draft.

        Returns:
            At least one token for each live row, -1 where the target's distribution is not made of
            numbers. A padding node is never accepted.
        """
