"""A proposer and a target that follow a script, for tests of the code around them."""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.acceptance.exact import accept_exact
from speclm.config import ProposerConfig
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import OptionError
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import from_parents

_FOLLOW_PROBABILITY = 0.7  # how often the target agrees with a child
_FEW_TOKENS = 6  # texts of few different tokens repeat themselves


class ScriptedProposer(Proposer):
    """Drafts the true continuation of each row, with errors on request.

    If the reference is what the target produces, a row of ``n`` new tokens takes at most
    ``ceil(n / (depth + 1)) + len(wrong_at)`` target forwards. It replaces trained heads in tests
    of the whole loop, because drafts of random heads are never accepted.

    A tree is the path of true tokens, each after `num_siblings` wrong ones, so that the accepted
    child is not always the first. At a position in `wrong_at` the true token is missing: at an
    even one a wrong token replaces it and the path continues below; at an odd one the path ends.
    Rows that reach the end of their reference early are padded.

    Args:
        reference: New tokens of each row, without the prompt.
        wrong_at: Positions in the reference at which no draft is right.
        depth: Maximum draft tokens on one path.
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
        width = max(len(tokens) for tokens, _ in rows)
        # Every vocabulary has token 0, which pads.
        drafted = torch.tensor(
            [tokens + [0] * (width - len(tokens)) for tokens, _ in rows],
            dtype=torch.long,
            device=roots.device,
        )
        return Draft(
            tokens=torch.cat([roots[:, None], drafted], dim=1),
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


@dataclass(slots=True)
class ScriptedRow:
    """A prompt, the tokens of the target after it, and how many of them each round emits.

    The target's tokens are invented in the first generation, often to agree with the draft, so that
    every accepted length occurs. They are then fixed: a second generation with the same row is the
    same as long as the drafts are.

    Args:
        prompt: Tokens of the prompt.
        vocab_size: Number of different tokens.
        seed: Seed of the target's tokens.
        said: Tokens after the prompt that are already fixed; the first is the first root.
        waits: Whether the row receives nothing in every fourth round.
        ends_after: Rounds after which the row receives nothing more.
        max_new_tokens: Tokens after which the row receives nothing more.
        one_by_one: Whether the row receives at most one token per round.
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
        """Return the token at a position after the prompt; invented if it is new."""
        while len(self.said) <= position:
            if children and self._random.random() < _FOLLOW_PROBABILITY:
                self.said.append(self._random.choice(children))
            else:
                self.said.append(self._random.randrange(min(self.vocab_size, _FEW_TOKENS)))
        return self.said[position]

    def limit(self, position: int, round_index: int) -> int:
        """Return how many tokens the row may receive in a round that starts at `position`."""
        if round_index >= self.ends_after or (self.waits and round_index % 4 == 2):
            return 0
        left = max(0, self.max_new_tokens - position)
        # Some rounds are cut, as for a row that ran ahead of the others.
        return min(left, 1) if self.one_by_one or round_index % 4 == 1 else left

    def target_tokens(self, draft: Draft, row: int, position: int) -> list[int]:
        """Return the target's token at each accepted node, and -1 at the others."""
        shape = row if draft.topology.parents.shape[0] > 1 else 0
        parents = draft.topology.parents[shape].tolist()
        tokens = draft.tokens[row].tolist()
        found = [-1] * len(parents)
        node: int | None = 0
        while node is not None:
            children = [child for child, up in enumerate(parents) if up == node and child > node]
            wanted = self.token_at(position, [tokens[child] for child in children])
            found[node] = wanted
            node = next((child for child in children if tokens[child] == wanted), None)
            position += 1
        return found


def drafted_paths(draft: Draft, row: int) -> dict[tuple[int, ...], float]:
    """Return the tokens from below the root to each node of a row, with the node's probability."""
    shape = row if draft.topology.parents.shape[0] > 1 else 0
    tokens = draft.tokens[row].tolist()
    probs = [0.0] * len(tokens) if draft.node_probs is None else draft.node_probs[row]
    found = {}
    for node, path in enumerate(draft.topology.path_indices[shape].tolist()):
        below_root = [above for above in path[1:] if above >= 0]
        if below_root:
            found[tuple(tokens[above] for above in below_root)] = probs[node]
    return found


def scripted_prefill(
    rows: Sequence[ScriptedRow], *, device: torch.device, temperature: float
) -> Prefill:
    """Return the left-padded prompts of rows."""
    width = max(len(row.prompt) for row in rows)
    padding = [width - len(row.prompt) for row in rows]
    padded = [[0] * pad + row.prompt for pad, row in zip(padding, rows, strict=True)]
    roots = [row.said[0] for row in rows]
    return Prefill(
        tokens=torch.tensor(padded, device=device, dtype=torch.long),
        num_padding=torch.tensor(padding, device=device, dtype=torch.long),
        first_tokens=torch.tensor(roots, device=device, dtype=torch.long),
        temperature=temperature,
        max_new_tokens=max(row.max_new_tokens for row in rows),
    )


def accept_scripted(
    draft: Draft, rows: Sequence[ScriptedRow], positions: Sequence[int]
) -> Accepted:
    """Accept what agrees with the script, in rows that are at the given positions of it."""
    tokens = [row.target_tokens(draft, b, positions[b]) for b, row in enumerate(rows)]
    target_tokens = torch.tensor(tokens, device=draft.tokens.device, dtype=torch.long)
    return accept_exact(draft.tokens, target_tokens, draft.topology)


def limit_to_slowest(
    accepted: Accepted, limits: Sequence[int], is_live: Sequence[bool]
) -> list[int]:
    """Give all live rows as many tokens as the row with the fewest."""
    given = [
        len(path) if limit == 0 else min(len(path), limit)
        for path, limit in zip(accepted.paths, limits, strict=True)
    ]
    fewest = min(count for count, live in zip(given, is_live, strict=True) if live)
    return [fewest if live else 0 for live in is_live]


def random_features(
    vocab_size: int, hidden_size: int, *, seed: int, device: torch.device
) -> Float[Tensor, "vocab hidden"]:
    """Return a random hidden state for every token of a vocabulary, the same on every device."""
    shape, generator = (vocab_size, hidden_size), torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)


def repetitive_rows(
    *, vocab_size: int, seed: int, num_rounds: int, max_length: int
) -> list[ScriptedRow]:
    """Return rows of unequal length that repeat themselves; one waits and one ends early."""
    generator = random.Random(seed)
    rows = []
    for row, length in enumerate((9, 5, 12)):
        prompt = [generator.randrange(min(vocab_size, _FEW_TOKENS)) for _ in range(length)]
        rows.append(
            ScriptedRow(
                prompt,
                vocab_size,
                f"{seed} {row}",
                waits=row == 1,
                ends_after=4 if row == 2 else num_rounds,
                max_new_tokens=max_length - 12,
            )
        )
    return rows


def texts_with_one_end(*, vocab_size: int, seed: int, side: int) -> list[list[int]]:
    """Return texts that end in the same root on both sides, after different followers before."""
    generator = random.Random(f"{seed} variant")
    texts = []
    for _ in range(4):
        root = generator.randrange(vocab_size)
        followers = [
            (generator.randrange(vocab_size) + side * (1 + index)) % vocab_size
            for index in range(6)
        ]
        texts.append([root, *followers[:3], root, *followers[:3], *followers[3:], root])
    return texts
