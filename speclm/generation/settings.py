"""Table of all settings of `generate` and how each is handled; the guide is written from it.

Given a callable ``custom_generate``, Transformers silently ignores most of its own decoding
methods. No setting may therefore be missing: each field of `GenerationConfig`, each parameter of
`generate` and each model input of a text prompt has a row here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from transformers import GenerationConfig

from speclm.cache.dynamic_cache import CACHE_NAMES

Lookup = Callable[[str], Any]
"""Returns the value of a setting by its name, as Transformers resolves it."""


class Kind(Enum):
    """Where a setting may be given."""

    FIELD = "field"
    """A field of a generation config, given as a keyword or in a config."""
    PARAMETER = "parameter"
    """A parameter of `generate`."""
    INPUT = "model input"
    """An input of the model, given as a keyword."""


class Fate(Enum):
    """How a setting that has an effect is handled."""

    HONOURED = "honoured"
    """The result is that of ``base.generate``; settings that it ignores are ignored too."""
    DELEGATED = "delegated"
    """``base.generate`` answers the call itself, and one line is logged."""
    REFUSED = "refused"
    """An `OptionError` is raised before anything is computed."""


FIELD, PARAMETER, INPUT = Kind
HONOURED, DELEGATED, REFUSED = Fate


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table.

    Args:
        name: Name in Transformers.
        note: A verb phrase whose subject is the setting.
        kind: Where it may be given.
        fate: What becomes of it.
        inactive: Values at which it has no effect.
        needs: Name of the setting without which it has no effect.
        unless: Name of the setting with which it has no effect.
        default: Value if none is set.
    """

    name: str
    note: str
    kind: Kind = FIELD
    fate: Fate = HONOURED
    inactive: tuple[Any, ...] = (None,)
    needs: str | None = None
    unless: str | None = None
    default: Any = None

    def is_active(self, lookup: Lookup) -> bool:
        """Return whether the setting has an effect in Transformers' own `generate`."""
        value = lookup(self.name)
        # A comparison of tensors has no truth value.
        if any(value is other or (_is_plain(value) and value == other) for other in self.inactive):
            return False
        if self.needs is not None and not BY_NAME[self.needs].is_active(lookup):
            return False
        return self.unless is None or not BY_NAME[self.unless].is_active(lookup)

    def describe(self, value: Any) -> str:
        """Return the name of a setting, with its value if that is short."""
        is_short = value is None or isinstance(value, bool | int | float | str)
        return f"{self.name}={value!r}" if is_short else self.name


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list)


_OFF = (None, False)
_OWN = "asks for Transformers' own speculation, which this model replaces"
_OUTPUTS = "asks for tensors of one forward per token, but a round decides several tokens at once"
_OF_BEAMS = "shapes beam search"
_OF_THE_ASSISTANT = "tunes assisted generation; Transformers has a default"
_OF_THE_CACHE = "configures the cache that `cache_implementation` names"

_delegated, _refused = partial(Setting, fate=DELEGATED), partial(Setting, fate=REFUSED)

