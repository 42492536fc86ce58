"""The arguments of `generate`: what is refused, and what is left to the base's own."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from speclm.errors import CacheError, OptionError, PromptError
from speclm.generation.delegation import require_left_padding

_OTHER_SPECULATION = (
    "assistant_model",
    "assistant_tokenizer",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "speculation_type",
    "custom_generate",
)
_DELEGATED_ARGUMENTS = (
    "streamer",
    "stop_strings",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "synced_gpus",
    "inputs_embeds",
    "position_ids",
    "past_key_values",
    "dola_layers",
    "penalty_alpha",
    "num_beam_groups",
    "cache_implementation",
    "constraints",
    "force_words_ids",
)


def resolve_setting(name: str, arguments: dict[str, Any], default: GenerationConfig) -> Any:
    """Return a setting as `generate` resolves it: argument, given config, the model's config."""
    if arguments.get(name) is not None:
        return arguments[name]
    for config in (arguments.get("generation_config"), default):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def first_delegated(arguments: dict[str, Any], default: GenerationConfig) -> str | None:
    """Return the first argument that only the base's own `generate` honours, None without one."""
    given = (
        name
        for name in _DELEGATED_ARGUMENTS
        if (value := resolve_setting(name, arguments, default)) is not None and value is not False
    )
    return next(given, None)


def require_acceptable(arguments: dict[str, Any], default: GenerationConfig) -> None:
    """Check the arguments of a call before anything is computed.

    Raises:
        OptionError: If another speculation method is asked for.
        CacheError: If a cache is passed in that cannot be rolled back.
        PromptError: If the prompt is empty, of the wrong shape or padded on the right.
    """
    for name in _OTHER_SPECULATION:
        if resolve_setting(name, arguments, default):
            raise OptionError(
                f"{name} asks for Transformers' own speculation or decoding, and this model has "
                "its own; drop it, or call .base.generate"
            )
    cache = arguments.get("past_key_values")
    if isinstance(cache, Cache) and not all(layer.is_croppable for layer in cache.layers):
        raise CacheError(
            f"past_key_values is a {type(cache).__name__}, which cannot be rolled back; pass a "
            "DynamicCache, or none"
        )
    tokens = (
        arguments["inputs"] if arguments.get("inputs") is not None else arguments.get("input_ids")
    )
    if tokens is not None and not isinstance(tokens, Tensor):
        raise PromptError(
            f"prompt is a {type(tokens).__name__}, expected a tensor of token ids [batch, seq]; "
            "tokenize with return_tensors='pt'"
        )
    if tokens is not None and (tokens.dim() != 2 or 0 in tokens.shape):
        raise PromptError(
            f"prompt has shape {tuple(tokens.shape)}, expected [batch, seq] with at least one row "
            "and one token; tokenize with return_tensors='pt'"
        )
    if tokens is not None and (tokens.is_floating_point() or tokens.dtype == torch.bool):
        raise PromptError(
            f"prompt has dtype {tokens.dtype}, expected integer token ids; pass input_ids, not "
            "the attention mask or embeddings"
        )
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if tokens is not None and mask.shape != tokens.shape:
            raise PromptError(
                f"attention mask has shape {tuple(mask.shape)}, the prompt {tuple(tokens.shape)}; "
                "pass the mask that the tokenizer returned with the prompt"
            )
        require_left_padding(mask)
