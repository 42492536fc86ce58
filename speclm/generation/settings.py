"""The table of all settings of `generate`, and what becomes of each; the guide is written from it.

Transformers silently prefers a callable given as ``custom_generate`` to most of its own ways to
decode. So no setting may be missing: each field of `GenerationConfig`, each parameter of
`generate` and each model input of a text prompt has a row here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from transformers import GenerationConfig

Lookup = Callable[[str], Any]
"""Returns the value of a setting by its name, as Transformers resolves it."""


class Kind(Enum):
    """Where a setting may stand."""

    FIELD = "field"
    """A field of a generation config, given as a keyword or in a config."""
    PARAMETER = "parameter"
    """A parameter of `generate`."""
    INPUT = "model input"
    """An input of the model, given as a keyword."""


class Fate(Enum):
    """What becomes of a setting that has an effect."""

    HONOURED = "honoured"
    """The decode loop gives what ``base.generate`` gives; what that ignores is ignored too."""
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
        kind: Where it may stand.
        fate: What becomes of it.
        note: A verb phrase whose subject is the setting.
        inactive: Values at which it has no effect.
        needs: Name of the setting without which it has no effect.
        unless: Name of the setting with which it has no effect.
        default: Value where nobody sets one.
    """

    name: str
    kind: Kind
    fate: Fate
    note: str
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
        """Return the setting with a value that can be read, or its name."""
        is_short = value is None or isinstance(value, bool | int | float | str)
        return f"{self.name}={value!r}" if is_short else self.name


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list)


_OFF = (None, False)
_OWN = "asks for Transformers' own speculation, and this model has its own"
_OUTPUTS = "asks for tensors of one forward for each token, and a round has one for several"
_OF_BEAMS = "shapes beam search"
_OF_THE_ASSISTANT = "tunes assisted generation; Transformers has a default"
_OF_THE_CACHE = "describes a cache of a kind named by `cache_implementation`"

