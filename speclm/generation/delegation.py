"""What the decode loop does not do itself: signals that regular generation has to take over."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import logits_process as processors
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StopStringCriteria,
)

from speclm.acceptance.interface import AcceptanceRule
from speclm.cache import import_obstacle
from speclm.errors import PromptError
from speclm.generation.settings import (
    BY_NAME,
    LEFT_TO_THE_BASE,
    REFUSED_SETTINGS,
    Kind,
    first_active,
)
from speclm.generation.stop_strings import StopStrings
from speclm.sampling.chooser import TokenChooser, first_text_dependent
from speclm.sampling.noise import generator_obstacle
from speclm.target import TargetView, images_obstacle

KNOWN_INPUTS = frozenset(
    {
        "attention_mask",
        "inputs_embeds",
        "position_ids",
        "logits_to_keep",
        "past_key_values",
        "cache_params",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
    }
)
"""Model inputs that Transformers prepares for any text prompt; others come with images."""

CACHE_INPUTS = ("past_key_values", "cache_params")
"""Names under which models take a cache."""

_UNSUPPORTED_FIELDS = tuple(
    setting
    for setting in (*LEFT_TO_THE_BASE, *REFUSED_SETTINGS)
    if setting.kind is Kind.FIELD  # what a config resolves; the rest is seen in a call alone
)
_OWN_FORWARDS = frozenset(
    {
        processors.UnbatchedClassifierFreeGuidanceLogitsProcessor,
        processors.ClassifierFreeGuidanceLogitsProcessor,
    }
)
"""Processors that run the model or double the batch themselves."""
_OWN_CRITERIA = frozenset({EosTokenCriteria, MaxLengthCriteria, StopStringCriteria})
"""Criteria that each row decides by itself, by exact class."""


class NeedsRegularGeneration(Exception):  # noqa: N818 - a signal inside speclm, not an error
    """Raised before anything is drawn or computed; `generate` then calls the base's own."""


def require_supported(
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    rule: AcceptanceRule,
    *,
    device: torch.device,
) -> None:
    """Check that the loop gives what regular generation gives for the resolved settings.

    Args:
        generation_config: The settings.
        logits_processor: All logits processors.
        rule: Decides which draft tokens are kept.
        device: That of the logits, where regular generation draws.

    Raises:
        NeedsRegularGeneration: If a setting needs more; the message is the reason.
    """

    def value_of(name: str) -> Any:
        value = getattr(generation_config, name, None)
        return BY_NAME[name].default if value is None else value

    setting = first_active(_UNSUPPORTED_FIELDS, value_of)
    if setting is not None:
        raise NeedsRegularGeneration(setting.describe(value_of(setting.name)))
    for processor in logits_processor:
        if type(processor) in _OWN_FORWARDS:
            raise NeedsRegularGeneration(f"{type(processor).__name__} runs the model itself")
    if not rule.is_exact:
        _require_text_free(logits_processor, rule)
    obstacle = generator_obstacle(device)
    if obstacle is not None and generation_config.do_sample and rule.uses_noise:
        raise NeedsRegularGeneration(obstacle)


