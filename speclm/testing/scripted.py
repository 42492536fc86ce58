"""A proposer that knows the answer, for tests of whatever surrounds it."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import ProposerConfig
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import OptionError
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import from_parents


class ScriptedProposer(Proposer):
    """Drafts the true continuation of each row, with errors where they are asked for.

    With the reference that the target really produces, a row of ``n`` new tokens takes at most
    ``ceil(n / (depth + 1)) + len(wrong_at)`` target forwards: random heads, which nothing
    would ever accept, can be stood in for in a test of the whole loop.

    A tree is the path of true tokens, each behind `num_siblings` wrong ones, so that the accepted
    child is not always the first. At a position in `wrong_at` the true token is missing: at an
    even one a wrong token takes its place, and the path goes on below it; at an odd one the path
    ends. Rows that reach the end of their reference early are padded.

    Args:
        reference: New tokens of each row, without the prompt.
        wrong_at: Positions in the reference at which no draft is right.
        depth: Most draft tokens on one path.
        num_siblings: Wrong tokens before each true one.

    Raises:
        OptionError: If the reference has no rows, or `num_siblings` is negative.
        TreeBudgetError: If `depth` is out of range.
    """

    def __init__(
        self,
        reference: Sequence[Sequence[int]],
        wrong_at: Collection[int] = (),
        *,
        depth: int = 4,
        num_siblings: int = 1,
    ) -> None:
        if not reference or num_siblings < 0:
            raise OptionError(
                f"expected a reference for every row and num_siblings of at least 0, found "
                f"{len(reference)} rows and num_siblings={num_siblings!r}; pass a list per row"
            )
        self.config = ProposerConfig(depth=depth)
        self._reference = [list(row) for row in reference]
        self._wrong_at = frozenset(wrong_at)
        self._num_siblings = num_siblings
        self._positions: list[int] = []

    @override
    def begin(self, prompt: Prefill) -> None:
        batch = len(prompt.first_tokens)
        if batch > len(self._reference):
            raise OptionError(
                f"batch has {batch} rows, the reference {len(self._reference)}; pass one for each"
            )
        self._positions = [0] * batch

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        rows = [self._tree(row, position) for row, position in enumerate(self._positions)]
        num_guesses = max(len(tokens) for tokens, _ in rows)
        # Padding repeats token 0, which every vocabulary has.
        guesses = torch.tensor(
            [tokens + [0] * (num_guesses - len(tokens)) for tokens, _ in rows],
            dtype=torch.long,
            device=roots.device,
        )
        return Draft(
            tokens=torch.cat([roots[:, None], guesses], dim=1),
            topology=from_parents([parents for _, parents in rows], device=roots.device),
        )

    @override
    def commit(self, accepted: Accepted) -> None:
        for row, emitted in enumerate(accepted.emitted):
            self._positions[row] += len(emitted)

    def _tree(self, row: int, position: int) -> tuple[list[int], list[int]]:
        """Return the tokens below the root, and the parents of all nodes."""
        tokens: list[int] = []
        parents, last = [0], 0
        upcoming = self._reference[row][position : position + self.config.depth]
        for index, true_token in enumerate(upcoming, start=position):
            wrong_token = true_token - 1 if true_token > 0 else 1
            is_wrong = index in self._wrong_at
            children = [wrong_token] * self._num_siblings
            if not is_wrong:
                children.append(true_token)
            elif index % 2 == 0:
                children.append(wrong_token)
            tokens += children
            parents += [last] * len(children)
            if is_wrong and index % 2:
                break
            last = len(parents) - 1
        return tokens, parents
