"""The target's own candidates, remembered by token and by pair of tokens."""

import copy
import weakref
from math import exp, inf, log
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.config import MAX_DEPTH, require_count
from speclm.drafting.growing import GrowthConfig, SourceProposer
from speclm.drafting.interface import Prefill, TargetNeeds
from speclm.drafting.sources import CandidateSource, NoiseRow, State
from speclm.errors import OptionError
from speclm.methods.recycling.checkpoint import memory_fingerprint
from speclm.methods.recycling.memory import CandidateMemory
from speclm.methods.recycling.memory_file import MemoryFile
from speclm.target.logits import head_shape

# A key: whether the pair was known, the rank, and the remembered probability in buckets.
_BOUNDS = (0.9, 0.65, 0.4, 0.2, 0.08)
_LEAST = 0.004
_NUM_BUCKETS = len(_BOUNDS) + 1
_LOG_BOUNDS = (*map(log, (*_BOUNDS, _LEAST)), -inf)
_LEAST_TEMPERATURE = 1e-6
_LEAST_NOISE = 1e-30  # half-precision noise may be 0
_NUM_RANKS = 4  # further ranks share the last
_BUCKET_RATES = (0.9, 0.7, 0.45, 0.25, 0.1, 0.03)
_TOKEN_FACTOR = 0.6  # of a rate where only the token was known


class RecyclingSource(CandidateSource):
    """Suggests the likeliest tokens at the last visit to the same one or two tokens.

    Source: Luo et al. 2024 (Token Recycling), which remembers by single tokens.
    """

    reads_noise = True
    start_rates = tuple(
        rate * factor * 0.9**rank
        for factor in (_TOKEN_FACTOR, 1.0)
        for rank in range(_NUM_RANKS)
        for rate in _BUCKET_RATES
    )

    def __init__(self, target: PreTrainedModel, *, memory: str | Path, max_pairs: int) -> None:
        """Start with an empty memory, or with that of a file.

        Args:
            target: The model that will verify.
            memory: ``"model"`` to keep the memory from call to call; ``"call"`` to clear it at
                each; or the path of a file, which is read if it exists, and written now and then
                and when the program ends.
            max_pairs: Maximum pairs of tokens to remember.

        Raises:
            OptionError: If an option is out of range.
            CheckpointError: If the file is damaged, or the memory of another model.
        """
        if not isinstance(memory, str | Path) or memory == "":  # type: ignore[redundant-expr]
            raise OptionError(
                f"memory is {memory!r}, expected 'model', 'call' or the path of a file; a path "
                "keeps it for the next program"
            )
        vocab_size = head_shape(target)[0]
        self._file: MemoryFile | None = None
        if memory in {"model", "call"}:
            self.memory = CandidateMemory(vocab_size=vocab_size, max_pairs=max_pairs)
        else:
            self._file = MemoryFile(
                Path(memory),
                vocab_size=vocab_size,
                fingerprint=memory_fingerprint(target),
                max_pairs=max_pairs,
            )
            self.memory = self._file.memory
            self._save_at_end()
        self.num_observed = self.memory.num_candidates
        self._clears = memory == "call"
        self._scale = 1.0  # of log-probabilities, by the temperature
        self._last: list[tuple[int, int]] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._save_at_end()

    def _save_at_end(self) -> None:
        if self._file is not None:
            weakref.finalize(self, self._file.save)  # also when the program ends

    @override
    def begin(self, prompt: Prefill) -> None:
        if self._clears:
            self.memory.clear()
        if self._file is not None:
            self._file.save_if_due()
        self._scale = 1 / max(prompt.temperature, _LEAST_TEMPERATURE)
        # Once per generation: the memory lives on the host.
        ends, firsts = prompt.tokens[:, -1:].tolist(), prompt.first_tokens.tolist()
        is_alone = (prompt.num_padding >= prompt.tokens.shape[1]).tolist()
        self._last = [
            (-1 if alone else end[0], first)
            for end, first, alone in zip(ends, firsts, is_alone, strict=True)
        ]

    @override
    def root(self, row: int) -> State:
        return self._last[row]

    @override
    def advance(self, state: State, token: int) -> State:
        return state[1], token

    @override
    def candidates(self, state: State, noise: NoiseRow | None) -> list[tuple[int, int]]:
        found = self.memory.find(*state)
        if found is None:
            return []
        is_pair, tokens, log_probs = found
        key = is_pair * _NUM_RANKS * _NUM_BUCKETS
        last = key + (_NUM_RANKS - 1) * _NUM_BUCKETS
        if noise is not None:
            tokens, log_probs = self._under_noise(tokens, log_probs, noise)
        keyed, bucket, bound = [], 0, _LOG_BOUNDS[0]
        for token, log_prob in zip(tokens, log_probs, strict=True):  # the likeliest first
            while log_prob < bound:
                bucket += 1
                bound = _LOG_BOUNDS[bucket]
            if bucket == _NUM_BUCKETS:
                break  # the others are rarer still
            keyed.append((token, key + bucket))
            if key < last:
                key += _NUM_BUCKETS
        return keyed

    def _under_noise(
        self, tokens: list[int], log_probs: list[float], noise: NoiseRow
    ) -> tuple[list[int], list[float]]:
        """Rank candidates by the noise that decides; return log-probabilities of being chosen."""
        scale, drawn = self._scale, noise.item
        scores = [
            log_prob * scale - log(drawn(token) or _LEAST_NOISE)
            for token, log_prob in zip(tokens, log_probs, strict=True)
        ]
        best = max(scores)
        total = best + log(sum([exp(score - best) for score in scores]))
        ranked = sorted(zip(scores, tokens, strict=True), reverse=True)
        return [token for _, token in ranked], [score - total for score, _ in ranked]

    @override
    def observe(
        self,
        previous: list[int],
        tokens: list[int],
        ids: Int[np.ndarray, "nodes candidates"],
        log_probs: Float[np.ndarray, "nodes candidates"],
        *,
        num_rejected: int,
    ) -> None:
        # Rejected nodes follow a text that was not generated, so they only fill gaps.
        kept = [
            index
            for index, pair in enumerate(zip(previous, tokens, strict=True))
            if index >= num_rejected or not self.memory.knows(*pair)
        ]
        self.memory.store(
            [previous[index] for index in kept],
            [tokens[index] for index in kept],
            ids[kept],
            log_probs[kept],
        )

    @override
    def forget(self) -> None:
        """Clear the memory; that of a file returns to what the file held when it was read."""
        if self._file is None:
            self.memory.clear()
        else:
            self._file.forget()

    @override
    def describe(self) -> str:
        memory, (by_token, by_pair) = self.memory, self.memory.num_hits
        lookups = max(memory.num_lookups, 1)
        return (
            f"memory of {memory.num_tokens} tokens and {memory.num_pairs} pairs, "
            f"{memory.num_bytes / 1e6:.1f} MB; {by_pair / lookups:.0%} of look-ups found by the "
            f"pair, {by_token / lookups:.0%} by the token"
        )

    @override
    def commit(self, row: int, emitted: list[int]) -> None:
        *_, previous, token = (*self._last[row], *emitted)
        self._last[row] = previous, token


