"""What one call of `generate` leaves behind, and how two calls are compared."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm.target.features import FeatureTap

# A product over several rows rounds otherwise than one over a single row; regular generation itself
# is up to 7e-5 from what float64 computes for the logits of the text models, which are about 10.
SCORE_TOLERANCE = 2e-4


@dataclass(frozen=True)
class Outcome:
    """Tokens, generator state behind them, scores where asked for, and forwards of the target."""

    sequences: Tensor
    state: Tensor
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
    num_forwards: int

    def new_tokens(self, inputs: dict[str, Tensor]) -> list[list[int]]:
        """Return the tokens behind the prompt, padding included."""
        return self.sequences[:, inputs["input_ids"].shape[1] :].tolist()


class _Reader(FeatureTap):
    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def read(self, *arguments: object) -> None:
        self._function(*arguments)


def reading(function: Callable[..., object]) -> Callable[..., None]:
    """Return a forward hook that speclm takes for one of its own, which only read.

    For others the model is checked again, in forwards that run the hook too.
    """
    return _Reader(function).read


def observe(
    model: Any,
    inputs: dict[str, Tensor],
    arguments: dict[str, Any],
    *,
    base: PreTrainedModel,
    seed: int = 5,
) -> Outcome:
    """Call `generate` of a model or of what wraps it, and count the decoder's forwards."""
    calls: list[None] = []
    handle = base.get_decoder().register_forward_hook(reading(lambda *_: calls.append(None)))
    torch.manual_seed(seed)
    try:
        output = model.generate(**inputs, **arguments)
        state = torch.get_rng_state()
    finally:
        handle.remove()
    is_dict = not isinstance(output, Tensor)
    return Outcome(
        sequences=output.sequences if is_dict else output,
        state=state,
        scores=output.scores if is_dict else None,
        logits=output.logits if is_dict else None,
        num_forwards=len(calls),
    )


def require_same(found: Outcome, expected: Outcome) -> None:
    """Assert equal tokens and an equally placed generator."""
    assert found.sequences.dtype == expected.sequences.dtype
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert torch.equal(found.state, expected.state), "the generator was left in another state"


def require_close(
    found: tuple[Tensor, ...] | None,
    expected: tuple[Tensor, ...] | None,
    *,
    live: Tensor | None = None,
) -> None:
    """Assert that scores or logits agree at every step, in the rows that are live at it.

    Args:
        found: One ``[batch, vocab]`` a step.
        expected: The same of regular generation.
        live: Flags ``[batch, steps]``; None for all.
    """
    assert (found is None) == (expected is None)
    if found is None or expected is None:
        return
    assert len(found) == len(expected)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        rows = slice(None) if live is None else live[:, step]
        torch.testing.assert_close(
            one[rows], other[rows], atol=SCORE_TOLERANCE, rtol=SCORE_TOLERANCE
        )


def live_steps(new_tokens: list[list[int]], eos_token_ids: Collection[int]) -> Tensor:
    """Return flags ``[batch, steps]``: whether the row had not ended before that step."""
    flags = []
    for row in new_tokens:
        ends = [index for index, token in enumerate(row) if token in eos_token_ids]
        last = ends[0] if ends else len(row)
        flags.append([step <= last for step in range(len(row))])
    return torch.tensor(flags)


def lengths(new_tokens: list[list[int]], eos_token_ids: Collection[int]) -> list[int]:
    """Return the number of tokens in each row up to its end, which counts."""
    return live_steps(new_tokens, eos_token_ids).sum(1).tolist()
