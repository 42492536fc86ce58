"""Where each row meets a stop string, for many positions at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.generation.stopping_criteria import StopStringCriteria


class StopStrings:
    """Stop strings of a call, which end every row by itself."""

    def __init__(
        self, criteria: Sequence[StopStringCriteria], prompt: Int[Tensor, "batch seq"]
    ) -> None:
        """Start after the prompt.

        Args:
            criteria: Transformers' own criteria, one or more.
            prompt: The prompts, padding included, as regular generation shows them to criteria.
        """
        self._criteria = criteria
        self._device = prompt.device
        self._width = max(int(criterion.maximum_token_len) for criterion in criteria)
        self._prompt: list[list[int]] = prompt[:, -self._width :].tolist()

    def first_stops(
        self, tokens: Sequence[Sequence[int]], emitted: Sequence[Sequence[int]]
    ) -> dict[int, int]:
        """Return how many new tokens each row that ends is given; rows that go on are left out.

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
            # A sync: whether a row goes on is decided on the host.
            for (row, count, _), is_stop in zip(group, flags.any(0).tolist(), strict=True):
                if is_stop:
                    stops[row] = min(count, stops.get(row, count))
        return stops
