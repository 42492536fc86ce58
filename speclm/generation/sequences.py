"""The rows of a batch while they grow, and the callbacks that follow a single row."""

from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from speclm.acceptance import Accepted
from speclm.config import MAX_LEAD
from speclm.generation.request import Request
from speclm.sampling.noise import PositionNoise, as_if_drawn


class StopStrings:
    """Stop strings of a call, which end each row independently of the others."""

    def __init__(
        self, criteria: Sequence[StopStringCriteria], prompt: Int[Tensor, "batch seq"]
    ) -> None:
        """Start after the prompt."""
        self._criteria = criteria
        self._device = prompt.device
        # An empty string has no tokens and ends every row; a criterion needs one token to look at.
        self._width = max(1, *(int(criterion.maximum_token_len) for criterion in criteria))
        self._prompt: list[list[int]] = prompt[:, -self._width :].tolist()

    def first_stops(
        self, tokens: Sequence[Sequence[int]], emitted: Sequence[Sequence[int]]
    ) -> dict[int, int]:
        """Return the number of new tokens of each row that ends; rows that continue are left out.

        Args:
            tokens: Tokens of each row after the prompt.
            emitted: Tokens that follow them.
        """
        by_width: dict[int, list[tuple[int, int, list[int]]]] = {}
        for row, new in enumerate(emitted):
            text = [*self._prompt[row], *tokens[row][-self._width :], *new]
            for count in range(1, len(new) + 1):
                end = len(text) - len(new) + count
                window = text[max(end - self._width, 0) : end]
                by_width.setdefault(len(window), []).append((row, count, window))
        stops: dict[int, int] = {}
        for group in by_width.values():
            texts = [window for _, _, window in group]
            windows = torch.tensor(texts, device=self._device, dtype=torch.long)
            flags = torch.stack([criterion(windows, None) for criterion in self._criteria])
            # A sync: whether a row continues is decided on the host.
            for (row, count, _), is_stop in zip(group, flags.any(0).tolist(), strict=True):
                if is_stop:
                    stops[row] = min(count, stops.get(row, count))
        return stops


class Sequences:
    """New tokens of every row, on the host.

    A row ends with its end-of-sequence token, with a stop string, or when it has `max_new_tokens`.
    A row waits while it is `MAX_LEAD` tokens ahead of the slowest live one.
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
        self._stop_lengths: dict[int, int] = {}  # length of rows that a stop string ends now
        self.eos_token_ids = frozenset(eos_token_ids)

    @property
    def any_live(self) -> bool:
        """Whether any row is live."""
        return any(self.is_live)

    @property
    def num_tokens(self) -> list[int]:
        """New tokens of each row so far; the index of its next step."""
        return [len(tokens) for tokens in self.tokens]

    @property
    def last_tokens(self) -> list[int]:
        """Last token of each row: the next root, which the target has not read yet."""
        return [tokens[-1] for tokens in self.tokens]

    @property
    def num_steps(self) -> int:
        """Steps that regular generation needs for the longest row."""
        return max(self.num_tokens)

    @property
    def most_remaining(self) -> int:
        """Maximum number of tokens that any live row may still take."""
        rows = zip(self.tokens, self.is_live, strict=True)
        fewest = min((len(tokens) for tokens, is_live in rows if is_live), default=None)
        return 0 if fewest is None else self._max_new_tokens - fewest

    def slowest(self) -> list[int]:
        """Return the live rows that have the fewest tokens."""
        live = [row for row, is_live in enumerate(self.is_live) if is_live]
        fewest = min((len(self.tokens[row]) for row in live), default=0)
        return [row for row in live if len(self.tokens[row]) == fewest]

    def admit(self, accepted: Accepted) -> Accepted:
        """Append a round's tokens and end the rows that are complete.

        Returns:
            The appended tokens: rows are cut after their end, and empty if they had ended before.
        """
        cut = self.cut(accepted)
        for row, emitted in enumerate(cut.emitted):
            self.extend(row, emitted)
        return cut

    def cut(self, accepted: Accepted) -> Accepted:
        """Cut a round's tokens after the end of each row."""
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
            # For this round only: the stopping tokens may be dropped before the row takes them.
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
        """Append one token to every live row, and end none."""
        for row, token in enumerate(tokens):
            if self.is_live[row]:
                self.tokens[row].append(token)

    def end(self, ended: list[bool]) -> None:
        """End the rows at which the list is True."""
        self.is_live = [live and not now for live, now in zip(self.is_live, ended, strict=True)]

    def to_tensor(
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


@runtime_checkable
class FollowsRounds(Protocol):
    """A streamer that wants to know which tokens were drafted."""

    def on_round(self, accepted_length: int) -> None:
        """Receive the number of draft tokens among those put since the last call.

        Draft tokens come first, and the bonus token is the last.
        """


class Listener:
    """Calls criteria and a streamer as regular generation does, position by position.

    A single row does not need lockstep: a round decides its tokens, and the callbacks see them
    one after the other. If a callback draws random numbers or ends the row, the rest of the round
    is dropped.
    """

    def __init__(
        self, request: Request, sequences: Sequences, streamer: BaseStreamer | None
    ) -> None:
        """Pass the prompt to the streamer."""
        self._ids: Tensor = request.prompt.input_ids
        self._sequences = sequences
        self._criteria = StoppingCriteriaList(request.foreign_criteria)
        self._streamer = streamer
        if streamer is not None:
            streamer.put(self._ids.cpu())  # type: ignore[no-untyped-call]  # Transformers'

    def take(self, tokens: Sequence[int], noise: PositionNoise | None) -> int:
        """Append tokens one by one and call back after each; return how many were taken."""
        num_taken = 0
        for token in tokens:
            self._sequences.extend(0, [token])
            num_taken += 1
            step = self._sequences.num_steps
            self._call(token, noise, step)
            if not self._sequences.any_live or (noise is not None and not noise.has_drawn(step)):
                break
        follower: object = self._streamer
        if isinstance(follower, FollowsRounds):
            follower.on_round(num_taken - 1)
        return num_taken

    def _call(self, token: int, noise: PositionNoise | None, step: int) -> None:
        column = torch.tensor([token], device=self._ids.device, dtype=torch.long)
        if self._criteria:
            self._ids = torch.cat([self._ids, column[:, None]], dim=1)
        with as_if_drawn(noise, step):
            if self._criteria and bool(self._criteria(self._ids, None)):
                self._sequences.end([True])
            if self._streamer is not None:
                self._streamer.put(column.cpu())  # type: ignore[no-untyped-call]  # Transformers'
