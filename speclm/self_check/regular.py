"""Logits of regular generation, step by step, which drafts are compared with."""

import math
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from typing_extensions import override

from speclm.target import TargetView
from speclm.target.chain_session import prompt_inputs

NUM_LATER_STEPS = 24
"""Steps that are compared of models with code of others, which may act only after some tokens."""


class _ForcedTokens(LogitsProcessor):
    """Leaves a single choice: the tokens of a given text."""

    def __init__(self, text: Int[Tensor, "batch steps"], *, start: int) -> None:
        """Set the text.

        Args:
            text: Tokens that are generated.
            start: Length of the prompts.
        """
        self._text, self._start = text, start

    @override
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = min(input_ids.shape[1] - self._start, self._text.shape[1] - 1)
        forced = torch.full_like(scores, -math.inf)
        return forced.scatter_(1, self._text[:, step, None], 0.0)


def regular_logits(
    target: TargetView,
    prompts: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    text: Int[Tensor, "batch steps"],
) -> Float[Tensor, "batch positions vocab"]:
    """Return the logits that the model's own decoding loop sees while it generates a text.

    The loop is that of Transformers, so everything that it calls once per step runs: methods that
    the model's class or the model itself overrides, and hooks that only single tokens reach.

    Args:
        target: The model, in evaluation mode.
        prompts: Tokens, padded on the left.
        mask: 1 for tokens, 0 for padding.
        text: What is generated after the prompts.

    Returns:
        Logits after the prompts and after each token of the text, in float32. Costs a forward for
        each of these positions.
    """
    start, steps = prompts.shape[1], text.shape[1]
    config = cast("Any", GenerationConfig)(return_dict_in_generate=True, output_logits=True)
    config._pad_token_tensor = None  # as `generate` resolves it; nothing ends early
    output = cast("Any", GenerationMixin)._sample(
        target.model,
        prompts,
        logits_processor=LogitsProcessorList([_ForcedTokens(text, start=start)]),
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(start + steps + 1)]),
        generation_config=config,
        **prompt_inputs(target, mask),
    )
    return torch.stack(output.logits, dim=1)
