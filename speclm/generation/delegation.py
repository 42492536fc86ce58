"""What the decode loop does not do itself: signals that plain decoding has to take over."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from speclm.errors import PromptError
from speclm.generation.settings import (
    BY_NAME,
    LEFT_TO_THE_BASE,
    REFUSED_SETTINGS,
    Kind,
    first_active,
)
from speclm.sampling.chooser import first_context_dependent

KNOWN_INPUTS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "logits_to_keep",
        "past_key_values",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
    }
)
"""Model inputs that Transformers prepares for any text prompt; others mean another modality."""

_UNSUPPORTED_FIELDS = tuple(
    setting
    for setting in (*LEFT_TO_THE_BASE, *REFUSED_SETTINGS)
    if setting.kind is Kind.FIELD  # what a config resolves; the rest is seen in a call alone
)
_CRITERIA = (EosTokenCriteria, MaxLengthCriteria)


class NeedsPlainDecoding(Exception):  # noqa: N818 - a signal inside speclm, not an error
    """Raised before anything is drawn or computed; `generate` then calls the base's own."""


def require_supported(
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    model_inputs: dict[str, Any],
) -> None:
    """Check that the loop gives what plain decoding gives for the resolved settings.

    Raises:
        NeedsPlainDecoding: If a setting needs more; the message is the reason.
    """

    def value_of(name: str) -> Any:
        value = getattr(generation_config, name, None)
        return BY_NAME[name].default if value is None else value

    setting = first_active(_UNSUPPORTED_FIELDS, value_of)
    if setting is not None:
        raise NeedsPlainDecoding(setting.describe(value_of(setting.name)))
    processor = first_context_dependent(logits_processor)
    if processor is not None:
        raise NeedsPlainDecoding(f"{processor} depends on the text so far")
    for criterion in stopping_criteria:
        if type(criterion) not in _CRITERIA:
            raise NeedsPlainDecoding(f"stopping criterion {type(criterion).__name__}")
    unknown = sorted(set(model_inputs) - KNOWN_INPUTS)
    if unknown:
        raise NeedsPlainDecoding(f"model input {unknown[0]!r}")


def eos_token_ids(stopping_criteria: Sequence[Any]) -> frozenset[int]:
    """Return the tokens that end a row; empty when rows run to the maximal length."""
    ids: set[int] = set()
    for criterion in stopping_criteria:
        if type(criterion) is EosTokenCriteria:
            ids.update(criterion.eos_token_id.tolist())
    return frozenset(ids)


def require_left_padding(attention_mask: Tensor) -> None:
    """Check that every row of a mask ``[batch, seq]`` ends with a token.

    Raises:
        PromptError: If a row ends with padding.
    """
    if not bool(attention_mask[:, -1].all()):
        raise PromptError(
            "prompt is padded on the right: the attention mask ends with 0; decoder-only models "
            "need left padding, tokenizer.padding_side = 'left'"
        )


def left_padding(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the number of padding tokens at the start of each row.

    Raises:
        NeedsPlainDecoding: If the mask has holes after a row's first token, or more axes.
        PromptError: If a row is padded on the right.
    """
    batch, length = tokens.shape
    if attention_mask is None:
        return torch.zeros(batch, dtype=torch.long, device=tokens.device)
    if attention_mask.dim() != 2:
        raise NeedsPlainDecoding(f"an attention mask with {attention_mask.dim()} axes")
    require_left_padding(attention_mask)
    num_padding = length - attention_mask.long().sum(1)
    slots = torch.arange(length, device=tokens.device)
    if not torch.equal(attention_mask.bool(), slots >= num_padding[:, None]):
        raise NeedsPlainDecoding("an attention mask with holes")
    return num_padding
