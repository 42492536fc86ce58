"""Tells stopping criteria and a streamer of every position of a single row, after each round."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from speclm.generation.sequences import Rows
from speclm.sampling.noise import PositionNoise, as_if_drawn


@runtime_checkable
class FollowsRounds(Protocol):
    """A streamer that wants to know which tokens were drafted."""

    def on_round(self, accepted_length: int) -> None:
        """Hear how many of the tokens put since the last call were drafted; the last one is not."""


class Listener:
    """Calls criteria and a streamer with what regular generation calls them with, in its order.

    A single row needs no lockstep for that: its positions are decided by the round, and told one
    after the other. What is told may draw random numbers or end the row. The rest of the round is
    then dropped.
    """

    def __init__(
        self,
        input_ids: Int[Tensor, "1 seq"],
        rows: Rows,
        *,
        criteria: Sequence[StoppingCriteria],
        streamer: BaseStreamer | None,
    ) -> None:
        """Tell the streamer the prompt.

        Args:
            input_ids: The prompt, as `generate` was given it.
            rows: The row, which takes the tokens.
            criteria: Those that the row does not decide by itself.
            streamer: Is told of every position; None for nobody.
        """
        self._ids = input_ids
        self._rows = rows
        self._criteria = StoppingCriteriaList(criteria)
        self._streamer = streamer
        if streamer is not None:
            streamer.put(input_ids.cpu())  # type: ignore[no-untyped-call]  # Transformers'

    def hear(self, tokens: Sequence[int], noise: PositionNoise | None) -> int:
        """Take tokens one by one, and tell of each; return how many were taken.

        Args:
            tokens: What the round decided for the row.
            noise: What decided it; None where nothing is sampled.
        """
        num_taken = 0
        for token in tokens:
            self._rows.extend(0, [token])
            num_taken += 1
            step = self._rows.num_steps
            self._tell(token, noise, step)
            if not self._rows.any_live or (noise is not None and not noise.has_drawn(step)):
                break
        follower: object = self._streamer
        if isinstance(follower, FollowsRounds):
            follower.on_round(num_taken - 1)
        return num_taken

    def _tell(self, token: int, noise: PositionNoise | None, step: int) -> None:
        column = torch.tensor([token], device=self._ids.device, dtype=torch.long)
        if self._criteria:
            self._ids = torch.cat([self._ids, column[:, None]], dim=1)
        with as_if_drawn(noise, step):
            if self._criteria and bool(self._criteria(self._ids, None)):
                self._rows.end([True])
            if self._streamer is not None:
                self._streamer.put(column.cpu())  # type: ignore[no-untyped-call]  # Transformers'

    def finish(self) -> None:
        """Tell the streamer that all is said."""
        if self._streamer is not None:
            self._streamer.end()  # type: ignore[no-untyped-call]  # Transformers'
