"""Find calls that only regular generation can answer, before anything is computed."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.generation import logits_process as processors
from transformers.generation.logits_process import LogitsProcessorList

from speclm.acceptance.interface import AcceptanceRule
from speclm.cache import CACHE_NAMES
from speclm.errors import PromptError
from speclm.generation.settings import (
    BY_NAME,
    LEFT_TO_THE_BASE,
    REFUSED_SETTINGS,
    Kind,
    first_active,
    resolve_setting,
)
from speclm.sampling.chooser import TokenChooser, first_text_dependent
from speclm.sampling.noise import generator_obstacle
from speclm.target import TargetView, images_obstacle

KNOWN_INPUTS = frozenset(
    {
        "attention_mask",
        "inputs_embeds",
        "position_ids",
        "logits_to_keep",
        *CACHE_NAMES,
        "use_cache",
        "output_attentions",
        "output_hidden_states",
    }
)
"""Model inputs that Transformers prepares for any text prompt; others come with images."""

_UNSUPPORTED_FIELDS = tuple(
    setting
    for setting in (*LEFT_TO_THE_BASE, *REFUSED_SETTINGS)
    if setting.kind is Kind.FIELD  # a resolved config holds no others
)
_OWN_FORWARDS = frozenset(
    {
        processors.UnbatchedClassifierFreeGuidanceLogitsProcessor,
        processors.ClassifierFreeGuidanceLogitsProcessor,
    }
)
"""Processors that run the model or double the batch themselves."""


class NeedsRegularGeneration(Exception):  # noqa: N818 - a signal inside speclm, not an error
    """Raised before anything is drawn or computed; `generate` then calls the base's own."""


def first_delegated(arguments: Mapping[str, Any], default: GenerationConfig) -> str | None:
    """Return the first setting that only the base's own `generate` honours, or None."""
    lookup = partial(resolve_setting, arguments=arguments, default=default)
    setting = first_active(LEFT_TO_THE_BASE, lookup)
    return None if setting is None else setting.describe(lookup(setting.name))


def require_supported(
    generation_config: GenerationConfig,
    logits_processor: LogitsProcessorList,
    rule: AcceptanceRule,
    *,
    device: torch.device,
) -> None:
    """Check that the decode loop supports the resolved settings.

    Raises:
        NeedsRegularGeneration: If it does not; the message is the reason.
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


def _require_text_free(logits_processor: LogitsProcessorList, rule: AcceptanceRule) -> None:
    """Check that no processor reads the text, if the rule decides a whole draft at once."""
    text_dependent = first_text_dependent(logits_processor)
    if text_dependent is not None:
        name = type(text_dependent).__name__
        raise NeedsRegularGeneration(
            f"{name} reads the text, and acceptance {rule.name!r} decides a whole draft at once"
        )
    if TokenChooser(logits_processor, is_greedy=False).reads_lengths:
        raise NeedsRegularGeneration(
            f"a processor reads the length of the text, and acceptance {rule.name!r} does not"
        )


def images_of(target: TargetView, tokens: Tensor, model_inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that belong to images, if only the prompt's forward needs them.

    Raises:
        NeedsRegularGeneration: If later forwards need them too, or the prompt is one of embeddings.
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
    """Return whether an input is empty; models pass on empty inputs if there is no image."""
    return value is None or (isinstance(value, dict) and not value)


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
    cache: Any,
    embeddings: Tensor | None = None,
) -> int:
    """Return the length of the whole prompt, including the tokens in a cache.

    As in Transformers, a prompt as long as its mask is the whole prompt; a shorter one holds only
    the new tokens. Embeddings are always the whole prompt.

    Raises:
        NeedsRegularGeneration: If mask, prompt and cache do not add up.
    """
    num_tokens, num_cached = tokens.shape[1], cached_length(cache)
    if embeddings is not None:
        if num_cached or num_tokens not in {0, embeddings.shape[1]}:
            raise NeedsRegularGeneration(
                f"inputs_embeds for {embeddings.shape[1]} tokens next to {num_tokens} tokens and "
                f"{num_cached} cached ones"
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


def cached_length(cache: Any) -> int:
    """Return the number of tokens in a cache; 0 without one.

    Raises:
        NeedsRegularGeneration: If it holds only recurrent states, which do not count their tokens.
    """
    if cache is None:
        return 0
    layers = cache.layers if isinstance(cache, Cache) else []
    if not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return int(cache.get_seq_length())
    if cache.has_previous_state():
        raise NeedsRegularGeneration(
            "a given cache of recurrent layers, which do not count their tokens"
        )
    return 0


def left_padding(
    tokens: Tensor, attention_mask: Tensor | None, *, length: int
) -> Int[Tensor, " batch"]:
    """Return the number of padding tokens at the start of each row of a prompt of `length` tokens.

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
    indices = torch.arange(length, device=tokens.device)
    if not torch.equal(attention_mask.bool(), indices >= num_padding[:, None]):
        raise NeedsRegularGeneration("an attention mask with holes")
    return num_padding


def meets_switch(
    target: TargetView, num_padding: Int[Tensor, " batch"], *, start: int, end: int
) -> bool:
    """Return whether the rotation of keys may change while rows grow from `start` to `end` tokens.

    Raises:
        NeedsRegularGeneration: If regular generation then reads the text again.
    """
    switch = target.rotary_switch
    if switch is None:
        return False
    shortest = int(num_padding.min())
    is_met = switch.is_met(start - 1 - shortest, end - 1 - shortest)
    # Re-reading depends on the length with padding, the rotation on positions.
    if switch.reads_again and (is_met or switch.is_met(start - 1, end - 1)):
        raise NeedsRegularGeneration(
            f"within max_length the text may outgrow {switch.num_positions} positions, where this "
            "model reads it again"
        )
    return is_met