SETTINGS: tuple[Setting, ...] = (
    # Prompt and model inputs.
    Setting("inputs", "gives the prompt, `[batch, seq]`", PARAMETER),
    Setting("input_ids", "means the same as `inputs`", INPUT),
    Setting(
        "attention_mask",
        "marks padding on the left; padding on the right is a `PromptError`, and a mask with holes "
        "is delegated",
        INPUT,
    ),
    Setting(
        "past_key_values",
        "continues from a `DynamicCache`; a cache that cannot be rolled back is a `CacheError`",
        INPUT,
    ),
    Setting("cache", "means the same as `past_key_values`, from Transformers 5.24 on", INPUT),
    Setting("logits_to_keep", "has no effect on tokens", INPUT),
    _delegated("position_ids", "sets the positions of the prompt", INPUT),
    Setting("inputs_embeds", "gives the prompt as vectors; proposers then see no text", INPUT),
    _delegated("labels", "makes the model compute a loss", INPUT),
    # Parameters of `generate`.
    Setting("generation_config", "holds any of the fields", PARAMETER),
    Setting("logits_processor", "changes scores; any class may be in the list", PARAMETER),
    Setting(
        "stopping_criteria",
        "ends rows; any class may be in the list",
        PARAMETER,
        inactive=(None, []),
    ),
    Setting("prefix_allowed_tokens_fn", "restricts tokens, given the text so far", PARAMETER),
    Setting("streamer", "receives tokens as they are committed", PARAMETER),
    Setting("tokenizer", "is read by `stop_strings` and `token_healing`", PARAMETER),
    Setting(
        "trust_remote_code",
        "applies only to decoding methods that Transformers loads from the hub; none is used here",
        PARAMETER,
        inactive=_OFF,
    ),
    _delegated(
        "synced_gpus",
        "keeps the forwards of processes that share one model in sync",
        PARAMETER,
        inactive=_OFF,
    ),
    _refused("custom_generate", "replaces the decoding loop, as this model does itself", PARAMETER),
    _refused("assistant_model", _OWN, PARAMETER),
    _refused(
        "assistant_tokenizer",
        "translates for an assistant model with another vocabulary",
        PARAMETER,
        needs="assistant_model",
    ),
    # Length and stopping.
    Setting("max_length", "bounds the length of prompt and new tokens together"),
    Setting("max_new_tokens", "bounds the number of new tokens"),
    Setting("min_length", "keeps rows from ending before that length"),
    Setting("min_new_tokens", "keeps rows from ending before that many tokens"),
    Setting("max_time", "stops after that many seconds, at the end of a forward"),
    Setting("stop_strings", "ends a row at a text; needs `tokenizer`"),
    Setting("eos_token_id", "ends a row; one id or several"),
    Setting("pad_token_id", "fills rows that have ended"),
    Setting("bos_token_id", "is the prompt if none is given"),
    Setting("decoder_start_token_id", "has no effect without an encoder"),
    # Sampling.
    Setting("do_sample", "samples instead of taking the most likely token", inactive=_OFF),
    Setting("num_return_sequences", "samples several continuations of each row"),
    Setting("temperature", "flattens or sharpens the distribution"),
    Setting("top_k", "keeps the k most likely tokens", inactive=(None, 0)),
    Setting("top_p", "keeps the most likely tokens up to a total probability"),
    Setting("min_p", "drops tokens below a fraction of the highest probability"),
    Setting("top_h", "keeps the most likely tokens up to a fraction of the entropy"),
    Setting("typical_p", "keeps tokens of typical information content"),
    Setting("epsilon_cutoff", "drops tokens below a probability"),
    Setting("eta_cutoff", "drops tokens below a threshold that depends on the entropy"),
    # Scores.
    Setting("repetition_penalty", "makes tokens of the text so far less likely"),
    Setting("encoder_repetition_penalty", "makes tokens of the prompt more likely"),
    Setting("no_repeat_ngram_size", "forbids repeating n-grams of the text"),
    Setting("encoder_no_repeat_ngram_size", "forbids n-grams of the prompt"),
    Setting("bad_words_ids", "forbids sequences of tokens"),
    Setting("sequence_bias", "makes sequences of tokens more or less likely"),
    Setting("suppress_tokens", "forbids tokens"),
    Setting("begin_suppress_tokens", "forbids tokens at the first new position"),
    Setting("forced_bos_token_id", "sets the token after a prompt of one token"),
    Setting("forced_eos_token_id", "sets the token at `max_length`"),
    Setting("exponential_decay_length_penalty", "makes ending more likely after some position"),
    Setting("remove_invalid_values", "replaces scores that are not finite"),
    Setting("renormalize_logits", "normalises the processed scores"),
    Setting("watermarking_config", "watermarks the text by a bias that depends on a key"),
    # Outputs.
    Setting(
        "return_dict_in_generate",
        "returns a `SpeculativeOutput`, which has the counters too",
        inactive=_OFF,
    ),
    Setting("output_scores", "returns the processed scores", inactive=_OFF),
    Setting("output_logits", "returns the logits", inactive=_OFF),
    _refused("output_attentions", _OUTPUTS, inactive=_OFF, needs="return_dict_in_generate"),
    _refused("output_hidden_states", _OUTPUTS, inactive=_OFF, needs="return_dict_in_generate"),
    # Cache and prefill.
    _delegated(
        "use_cache",
        "recomputes the whole text for each token unless it is True",
        inactive=(True,),
        default=True,
    ),
    # Old configs say "hybrid", which Transformers treats as unset.
    _delegated(
        "cache_implementation",
        'names a cache that trees cannot use; `"dynamic"` is the usual one and has no effect',
        inactive=(None, "dynamic", "hybrid"),
    ),
    _delegated("cache_config", _OF_THE_CACHE, needs="cache_implementation"),
    _delegated("max_cache_len", _OF_THE_CACHE, needs="cache_implementation"),
    _delegated(
        "compile_config", "compiles forwards with a static cache", needs="cache_implementation"
    ),
    _delegated(
        "disable_compile",
        "keeps forwards with a static cache from being compiled",
        inactive=_OFF,
        needs="cache_implementation",
    ),
    _delegated(
        "continuous_batching_config",
        'describes batching under `cache_implementation="paged"`',
        needs="cache_implementation",
    ),
    _delegated("prefill_chunk_size", "reads the prompt in pieces"),
    # Other ways to decode.
    _delegated("num_beams", "runs beam search", inactive=(None, 1), default=1),
    _delegated("num_beam_groups", _OF_BEAMS, needs="num_beams"),
    _delegated("diversity_penalty", _OF_BEAMS, needs="num_beams"),
    _delegated("length_penalty", _OF_BEAMS, needs="num_beams"),
    _delegated("early_stopping", _OF_BEAMS, inactive=_OFF, needs="num_beams"),
    _delegated("low_memory", _OF_BEAMS, inactive=_OFF, needs="num_beams"),
    _delegated("constraints", "runs beam search for texts that must occur"),
    _delegated("force_words_ids", "runs beam search for words that must occur"),
    _delegated("penalty_alpha", "runs contrastive search", inactive=(None, 0), unless="do_sample"),
    _delegated("dola_layers", "contrasts layers"),
    _delegated(
        "guidance_scale",
        "runs a second forward for each token, without the prompt",
        inactive=(None, 1),
    ),
    _delegated(
        "negative_prompt_ids",
        "is the prompt of that second forward",
        PARAMETER,
        needs="guidance_scale",
    ),
    _delegated(
        "negative_prompt_attention_mask", "marks padding in it", PARAMETER, needs="guidance_scale"
    ),
    _delegated(
        "token_healing", "rewrites the end of the prompt before anything is decoded", inactive=_OFF
    ),
    # Transformers' own speculation.
    _refused("prompt_lookup_num_tokens", _OWN),
    _refused("assistant_early_exit", _OWN),
    _refused("use_mtp", _OWN, inactive=_OFF),
    _refused("speculation_type", _OWN),
    _refused("is_assistant", "makes a model draft for another", inactive=_OFF),
    _refused("max_matching_ngram_size", "tunes prompt lookup", needs="prompt_lookup_num_tokens"),
    _refused("num_assistant_tokens", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused("num_assistant_tokens_schedule", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused("assistant_confidence_threshold", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused("assistant_lookbehind", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused("target_lookbehind", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused(
        "assistant_ensemble_weight",
        "mixes the distribution of an assistant model into the result",
        needs="assistant_model",
    ),
    # Bookkeeping.
    Setting("transformers_version", "records which version wrote a config; has no effect"),
)
"""All rows. If several apply to a call, the first one is named."""

BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}

REFUSED_SETTINGS = tuple(setting for setting in SETTINGS if setting.fate is REFUSED)
LEFT_TO_THE_BASE = tuple(setting for setting in SETTINGS if setting.fate is DELEGATED)


def first_active(settings: Iterable[Setting], lookup: Lookup) -> Setting | None:
    """Return the first setting that has an effect, or None."""
    return next((setting for setting in settings if setting.is_active(lookup)), None)


def resolve_setting(name: str, arguments: Mapping[str, Any], default: GenerationConfig) -> Any:
    """Return a setting as `generate` resolves it.

    A keyword takes precedence, even if it is None; then comes the given config, then the model's
    own. Configs have no effect on parameters of `generate` and on inputs of the model.
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


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among arguments of `generate` or inputs of a model; None without one."""
    given = (arguments.get(name) for name in CACHE_NAMES)
    return next((cache for cache in given if cache is not None), None)
