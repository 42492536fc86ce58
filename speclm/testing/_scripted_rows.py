"""Rows of a generation whose target is a script instead of a model."""

import random
from dataclasses import dataclass, field

from speclm.drafting.interface import Draft

_FOLLOW_PROBABILITY = 0.7  # how often the target says what some child says
_FEW_TOKENS = 6  # texts of few different tokens repeat themselves


@dataclass(slots=True)
class ScriptedRow:
    """A prompt, what the target says after it, and how much of that is emitted when.

    What the target says is made up at the first generation, often in agreement with the draft so
    that runs of every length are accepted. It then stays: a second generation with the same row
    goes the same way as long as the drafts are the same.

    Args:
        prompt: Tokens of the prompt.
        vocab_size: Number of different tokens.
        seed: Seed of what the target says.
        said: Tokens after the prompt that are certain already; the first is the first root.
        waits: Whether every fourth round gives this row nothing.
        ends_after: Rounds after which this row is given nothing any more.
        max_new_tokens: Tokens after which this row is given nothing any more.
        one_by_one: Whether a round gives this row no more than a token.
    """

    prompt: list[int]
    vocab_size: int
    seed: str
    said: list[int] = field(default_factory=list)
    waits: bool = False
    ends_after: int = 10**6
    max_new_tokens: int = 10**6
    one_by_one: bool = False
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self.token_at(0, [])

    def token_at(self, position: int, children: list[int]) -> int:
        """Return the token at a position after the prompt; make it up if need be."""
        while len(self.said) <= position:
            if children and self._random.random() < _FOLLOW_PROBABILITY:
                self.said.append(self._random.choice(children))
            else:
                self.said.append(self._random.randrange(min(self.vocab_size, _FEW_TOKENS)))
        return self.said[position]

    def limit(self, position: int, round_index: int) -> int:
        """Return how many tokens the row may be given in a round that starts at `position`."""
        if round_index >= self.ends_after or (self.waits and round_index % 4 == 2):
            return 0
        left = max(0, self.max_new_tokens - position)
        # Some runs are cut, as they are for a row that ran ahead of the others.
        return min(left, 1) if self.one_by_one or round_index % 4 == 1 else left

    def choices(self, draft: Draft, row: int, position: int) -> list[int]:
        """Return the target's token at each node it visits, and -1 at the others."""
        shape = row if draft.topology.parents.shape[0] > 1 else 0
        parents = draft.topology.parents[shape].tolist()
        tokens = draft.tokens[row].tolist()
        choices = [-1] * len(parents)
        node: int | None = 0
        while node is not None:
            children = [child for child, up in enumerate(parents) if up == node and child > node]
            choice = self.token_at(position, [tokens[child] for child in children])
            choices[node] = choice
            node = next((child for child in children if tokens[child] == choice), None)
            position += 1
        return choices


def guessed_paths(draft: Draft, row: int) -> dict[tuple[int, ...], float]:
    """Return the tokens from below the root to each node of a row, with the node's probability."""
    shape = row if draft.topology.parents.shape[0] > 1 else 0
    tokens = draft.tokens[row].tolist()
    probs = [0.0] * len(tokens) if draft.node_probs is None else draft.node_probs[row]
    guessed = {}
    for node, path in enumerate(draft.topology.path_indices[shape].tolist()):
        below_root = [above for above in path[1:] if above >= 0]
        if below_root:
            guessed[tuple(tokens[above] for above in below_root)] = probs[node]
    return guessed