def images_of(target: TargetView, tokens: Tensor, model_inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that text does not have, if none but the prompt's forward needs them.

    Raises:
        NeedsRegularGeneration: If later forwards do, or the prompt is one of embeddings.
    """
    images = {
        name: value
        for name, value in model_inputs.items()
        if name not in KNOWN_INPUTS and not _is_empty(value)
    }
    if not images:
        return images
    if model_inputs.get("inputs_embeds") is not None:
        raise NeedsRegularGeneration(f"model input {min(images)!r} next to inputs_embeds")
    obstacle = images_obstacle(target.model, tokens, model_inputs, images)
    if obstacle is not None:
        raise NeedsRegularGeneration(obstacle)
    return images


def _is_empty(value: Any) -> bool:
    """Return whether an input says nothing, as what is read from images where there are none."""
    return value is None or (isinstance(value, dict) and not value)


def _require_text_free(logits_processor: LogitsProcessorList, rule: AcceptanceRule) -> None:
    """Raise if a rule that compares distributions would need them after a path of its own."""
    text_dependent = first_text_dependent(logits_processor)
    if text_dependent is not None:
        name = type(text_dependent).__name__
        raise NeedsRegularGeneration(
            f"{name} reads the text, and acceptance {rule.name!r} decides all"
        )
    if TokenChooser(logits_processor, is_greedy=False).reads_lengths:
        raise NeedsRegularGeneration(
            f"a processor reads the length of the text, and acceptance {rule.name!r} does not"
        )


def foreign_criteria(stopping_criteria: Sequence[StoppingCriteria]) -> list[StoppingCriteria]:
    """Return the criteria that have to be told of every position, in order."""
    return [criterion for criterion in stopping_criteria if type(criterion) not in _OWN_CRITERIA]


def stop_strings_of(
    stopping_criteria: Sequence[StoppingCriteria], prompt: Tensor
) -> StopStrings | None:
    """Return the stop strings among criteria, for prompts ``[batch, seq]``; None without any."""
    found = [criterion for criterion in stopping_criteria if type(criterion) is StopStringCriteria]
    return StopStrings(found, prompt) if found else None


def rows_end_together(stopping_criteria: Sequence[StoppingCriteria]) -> bool:
    """Return whether no row of a batch ends before all have met a stop string.

    Transformers has it so where no criterion names an end-of-sequence token.
    """
    has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    return not has_end and any(type(found) is StopStringCriteria for found in stopping_criteria)


def max_length(stopping_criteria: Sequence[Any], generation_config: GenerationConfig) -> int:
    """Return the tokens at which every row ends, prompt included.

    A criterion that the caller passes in takes the place of that of the config.
    """
    lengths = [
        int(criterion.max_length)
        for criterion in stopping_criteria
        if type(criterion) is MaxLengthCriteria
    ]
    return min(lengths, default=int(generation_config.max_length))


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


def prompt_length(
    tokens: Tensor,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig,
    given: Any,
    embeddings: Tensor | None = None,
) -> int:
    """Return the slots of the whole prompt, which may begin in a cache that was passed in.

    As Transformers has it, a prompt as long as its mask is all there is; a shorter one holds the
    new tokens alone. Embeddings are the whole prompt.

    Raises:
        NeedsRegularGeneration: If mask, prompt and cache do not add up.
    """
    num_tokens, num_cached = tokens.shape[1], num_slots(given)
    if embeddings is not None:
        if num_cached or num_tokens not in {0, embeddings.shape[1]}:
            raise NeedsRegularGeneration(
                f"inputs_embeds for {embeddings.shape[1]} slots next to {num_tokens} tokens and "
                f"{num_cached} cached slots"
            )
        num_tokens = embeddings.shape[1]
    if attention_mask is not None:
        length = attention_mask.shape[1]
    else:  # left out when it was all ones
        length = getattr(generation_config, "_mask_length", None) or num_tokens
    if length not in {num_tokens, num_cached + num_tokens}:
        raise NeedsRegularGeneration(
            f"{num_cached} cached and {num_tokens} given tokens under a mask for {length}"
        )
    return length


def num_slots(given: Any) -> int:
    """Return the slots that a cache holds; none are without attention to count them.

    Raises:
        NeedsRegularGeneration: If it holds recurrent states alone, which do not tell.
    """
    if given is None:
        return 0
    layers = given.layers if isinstance(given, Cache) else []
    if not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return int(given.get_seq_length())
    if given.has_previous_state():
        raise NeedsRegularGeneration(
            "past_key_values of recurrent layers, which do not tell its length"
        )
    return 0


def require_importable(given: Any, num_layers: int, *, batch: int, num_tokens: int) -> None:
    """Check that a cache can be taken over.

    Raises:
        NeedsRegularGeneration: If not.
    """
    obstacle = import_obstacle(given, num_layers=num_layers, batch=batch, num_tokens=num_tokens)
    if obstacle is not None:
        raise NeedsRegularGeneration(f"past_key_values {obstacle}")


def left_padding(tokens: Tensor, attention_mask: Tensor | None, *, length: int) -> Tensor:
    """Return the number of padding tokens at the start of each row of `length` slots.

    Raises:
        NeedsRegularGeneration: If the mask has holes after a row's first token, or more axes.
        PromptError: If a row is padded on the right.
    """
    if attention_mask is None:
        return torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
    if attention_mask.dim() != 2:
        raise NeedsRegularGeneration(f"an attention mask with {attention_mask.dim()} axes")
    require_left_padding(attention_mask)
    num_padding = length - attention_mask.long().sum(1)
    slots = torch.arange(length, device=tokens.device)
    if not torch.equal(attention_mask.bool(), slots >= num_padding[:, None]):
        raise NeedsRegularGeneration("an attention mask with holes")
    return num_padding
