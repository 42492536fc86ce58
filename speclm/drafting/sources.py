"""What a lookup tree grows from: sources of candidates, which follow the tree node by node."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from typing_extensions import override

from speclm.drafting.interface import Draft, Prefill

State = Any
"""A source's own description of the text up to a node; None if it has nothing to say there."""

NoiseRow = Float[np.ndarray, " vocab"]
"""Noise of one position of one row, on the host."""


class CandidateSource(ABC):
    """Suggests tokens that may follow a node of a draft tree.

    Each candidate has a key, which names the kind of evidence for it, such as a rank or the length
    of a match. How often candidates of a key are right is measured, so that the scores of all
    sources are comparable. A source needs no network, and works on the host.

    Attributes:
        start_rates: Probability that a candidate of each key is right, before it is measured.
        reads_noise: Whether keys depend on the noise that decides the token, under sampling. If
            not, hit rates are measured by the noise as well.
        num_observed: Likeliest tokens after each verified node that `observe` is given; 0 if the
            source needs none.
    """

    start_rates: Sequence[float]
    reads_noise: bool = False
    num_observed: int = 0

    def begin(self, prompt: Prefill) -> None:  # noqa: B027 - not all have rows
        """Start a generation."""

    @abstractmethod
    def root(self, row: int) -> State:
        """Return the state at the root of a row."""

    @abstractmethod
    def advance(self, state: State, token: int) -> State:
        """Return the state one token later."""

    @abstractmethod
    def candidates(self, state: State, noise: NoiseRow | None) -> list[tuple[int, int]]:
        """Return tokens that may come next and their keys, likeliest first.

        Args:
            state: State of a node; never None.
            noise: Noise that decides the token; None if the target decodes greedily, or for a
                source that does not read it.
        """

    def observe(  # noqa: B027 - most learn from tokens only
        self,
        previous: list[int],
        tokens: list[int],
        ids: Int[np.ndarray, "nodes candidates"],
        log_probs: Float[np.ndarray, "nodes candidates"],
        *,
        num_rejected: int,
    ) -> None:
        """Take note of what the target thought likely after the nodes of a verified tree.

        Args:
            previous: Token before that of each node; -1 if there is none.
            tokens: Token of each node.
            ids: Likeliest tokens after each node, ``[nodes, num_observed]``.
            log_probs: Their log-probabilities.
            num_rejected: The first nodes, which were rejected; accepted ones come last.
        """

    def commit(self, row: int, emitted: list[int]) -> None:  # noqa: B027 - not all have rows
        """Append the tokens that a row emitted."""

    def forget(self) -> None:  # noqa: B027 - most know the current text only
        """Forget what earlier generations taught; called between generations."""

    def describe(self) -> str:
        """Return what the source holds, for reports; empty if there is nothing to say."""
        return ""


NUM_PROB_BUCKETS = 8
_NUM_DEPTHS = 3
_BUCKET_BOUNDS = (0.95, 0.85, 0.7, 0.5, 0.3, 0.15, 0.05)
_BUCKET_RATES = (0.97, 0.9, 0.77, 0.6, 0.4, 0.22, 0.1, 0.03)


class DraftSource(CandidateSource):
    """The trees that another proposer drafted in this round.

    A key is the proposer's own probability, in buckets, at a depth.
    """

    start_rates = _BUCKET_RATES * _NUM_DEPTHS
    reads_noise = True  # the other proposer has read it

    def __init__(self) -> None:
        self._children: list[list[list[tuple[int, int, int]]]] = []  # token, node, key

    def take(self, draft: Draft) -> None:
        """Take the trees of a round; reads their tokens on the host."""
        rows, probs = draft.tokens.tolist(), draft.node_probs
        all_parents, all_depths = draft.topology.host_parents, draft.topology.host_node_depths
        self._children = []
        for row, tokens in enumerate(rows):
            shape = row if len(all_parents) > 1 else 0
            parents, depths = all_parents[shape], all_depths[shape]
            children: list[list[tuple[int, int, int]]] = [[] for _ in tokens]
            for node in range(1, len(tokens)):
                if parents[node] == node:
                    continue  # padding
                bucket = 3 if probs is None else _prob_bucket(probs[row][node])
                depth = min(depths[node], _NUM_DEPTHS) - 1
                key = depth * NUM_PROB_BUCKETS + bucket
                siblings = children[parents[node]]
                if all(token != tokens[node] for token, _, _ in siblings):
                    siblings.append((tokens[node], node, key))
            self._children.append(children)

    def drop(self) -> None:
        """Forget the trees."""
        self._children = []

    @override
    def root(self, row: int) -> State:
        return (row, 0) if self._children else None

    @override
    def advance(self, state: State, token: int) -> State:
        row, node = state
        found = (own for drafted, own, _ in self._children[row][node] if drafted == token)
        child = next(found, None)
        return None if child is None else (row, child)

    @override
    def candidates(self, state: State, noise: NoiseRow | None) -> list[tuple[int, int]]:
        row, node = state
        return [(token, key) for token, _, key in self._children[row][node]]

    def path(self, row: int, emitted: list[int]) -> list[int]:
        """Return the nodes of the proposer's own tree that emitted tokens but the last follow."""
        if not emitted:
            return []
        path, state = [0], self.root(row)
        for token in emitted[:-1]:
            state = None if state is None else self.advance(state, token)
            if state is None:
                break
            path.append(state[1])
        return path


def _prob_bucket(prob: float) -> int:
    return next((i for i, bound in enumerate(_BUCKET_BOUNDS) if prob >= bound), 7)
