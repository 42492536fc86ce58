"""Draws of a generation's own: those that are not regular generation's noise."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override


class Draws(ABC):
    """Makes the random decisions of acceptance rules and of proposers that sample.

    Everything random passes through these three methods, so that all decisions can be enumerated
    in place of being drawn.
    """

    @abstractmethod
    def bernoulli(self, probability: float) -> bool:
        """Return True with a probability of `probability`: surely from 1 on, never for NaN."""

    @abstractmethod
    def categorical(self, probs: Float[Tensor, " vocab"]) -> int:
        """Return an index drawn in proportion to `probs`; -1 where they are not numbers."""

    @abstractmethod
    def without_replacement(
        self, probs: Float[Tensor, "rows vocab"], *, num: int
    ) -> Int[Tensor, "rows num"]:
        """Draw `num` different indices from each row, in the order in which they are drawn.

        Where fewer have a positive probability, any others follow them.
        """


class GeneratorDraws(Draws):
    """Draws from a generator; `bernoulli` and `categorical` sync with its device."""

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
        scores = self._race(probs)
        winner = int(scores.argmax())  # argmax prefers a NaN to any number
        return -1 if bool(scores[winner].isnan()) else winner

    @override
    def without_replacement(
        self, probs: Float[Tensor, "rows vocab"], *, num: int
    ) -> Int[Tensor, "rows num"]:
        return self._race(probs).topk(num, dim=-1).indices

    def _race(self, probs: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """Divide by exponential noise: in descending order, the result is a sample.

        Source: Efraimidis and Spirakis 2006 (weighted sampling without replacement).
        """
        return probs / torch.empty_like(probs).exponential_(generator=self._generator)


def seeded_draws(device: torch.device) -> Draws:
    """Return draws whose seed is one draw from the default generator of `device`; syncs."""
    seed = int(torch.randint(2**63 - 1, (), device=device))
    return GeneratorDraws(torch.Generator(device=device).manual_seed(seed))
