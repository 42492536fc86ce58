"""Logits processors, stopping criteria and streamers such as users write."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation import TopKLogitsWarper
from transformers.generation.streamers import BaseStreamer


class CountsCalls(LogitsProcessor):
    """Favours another token at each call: right only if called once a step."""

    def __init__(self) -> None:
        self._num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._num_calls += 1
        favoured = 3 * self._num_calls % scores.shape[-1]
        changed = scores.clone()
        changed[:, favoured] += 4.0
        return changed


class TreatsRowsApart(LogitsProcessor):
    """Shifts every row's scores by the row's own number: right only if rows keep their place."""

    def __init__(self, batch: int) -> None:
        self._shifts = torch.arange(batch)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocab_size = scores.shape[-1]
        columns = (torch.arange(vocab_size) + self._shifts[:, None]) % vocab_size
        return scores.gather(1, columns)


class ReadsTheWholeBatch(LogitsProcessor):
    """Lets every row's text decide for all rows: right only if finished rows are padded."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        weights = torch.arange(1, len(input_ids) + 1)[:, None]
        return scores.roll(int((input_ids * weights).sum()) % 5, dims=-1)


class DrawsAtEachCall(LogitsProcessor):
    """Adds noise from the default generator."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 3.0 * torch.rand(scores.shape)


class DrawsAtSomeCalls(LogitsProcessor):
    """Draws from the default generator at the third call and every third one after it."""

    def __init__(self) -> None:
        self._num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._num_calls += 1
        return scores if self._num_calls % 3 else scores + 2.0 * torch.rand(scores.shape)


class TopKByTheText(TopKLogitsWarper):
    """Is an instance of a built-in class, and keeps as many tokens as its row's last one says."""

    def __init__(self) -> None:
        super().__init__(top_k=2)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = [
            super(TopKByTheText, self).__call__(text[None], row[None])
            if int(text[-1]) % 2
            else row[None]
            for text, row in zip(input_ids, scores, strict=True)
        ]
        return torch.cat(kept)


class EndsRows(StoppingCriteria):
    """Ends a row at any token of a class."""

    def __init__(self, *, modulus: int = 7) -> None:
        self._modulus = modulus

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids[:, -1] % self._modulus == 3


class EndsRowsByCalls(StoppingCriteria):
    """Flags each row at one call only, the last row first: flags have to be remembered."""

    def __init__(self, *, first: int = 2, step: int = 3) -> None:
        self._num_calls, self._first, self._step = 0, first, step

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._num_calls += 1
        order = torch.arange(len(input_ids) - 1, -1, -1)
        return self._first + self._step * order == self._num_calls


class EndsAll(StoppingCriteria):
    """Returns one flag for all rows, as a Python value."""

    def __init__(self, *, length: int) -> None:
        self._length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> bool:  # type: ignore[override]  # as many do
        return input_ids.shape[1] >= self._length


class ReadsScores(StoppingCriteria):
    """Ends a row whose best score so far came late; needs ``output_scores``."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        best = torch.stack([step.max(-1).values for step in scores])  # [steps, batch]
        return (best.argmax(0) == len(scores) - 1) & torch.tensor(len(scores) > 4)


class Tokens(BaseStreamer):
    """Records every call, in full."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def put(self, value: Tensor) -> None:
        self.calls.append(
            ("put", tuple(value.shape), value.tolist(), value.dtype, value.device.type)
        )

    def end(self) -> None:
        self.calls.append(("end",))
