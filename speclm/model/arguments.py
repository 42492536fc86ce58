"""The arguments of `generate`: what is refused, and what is left to the base's own."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache

from speclm.errors import CacheError, OptionError, PromptError, suggest
from speclm.generation.delegation import require_left_padding
from speclm.generation.settings import (
    BY_NAME,
    LEFT_TO_THE_BASE,
    REFUSED_SETTINGS,
    Kind,
    Setting,
    first_active,
)
from speclm.model.loading import OPTIONS_OF_LOADING


def resolve_setting(name: str, arguments: Mapping[str, Any], default: GenerationConfig) -> Any:
    """Return a setting as `generate` resolves it.

    A keyword counts even if it is None. Fields follow from the config that was given, then from
    the model's own; what only `generate` or the model takes has no effect in a config.
    """
    if name in arguments:
        return arguments[name]
    setting = BY_NAME.get(name)
    if setting is not None and setting.kind is not Kind.FIELD:
        return None
    for config in (arguments.get("generation_config"), default):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None if setting is None else setting.default


def first_delegated(arguments: Mapping[str, Any], default: GenerationConfig) -> str | None:
    """Return the first setting that only the base's own `generate` honours, None without one."""
    setting, value = _first_active(LEFT_TO_THE_BASE, arguments, default)
    return None if setting is None else setting.describe(value)


def require_acceptable(
    arguments: Mapping[str, Any], default: GenerationConfig, *, busy: object = "wait"
) -> None:
    """Check the arguments of a call before anything is computed.

    Args:
        arguments: Of the call.
        default: The model's own generation config.
        busy: What becomes of it while another thread's call has the model.

    Raises:
        OptionError: If another speculation method is asked for, or an output of every forward, or
            `busy` has another value than its two.
        CacheError: If a cache is passed in that cannot be rolled back.
        PromptError: If the prompt is empty, of the wrong shape or padded on the right.
    """
    if not isinstance(busy, str) or busy not in {"wait", "raise"}:
        raise OptionError(
            f"busy is {busy!r}, expected 'wait' to wait for the calls of other threads, or 'raise' "
            "to fail with a BusyError"
        )
    setting, value = _first_active(REFUSED_SETTINGS, arguments, default)
    if setting is not None:
        raise OptionError(
            f"{setting.describe(value)} {setting.note}; drop it, or call .base.generate"
        )
    cache = arguments.get("past_key_values")
    # Recurrent states of a dynamic cache are put back rather than cropped.
    if isinstance(cache, Cache) and not (isinstance(cache, DynamicCache) or cache.is_croppable):
        raise CacheError(
            f"past_key_values is a {type(cache).__name__}, which cannot be rolled back; pass a "
            "DynamicCache, or none"
        )
    tokens = (
        arguments["inputs"] if arguments.get("inputs") is not None else arguments.get("input_ids")
    )
    if arguments.get("inputs_embeds") is not None:
        tokens = None  # the embeddings are the prompt, and Transformers checks them
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
        # With a cache the prompt may hold the new tokens alone, under a mask for all.
        is_continued = cache is not None and tokens is not None and mask.shape[1] > tokens.shape[1]
        if tokens is not None and mask.shape != tokens.shape and not is_continued:
            raise PromptError(
                f"attention mask has shape {tuple(mask.shape)}, the prompt {tuple(tokens.shape)}; "
                "pass the mask that the tokenizer returned with the prompt"
            )
        require_left_padding(mask)


@contextmanager
def naming_unknown(arguments: Iterable[str]) -> Iterator[None]:
    """Name arguments that nothing takes, and what they may be meant for.

    Args:
        arguments: Names of those that Transformers' ``generate`` is called with inside.

    Raises:
        OptionError: In place of Transformers' own error.
    """
    try:
        yield
    except ValueError as error:
        unknown = [name for name in arguments if repr(name) in str(error)]
        if "not used by the model" not in str(error) or not unknown:
            raise
        if unknown[0] in OPTIONS_OF_LOADING:
            remedy = "pass it to SpecModel.from_pretrained"
        else:
            remedy = suggest(unknown[0], [*BY_NAME, *OPTIONS_OF_LOADING, "acceptance"])
        raise OptionError(
            f"arguments {unknown!r} are not used by the model, nor known to generate; {remedy}"
        ) from error


def _first_active(
    settings: Iterable[Setting], arguments: Mapping[str, Any], default: GenerationConfig
) -> tuple[Setting | None, Any]:
    """Return the first of some settings that has an effect in a call, and its value."""

    def value_of(name: str) -> Any:
        return resolve_setting(name, arguments, default)

    setting = first_active(settings, value_of)
    return setting, None if setting is None else value_of(setting.name)
