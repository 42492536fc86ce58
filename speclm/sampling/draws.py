"""Random draws of a generation that are not the noise of regular generation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from speclm.sampling.chooser import TokenChooser


class Draws(ABC):
    """Makes the random decisions of acceptance rules and of proposers that sample.

    Every random decision is one of these three, so that a test can enumerate all outcomes instead
    of drawing them.
    """

    @abstractmethod
    def bernoulli(self, probability: float) -> bool:
        """Return True with a probability; always from 1 upwards, never for NaN."""

    @abstractmethod
    def categorical(self, probs: Float[Tensor, " vocab"]) -> int:
        """Return an index drawn in proportion to `probs`; -1 if they are NaN."""

    @abstractmethod
    def without_replacement(
        self, probs: Float[Tensor, "rows vocab"], *, num: int
    ) -> Int[Tensor, "rows num"]:
        """Draw `num` different indices from each row, in the order in which they are drawn.

        Indices of probability 0 come last, if fewer than `num` others exist.
        """


class GeneratorDraws(Draws):
    """Draws from a generator; `bernoulli` and `categorical` sync with its device.

    Example:
        ```python
        draws = GeneratorDraws(torch.Generator().manual_seed(0))
        probs = torch.tensor([0.5, 0.2, 0.3])
        token = draws.categorical(probs)
        siblings = draws.without_replacement(probs[None], num=2)  # [1, 2]
        ```
    """

    def __init__(self, generator: torch.Generator) -> None:
        """Draw from `generator`, which no one else should use."""
        self._generator = generator

    @override
    def bernoulli(self, probability: float) -> bool:
        uniform = torch.rand(
            (), generator=self._generator, device=self._generator.device, dtype=torch.float32
        )
        return bool(uniform < probability)

    @override
    def categorical(self, probs: Float[Tensor, " vocab"]) -> int:
        scores = self._over_noise(probs)
        winner = int(scores.argmax())  # argmax prefers a NaN to any number
        return -1 if bool(scores[winner].isnan()) else winner

    @override
    def without_replacement(
        self, probs: Float[Tensor, "rows vocab"], *, num: int
    ) -> Int[Tensor, "rows num"]:
        return self._over_noise(probs).topk(num, dim=-1).indices

    def _over_noise(self, probs: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Divide by exponential noise: in descending order, the result is a sample.

        Source: Efraimidis and Spirakis 2006 (weighted sampling without replacement).
        """
        return probs / torch.empty_like(probs).exponential_(generator=self._generator)


def seeded_draws(device: torch.device) -> Draws:
    """Return draws whose seed is one draw from the default generator of `device`; syncs."""
    seed = int(torch.randint(2**63 - 1, (), device=device))
    return GeneratorDraws(torch.Generator(device=device).manual_seed(seed))


class DraftSampling(Enum):
    """How draft tokens are chosen."""

    NONE = "none"
    """In any way: by rank, by rule, with the noise of the positions."""
    WITHOUT_REPLACEMENT = "without replacement"
    """Drawn from a distribution that comes with the draft: siblings without replacement, in the
    order of their nodes. The shape below a node depends only on the tokens above it."""


@dataclass(frozen=True, slots=True, eq=False)
class DraftSampler:
    """Draws draft tokens for acceptance rules that compare distributions.

    Args:
        chooser: Applies the target's temperature and processors.
        draws: Random draws of this generation.

    Example:
        ```python
        sampler = DraftSampler(TokenChooser([], is_greedy=False), seeded_draws(logits.device))
        distributions = sampler.distribution(logits)  # of each node, for Draft.distributions
        children = sampler.siblings(distributions, num=2)  # two below each node
        ```
    """

    chooser: TokenChooser
    draws: Draws

    def distribution(
        self, logits: Float[Tensor, "batch nodes vocab"]
    ) -> Float[Tensor, "batch nodes vocab"]:
        """Return the probabilities of a proposer's logits, processed as the target's logits are."""
        return self.chooser.distribution(logits.flatten(0, 1)).view(logits.shape)

    def siblings(
        self, distributions: Float[Tensor, "batch nodes vocab"], *, num: int
    ) -> Int[Tensor, "batch nodes num"]:
        """Draw `num` children below every node, without replacement.

        A distribution with fewer tokens gives children of probability 0, which rules skip.
        """
        drawn = self.draws.without_replacement(distributions.flatten(0, 1), num=num)
        return drawn.view(*distributions.shape[:2], num)


@dataclass(frozen=True, slots=True)
class Families:
    """Nodes of one tree with their children.

    Args:
        parents: Nodes that have children, in order.
        children: Children of each, in order.

    Example:
        >>> Families.of([0, 0, 0, 1])
        Families(parents=[0, 1], children=[[1, 2], [3]])
    """

    parents: list[int]
    children: list[list[int]]

    @classmethod
    def of(cls, parents: Sequence[int]) -> "Families":
        """Group the nodes of a tree by parent, without root and padding."""
        families: dict[int, list[int]] = {}
        for node, parent in enumerate(parents):
            if parent != node:
                families.setdefault(parent, []).append(node)
        return cls(sorted(families), [families[parent] for parent in sorted(families)])

    @property
    def max_children(self) -> int:
        """Children of the largest family."""
        return max(map(len, self.children), default=0)
