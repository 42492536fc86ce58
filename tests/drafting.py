"""Proposers that drive the decode loop in tests."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance.accepted import Accepted
from speclm.config import ProposerConfig
from speclm.proposers.interface import Draft, Prefill, Proposer
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import from_parents


class RandomTreeProposer(Proposer):
    """Proposes a random tree per row, in which some nodes continue a reference and others do not.

    Rows differ in size and shape, siblings repeat tokens, and some nodes are padding in the midst
    of the tree: everything that the interface allows.
    """

    def __init__(
        self,
        reference: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        num_nodes: int = 9,
        seed: int = 0,
    ) -> None:
        self.config = ProposerConfig(depth=num_nodes)
        self._reference = reference
        self._vocab_size = vocab_size
        self._num_nodes = num_nodes
        self._generator = torch.Generator().manual_seed(seed)
        self._num_tokens: list[int] = []

    @override
    def begin(self, prompt: Prefill) -> None:
        self._num_tokens = [0] * len(prompt.first_tokens)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        rows = [self._row(self._reference[row][done:]) for row, done in enumerate(self._num_tokens)]
        width = max(len(parents) for parents, _ in rows)
        tokens = [row + [1] * (width - len(row)) for _, row in rows]
        return Draft(
            tokens=torch.tensor(tokens),
            topology=from_parents([parents for parents, _ in rows], device=roots.device),
            probs=None,
        )

    @override
    def commit(self, accepted: Accepted) -> None:
        for row, emitted in enumerate(accepted.emitted):
            self._num_tokens[row] += len(emitted)

    def _draw(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self._generator))

    def _row(self, future: Sequence[int]) -> tuple[list[int], list[int]]:
        parents, tokens, depths = [0], [self._draw(self._vocab_size)], [0]
        for node in range(1, 1 + self._draw(self._num_nodes)):
            parent = max(self._draw(node), self._draw(node))  # rather deep than wide
            if self._draw(8) == 0 or (parent and parents[parent] == parent):
                parent = node  # padding
            depth = 0 if parent == node else depths[parent] + 1
            is_true = self._draw(4) > 0 and 0 < depth <= len(future)
            parents.append(parent)
            depths.append(depth)
            tokens.append(future[depth - 1] if is_true else self._draw(self._vocab_size))
        return parents, tokens
