"""The rows of a batch while they grow: which run, how far each may go, and the final tensor."""

from collections.abc import Collection

import torch
from jaxtyping import Int
from torch import Tensor

from speclm.acceptance import Accepted
from speclm.config import MAX_LEAD
from speclm.generation.stop_strings import StopStrings


class Rows:
    """New tokens of every row, on the host.

    A row ends with its end-of-sequence token, with a stop string, or when it has `max_new_tokens`.
    A row waits while it is `MAX_LEAD` tokens ahead of the slowest one that still runs.
    """

    def __init__(
        self,
        *,
        batch: int,
        max_new_tokens: int,
        eos_token_ids: Collection[int],
        stop_strings: StopStrings | None = None,
    ) -> None:
        """Start with empty rows."""
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.is_live = [max_new_tokens > 0] * batch
        self._max_new_tokens = max_new_tokens
        self._stop_strings = stop_strings
        self._stop_lengths: dict[int, int] = {}  # tokens of rows that end by a stop string now
        self.eos_token_ids = frozenset(eos_token_ids)

    @property
    def any_live(self) -> bool:
        """Whether a row still runs."""
        return any(self.is_live)

    @property
    def num_tokens(self) -> list[int]:
        """New tokens of each row so far: the step that it decides next."""
        return [len(tokens) for tokens in self.tokens]

    @property
    def last_tokens(self) -> list[int]:
        """Last token of each row: its root, which no round has fed to the target yet."""
        return [tokens[-1] for tokens in self.tokens]

    @property
    def num_steps(self) -> int:
        """Steps that regular generation takes to get as far as the longest row."""
        return max(self.num_tokens)

    @property
    def most_remaining(self) -> int:
        """Most tokens that any running row may still be given."""
        rows = zip(self.tokens, self.is_live, strict=True)
        fewest = min((len(tokens) for tokens, is_live in rows if is_live), default=None)
        return 0 if fewest is None else self._max_new_tokens - fewest

    def last(self) -> list[int]:
        """Return the running rows that have fewest tokens."""
        running = [row for row, is_live in enumerate(self.is_live) if is_live]
        fewest = min((len(self.tokens[row]) for row in running), default=0)
        return [row for row in running if len(self.tokens[row]) == fewest]

    def admit(self, accepted: Accepted) -> Accepted:
        """Take over a round's tokens and end the rows that are complete.

        Returns:
            What was taken: rows are cut after their end, and empty when they had ended before.
        """
        cut = self.cut(accepted)
        for row, emitted in enumerate(cut.emitted):
            self.extend(row, emitted)
        return cut

    def cut(self, accepted: Accepted) -> Accepted:
        """Return what rows may take of a round's tokens: none after the end of a row."""
        slowest = min(
            len(tokens)
            for tokens, is_live in zip(self.tokens, self.is_live, strict=True)
            if is_live
        )
        limits = [
            self._limit(row, emitted, slowest) for row, emitted in enumerate(accepted.emitted)
        ]
        if self._stop_strings is not None:
            emitted = [row[:limit] for row, limit in zip(accepted.emitted, limits, strict=True)]
            stops = self._stop_strings.first_stops(self.tokens, emitted)
            # Of this round only: what stops a row may be dropped before the row takes it.
            self._stop_lengths = {row: len(self.tokens[row]) + new for row, new in stops.items()}
            limits = [stops.get(row, limit) for row, limit in enumerate(limits)]
        return accepted.cut(limits)

    def extend(self, row: int, emitted: list[int]) -> None:
        """Append tokens to a row and end it when it is complete."""
        tokens = self.tokens[row]
        tokens += emitted
        is_full = len(tokens) in {self._max_new_tokens, self._stop_lengths.get(row)}
        if emitted and (emitted[-1] in self.eos_token_ids or is_full):
            self.is_live[row] = False

    def append(self, tokens: list[int]) -> None:
        """Append one token to every row that still runs, and end none."""
        for row, token in enumerate(tokens):
            if self.is_live[row]:
                self.tokens[row].append(token)

    def end(self, ended: list[bool]) -> None:
        """End the rows at which the list is True."""
        self.is_live = [live and not now for live, now in zip(self.is_live, ended, strict=True)]

    def sequences(
        self, prompt: Int[Tensor, "batch seq"], pad_token_id: int
    ) -> Int[Tensor, "batch length"]:
        """Return prompt and new tokens, ended rows padded on the right."""
        width = self.num_steps
        padded = [tokens + [pad_token_id] * (width - len(tokens)) for tokens in self.tokens]
        new = torch.tensor(padded, device=prompt.device, dtype=torch.long).view(-1, width)
        return torch.cat([prompt, new], dim=1)

    def _limit(self, row: int, emitted: list[int], slowest: int) -> int:
        if not self.is_live[row]:
            return 0
        length = len(self.tokens[row])
        limit = min(self._max_new_tokens - length, slowest + MAX_LEAD - length)
        for index, token in enumerate(emitted[:limit]):
            if token in self.eos_token_ids:
                return index + 1
        return limit
