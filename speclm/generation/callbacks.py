"""Callbacks of a single row: criteria and a streamer see every position after each round."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from speclm.generation.request import Request
from speclm.generation.sequences import Sequences
from speclm.sampling.noise import PositionNoise, as_if_drawn


@runtime_checkable
class FollowsRounds(Protocol):
    """A streamer that wants to know which tokens were drafted."""

    def on_round(self, accepted_length: int) -> None:
        """Receive the number of draft tokens among those put since the last call.

        Draft tokens come first, and the bonus token is the last.
        """


class Listener:
    """Calls criteria and a streamer as regular generation does, position by position.

    A single row needs no lockstep for that: a round decides its tokens, and the callbacks see them
    one after the other. A callback may draw random numbers or end the row, and then the rest of
    the round is dropped.
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