class MemoryProposer(SourceProposer):
    """Base class of proposers with a memory; `grower` has a `RecyclingSource` among its sources."""

    remembers = True

    def __init__(
        self,
        target: PreTrainedModel,
        recycling: RecyclingSource,
        *,
        num_draft_tokens: int,
        min_probability: float,
    ) -> None:
        """Take the model that will verify, the source with its memory, and `GrowthConfig`'s values.

        Raises:
            OptionError: If one is out of range.
        """
        require_count("num_draft_tokens", num_draft_tokens, low=1, high=MAX_DEPTH)
        self.config = GrowthConfig(
            depth=num_draft_tokens,
            num_draft_tokens=num_draft_tokens,
            min_probability=min_probability,
        )
        self.needs = TargetNeeds(vocab_size=recycling.memory.vocab_size)
        self._target = target
        self._recycling = recycling

    @property
    def memory(self) -> CandidateMemory:
        """What the target thought likely after tokens and pairs of tokens."""
        return self._recycling.memory

    def save_memory(self, path: str | Path) -> None:
        """Write the memory into a file that the option `memory` reads, and `speclm warm` merges.

        Args:
            path: The file; its folder has to exist. An old file is replaced.

        Raises:
            OptionError: If it cannot be written; an old file stays.
        """
        if not isinstance(path, str | Path):
            raise OptionError(f"path is {path!r}, expected the path of a file; pass one")
        # A copy, since a memory with a file of its own has still to be written there.
        copy.copy(self.memory).save(path, fingerprint=memory_fingerprint(self._target))