SETTINGS: tuple[Setting, ...] = (
    # Prompt and model inputs.
    Setting("inputs", PARAMETER, HONOURED, "is the prompt `[batch, seq]`"),
    Setting("input_ids", INPUT, HONOURED, "is another name of `inputs`"),
    Setting(
        "attention_mask",
        INPUT,
        HONOURED,
        "marks padding on the left; padding on the right is a `PromptError`, and a mask with holes "
        "is delegated",
    ),
    Setting(
        "past_key_values",
        INPUT,
        HONOURED,
        "continues from a `DynamicCache`; a cache that cannot be rolled back is a `CacheError`",
    ),
    Setting("logits_to_keep", INPUT, HONOURED, "has no effect on tokens"),
    Setting("position_ids", INPUT, DELEGATED, "numbers the prompt by hand"),
    Setting(
        "inputs_embeds", INPUT, HONOURED, "is a prompt of vectors, of which proposers see no text"
    ),
    Setting("labels", INPUT, DELEGATED, "has the model compute a loss"),
    # Parameters of `generate`.
    Setting("generation_config", PARAMETER, HONOURED, "holds any of the fields"),
    Setting(
        "logits_processor", PARAMETER, HONOURED, "changes scores; any class may be in the list"
    ),
    Setting(
        "stopping_criteria",
        PARAMETER,
        HONOURED,
        "ends rows; any class may be in the list",
        inactive=(None, []),
    ),
    Setting("prefix_allowed_tokens_fn", PARAMETER, HONOURED, "allows tokens by the text so far"),
    Setting("streamer", PARAMETER, HONOURED, "receives tokens as they are committed"),
    Setting("tokenizer", PARAMETER, HONOURED, "is read by `stop_strings` and `token_healing`"),
    Setting(
        "trust_remote_code",
        PARAMETER,
        HONOURED,
        "is read by ways to decode that Transformers fetches from the hub, none of them ours",
        inactive=_OFF,
    ),
    Setting(
        "synced_gpus",
        PARAMETER,
        DELEGATED,
        "keeps processes in step that share the weights of one model",
        inactive=_OFF,
    ),
    Setting(
        "custom_generate", PARAMETER, REFUSED, "replaces the loop of this model's own speculation"
    ),
    Setting("assistant_model", PARAMETER, REFUSED, _OWN),
    Setting(
        "assistant_tokenizer",
        PARAMETER,
        REFUSED,
        "translates for an assistant model of another vocabulary",
        needs="assistant_model",
    ),
    # Length and stopping.
    Setting("max_length", FIELD, HONOURED, "bounds prompt and new tokens together"),
    Setting("max_new_tokens", FIELD, HONOURED, "bounds the new tokens"),
    Setting("min_length", FIELD, HONOURED, "keeps rows from ending before that length"),
    Setting("min_new_tokens", FIELD, HONOURED, "keeps rows from ending before that many tokens"),
    Setting("max_time", FIELD, HONOURED, "stops after that many seconds, at the end of a forward"),
    Setting("stop_strings", FIELD, HONOURED, "ends a row at a text; needs `tokenizer`"),
    Setting("eos_token_id", FIELD, HONOURED, "ends a row; one id or several"),
    Setting("pad_token_id", FIELD, HONOURED, "fills rows that have ended"),
    Setting("bos_token_id", FIELD, HONOURED, "is the prompt where none is given"),
    Setting("decoder_start_token_id", FIELD, HONOURED, "has no effect without an encoder"),
    # Sampling.
    Setting("do_sample", FIELD, HONOURED, "samples instead of taking the best", inactive=_OFF),
    Setting("num_return_sequences", FIELD, HONOURED, "samples several continuations of each row"),
    Setting("temperature", FIELD, HONOURED, "flattens or sharpens the distribution"),
    Setting("top_k", FIELD, HONOURED, "keeps the k best tokens", inactive=(None, 0)),
    Setting("top_p", FIELD, HONOURED, "keeps the best tokens up to a mass"),
    Setting("min_p", FIELD, HONOURED, "keeps tokens above a share of the best one"),
    Setting("top_h", FIELD, HONOURED, "keeps the best tokens up to a share of the entropy"),
    Setting("typical_p", FIELD, HONOURED, "keeps tokens of typical information"),
    Setting("epsilon_cutoff", FIELD, HONOURED, "drops tokens below a probability"),
    Setting("eta_cutoff", FIELD, HONOURED, "drops tokens below a bound that entropy sets"),
    # Scores.
    Setting("repetition_penalty", FIELD, HONOURED, "makes tokens of the text so far less likely"),
    Setting(
        "encoder_repetition_penalty", FIELD, HONOURED, "makes tokens of the prompt more likely"
    ),
    Setting("no_repeat_ngram_size", FIELD, HONOURED, "forbids to repeat n-grams of the text"),
    Setting("encoder_no_repeat_ngram_size", FIELD, HONOURED, "forbids n-grams of the prompt"),
    Setting("bad_words_ids", FIELD, HONOURED, "forbids sequences of tokens"),
    Setting("sequence_bias", FIELD, HONOURED, "makes sequences of tokens more or less likely"),
    Setting("suppress_tokens", FIELD, HONOURED, "forbids tokens"),
    Setting("begin_suppress_tokens", FIELD, HONOURED, "forbids tokens at the first new position"),
    Setting("forced_bos_token_id", FIELD, HONOURED, "sets the token after a prompt of one token"),
    Setting("forced_eos_token_id", FIELD, HONOURED, "sets the token at `max_length`"),
    Setting(
        "exponential_decay_length_penalty",
        FIELD,
        HONOURED,
        "makes ending more likely from some position on",
    ),
    Setting("remove_invalid_values", FIELD, HONOURED, "replaces scores that are not finite"),
    Setting("renormalize_logits", FIELD, HONOURED, "normalises the processed scores"),
    Setting("watermarking_config", FIELD, HONOURED, "marks the text by a bias that a key sets"),
    # Outputs.
    Setting(
        "return_dict_in_generate",
        FIELD,
        HONOURED,
        "returns a `SpeculativeOutput`, which has the counters too",
        inactive=_OFF,
    ),
    Setting("output_scores", FIELD, HONOURED, "returns the processed scores", inactive=_OFF),
    Setting("output_logits", FIELD, HONOURED, "returns the logits", inactive=_OFF),
    Setting(
        "output_attentions",
        FIELD,
        REFUSED,
        _OUTPUTS,
        inactive=_OFF,
        needs="return_dict_in_generate",
    ),
    Setting(
        "output_hidden_states",
        FIELD,
        REFUSED,
        _OUTPUTS,
        inactive=_OFF,
        needs="return_dict_in_generate",
    ),
    # Cache and prefill.
    Setting(
        "use_cache",
        FIELD,
        DELEGATED,
        "recomputes the text for each token where it is not True",
        inactive=(True,),
        default=True,
    ),
    Setting(
        "cache_implementation",
        FIELD,
        DELEGATED,
        'names a cache that trees cannot use; `"dynamic"` is the usual one and has no effect',
        # "hybrid" is what old configs say; Transformers takes it for unset.
        inactive=(None, "dynamic", "hybrid"),
    ),
    Setting("cache_config", FIELD, DELEGATED, _OF_THE_CACHE, needs="cache_implementation"),
    Setting("max_cache_len", FIELD, DELEGATED, _OF_THE_CACHE, needs="cache_implementation"),
    Setting(
        "compile_config",
        FIELD,
        DELEGATED,
        "compiles forwards with a static cache",
        needs="cache_implementation",
    ),
    Setting(
        "disable_compile",
        FIELD,
        DELEGATED,
        "keeps forwards with a static cache from being compiled",
        inactive=_OFF,
        needs="cache_implementation",
    ),
    Setting(
        "continuous_batching_config",
        FIELD,
        DELEGATED,
        'describes batching under `cache_implementation="paged"`',
        needs="cache_implementation",
    ),
    Setting("prefill_chunk_size", FIELD, DELEGATED, "reads the prompt in pieces"),
    # Other ways to decode.
    Setting("num_beams", FIELD, DELEGATED, "searches with beams", inactive=(None, 1), default=1),
    Setting("num_beam_groups", FIELD, DELEGATED, _OF_BEAMS, needs="num_beams"),
    Setting("diversity_penalty", FIELD, DELEGATED, _OF_BEAMS, needs="num_beams"),
    Setting("length_penalty", FIELD, DELEGATED, _OF_BEAMS, needs="num_beams"),
    Setting("early_stopping", FIELD, DELEGATED, _OF_BEAMS, inactive=_OFF, needs="num_beams"),
    Setting("low_memory", FIELD, DELEGATED, _OF_BEAMS, inactive=_OFF, needs="num_beams"),
    Setting("constraints", FIELD, DELEGATED, "searches with beams for texts that have to occur"),
    Setting(
        "force_words_ids", FIELD, DELEGATED, "searches with beams for words that have to occur"
    ),
    Setting(
        "penalty_alpha",
        FIELD,
        DELEGATED,
        "searches contrastively",
        inactive=(None, 0),
        unless="do_sample",
    ),
    Setting("dola_layers", FIELD, DELEGATED, "contrasts layers"),
    Setting(
        "guidance_scale",
        FIELD,
        DELEGATED,
        "runs a second forward for each token, without the prompt",
        inactive=(None, 1),
    ),
    Setting(
        "negative_prompt_ids",
        PARAMETER,
        DELEGATED,
        "is the prompt of that second forward",
        needs="guidance_scale",
    ),
    Setting(
        "negative_prompt_attention_mask",
        PARAMETER,
        DELEGATED,
        "marks padding in it",
        needs="guidance_scale",
    ),
    Setting(
        "token_healing",
        FIELD,
        DELEGATED,
        "rewrites the end of the prompt before anything is decoded",
        inactive=_OFF,
    ),
    # Transformers' own speculation.
    Setting("prompt_lookup_num_tokens", FIELD, REFUSED, _OWN),
    Setting("assistant_early_exit", FIELD, REFUSED, _OWN),
    Setting("use_mtp", FIELD, REFUSED, _OWN, inactive=_OFF),
    Setting("speculation_type", FIELD, REFUSED, _OWN),
    Setting("is_assistant", FIELD, REFUSED, "makes a model draft for another", inactive=_OFF),
    Setting(
        "max_matching_ngram_size",
        FIELD,
        REFUSED,
        "tunes prompt lookup",
        needs="prompt_lookup_num_tokens",
    ),
    Setting("num_assistant_tokens", FIELD, REFUSED, _OF_THE_ASSISTANT, needs="assistant_model"),
    Setting(
        "num_assistant_tokens_schedule",
        FIELD,
        REFUSED,
        _OF_THE_ASSISTANT,
        needs="assistant_model",
    ),
    Setting(
        "assistant_confidence_threshold",
        FIELD,
        REFUSED,
        _OF_THE_ASSISTANT,
        needs="assistant_model",
    ),
    Setting("assistant_lookbehind", FIELD, REFUSED, _OF_THE_ASSISTANT, needs="assistant_model"),
    Setting("target_lookbehind", FIELD, REFUSED, _OF_THE_ASSISTANT, needs="assistant_model"),
    Setting(
        "assistant_ensemble_weight",
        FIELD,
        REFUSED,
        "mixes the distribution of an assistant model into the result",
        needs="assistant_model",
    ),
    # Bookkeeping.
    Setting("transformers_version", FIELD, HONOURED, "says who wrote a config; has no effect"),
)
"""All rows. Where several fit a call, the first one is named."""

BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}

REFUSED_SETTINGS = tuple(setting for setting in SETTINGS if setting.fate is REFUSED)
LEFT_TO_THE_BASE = tuple(setting for setting in SETTINGS if setting.fate is DELEGATED)


def first_active(settings: Iterable[Setting], lookup: Lookup) -> Setting | None:
    """Return the first setting that has an effect, None without one."""
    return next((setting for setting in settings if setting.is_active(lookup)), None)


def resolve_setting(name: str, arguments: Mapping[str, Any], default: GenerationConfig) -> Any:
    """Return a setting as `generate` resolves it.

    A keyword counts even if it is None. Then come the config that was given and the model's own,
    which have no effect on what only `generate` or the model takes.
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
