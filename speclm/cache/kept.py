"""`KeptCache`: the cache of a conversation, kept between calls of ``generate``."""

from copy import deepcopy
from itertools import takewhile

from transformers.cache_utils import Cache


class KeptCache:
    """A cache and the tokens that it holds, for a next prompt that begins alike.

    Example:
        ```python
        kept = KeptCache()
        cache = kept.take(prompt)  # None at first
        kept.keep(cache_of_the_output, tokens_of_the_output)
        ```
    """

    def __init__(self) -> None:
        self._cache: Cache | None = None
        self._ids: list[int] = []

    def take(self, prompt: list[int]) -> Cache | None:
        """Return the cache, cropped to what it shares with a prompt; None if nothing is shared.

        It is given up: after an error in the call its content would be unknown.

        Args:
            prompt: All tokens of the conversation.
        """
        cache, self._cache = self._cache, None
        pairs = zip(prompt, self._ids, strict=False)
        num_common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        num_kept = min(num_common, len(prompt) - 1)  # at least one token has to be read
        if cache is None or num_kept == 0:
            return None
        if num_kept < len(self._ids):
            try:
                cache.crop(num_kept - len(self._ids))
            except (RuntimeError, ValueError):
                return None  # a sliding window or recurrent state has lost earlier tokens
        return cache

    def copy(self, num_tokens: int) -> Cache | None:
        """Return a copy of the cache, cropped to its first tokens; None if that cannot be.

        Args:
            num_tokens: How many tokens it is to hold.
        """
        if self._cache is None or num_tokens == 0:
            return None
        cache = deepcopy(self._cache)
        if num_tokens < len(self._ids):
            try:
                cache.crop(num_tokens - len(self._ids))
            except (RuntimeError, ValueError):
                return None
        return cache

    def keep(self, cache: Cache, sequence: list[int]) -> None:
        """Keep the cache that a call returned.

        Args:
            cache: Holds the first tokens of the sequence.
            sequence: Prompt and answer.
        """
        self._cache = cache
        self._ids = sequence[: int(cache.get_seq_length())]
